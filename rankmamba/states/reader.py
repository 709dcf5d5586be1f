"""Reading a store of document states: its files are mapped, checked against their checksums, and never written.

A folder holds manifest.json (its presence means that the store is whole), states.bin (one record per document), table.bin (where
each record is, its number of tokens and its CRC-32), ids.bin and lookup.bin (from doc_id to row) and, for int8, int4 and stores without all
layers, profile.bin.
"""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import lookup
from ..errors import InputError
from ..files import json_sha256, sha256
from .encoding import DTYPES, Profile, ids_bytes, record_bytes

TABLE = np.dtype(
    [("offset", "<u8"), ("id_offset", "<u8"), ("id_bytes", "<u4"), ("tokens", "<u4"), ("crc", "<u4"), ("zero", "<u4")]
)
MANIFEST, PROGRESS = "manifest.json", "progress.json"
STATES, ROWS, IDS, LOOKUP, PROFILE = "states.bin", "table.bin", "ids.bin", "lookup.bin", "profile.bin"


class Names:
    """The doc_ids of a store by row, and rows by doc_id, all read from the mapped files."""

    def __init__(self, folder: Path):
        self.table = np.memmap(folder / ROWS, dtype=TABLE, mode="r")
        self._ids = np.memmap(folder / IDS, dtype=np.uint8, mode="r") if os.path.getsize(folder / IDS) else np.empty(0, np.uint8)
        if (folder / LOOKUP).is_file():
            self._lookup = np.memmap(folder / LOOKUP, dtype="<u8", mode="r").reshape(2, -1)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> str:
        start = int(self.table["id_offset"][row])
        return self._ids[start : start + int(self.table["id_bytes"][row])].tobytes().decode()

    def find(self, doc_id: str) -> int | None:
        """Return the row of a document, or None."""
        return lookup.find(self._lookup, doc_id, self.__getitem__)


class Reader:
    """A whole store, read by mapping its files; it writes nothing.

    Raises:
        InputError: there is no store, it is unfinished, or a file is missing, truncated or altered.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        self.dtype, self._marked = (self.manifest["header"][name] for name in ("dtype", "marked"))
        done, sums = self.manifest["done"], self.manifest["sha256"]
        sizes = {STATES: done[STATES], ROWS: done["documents"] * TABLE.itemsize, IDS: done[IDS], LOOKUP: done["documents"] * 16}
        for name in (STATES, *sums):
            path = folder / name
            wrong, size = None, path.stat().st_size if path.is_file() else 0
            if not path.is_file() or path.resolve().parent != folder.resolve():
                wrong = f"expected the file {path}, found none in that folder"
            elif size != sizes.get(name, size):
                wrong = f"expected {sizes[name]:,} bytes, got {size:,} ({path})"
            elif name in sums and sha256(path) != sums[name]:
                wrong = f"expected the file as it was written, got an altered one ({path})"
            if wrong is not None:
                read_manifest(folder)  # says so if documents are being added since
                raise InputError(f"{wrong}; delete the folder, build again")
        self.names = Names(folder)
        self._states = np.memmap(folder / STATES, dtype=np.uint8, mode="c")  # copy on write: torch wants it writable
        self._checked = np.zeros(len(self.names), dtype=bool)

    def profile(self, shapes: Sequence[Sequence[int]]) -> Profile | None:
        """Return the profile that the records were written with, None if there is none; shapes: of a document's parts."""
        return read_profile(self.folder, shapes) if PROFILE in self.manifest["sha256"] else None

    def record(self, row: int, numbers: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a document's state, of `numbers` numbers, and its token ids if queries are marked; checked when first read.

        Raises:
            InputError: its bytes are not those that were written.
        """
        start = int(self.names.table["offset"][row])
        end_of_state, tokens = record_bytes(self.dtype, numbers), int(self.names.table["tokens"][row])
        size = end_of_state + (ids_bytes(tokens) if self._marked else 0)
        record = self._states[start : start + size]
        if not self._checked[row]:
            if len(record) < size or zlib.crc32(record) != self.names.table["crc"][row]:
                raise InputError(
                    f"expected the state of {self.names[row]!r} as it was written, got other bytes ({self.folder / STATES}, byte {start}); "
                    "delete the folder, build again"
                )
            self._checked[row] = True
        ids = record[end_of_state:].view("<i4")[:tokens] if self._marked else None
        return record[:end_of_state], ids


def read_profile(folder: Path, shapes: Sequence[Sequence[int]]) -> Profile:
    """Read a store's profile; shapes: of a document's parts.

    Raises:
        InputError: the file is not as long as these shapes need.
    """
    flat = torch.from_numpy(np.fromfile(folder / PROFILE, dtype=np.float32))
    sizes = [2 * int(np.prod(shape)) for shape in shapes]
    if len(flat) != sum(sizes):
        raise InputError(
            f"expected {sum(sizes):,} numbers, got {len(flat):,} ({folder / PROFILE}); delete the folder, build again"
        )
    pieces = flat.split(sizes)
    return [tuple(piece.view(2, *shape)) for piece, shape in zip(pieces, shapes, strict=True)]


def read_manifest(folder: Path) -> dict:
    """Read and check the manifest of a store."""
    path = folder / MANIFEST
    if not path.is_file():
        begun = folder / PROGRESS
        if begun.is_file():
            raise InputError(
                f"expected finished states in {folder}, got {unsealed(begun)['done']['documents']:,} documents of a build that "
                "is running or was stopped; wait for it, or build again with the same documents, or these alone"
            )
        raise InputError(f"expected a folder of document states, got {folder} without {MANIFEST}; DocumentStates.build makes one")
    manifest = unsealed(path)
    sums = manifest.get("sha256")
    if not isinstance(sums, dict) or not {ROWS, IDS, LOOKUP} <= set(sums) <= {ROWS, IDS, LOOKUP, PROFILE}:
        raise InputError(
            f"expected the checksums of {ROWS}, {IDS} and {LOOKUP}, got {sums!r:.80} ({path}); delete the folder, build again"
        )
    return manifest


def sealed(content: dict) -> str:
    """The text of a JSON file that carries its own checksum."""
    return json.dumps(content | {"checksum": json_sha256(content)}, indent=1) + "\n"


def unsealed(path: Path) -> dict:
    """Read a sealed file with the parts `header` and `done`.

    Raises:
        InputError: it is not as it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        intact = content.pop("checksum") == json_sha256(content)
        header, done = content["header"], content["done"]
        counts = [done[name] for name in ("documents", "tokens", STATES, ROWS, IDS)]
        intact &= header["dtype"] in DTYPES and all(type(count) is int and count >= 0 for count in counts)
        intact &= type(header["marked"]) is bool
        intact &= header["layers"] is None or all(type(layer) is int for layer in header["layers"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise InputError(f"expected the file as it was written, got an altered one ({path}); delete the folder and build again")
    return content


def compare_headers(ours: dict, theirs: dict, what: str, remedy: str) -> None:
    """Refuse states that are not this model's, naming everything that differs."""
    differ = [
        f"{name} (theirs {_short(theirs.get(name))}, ours {_short(ours[name])})"
        for name in ours
        if ours[name] != theirs.get(name)
    ]
    if differ:
        raise InputError(f"expected {what} to fit, got another {', another '.join(differ)}; {remedy}")


def _short(value) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text[:12] if len(text) == 64 and isinstance(value, str) else text
