"""The files of a store of document states: a writer that may be killed at any moment, a reader that maps them.

A folder holds manifest.json (whose presence says that the store is whole), states.bin (one record a document: its state and, for
a model whose queries are marked, its token ids), table.bin (where each record is, its tokens and its CRC-32), ids.bin and
lookup.bin (from doc_id to row) and, for int8, int4 and stores without all layers, profile.bin.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import torch

from . import __version__
from .errors import InputError
from .files import refusals, sha256, write_text
from .state_formats import DTYPES, Profile, ids_bytes, record_bytes

TABLE = np.dtype(
    [("offset", "<u8"), ("id_offset", "<u8"), ("id_bytes", "<u4"), ("tokens", "<u4"), ("crc", "<u4"), ("zero", "<u4")]
)
MANIFEST, PROGRESS, LOCK = "manifest.json", "progress.json", "build.lock"
STATES, ROWS, IDS, LOOKUP, PROFILE = "states.bin", "table.bin", "ids.bin", "lookup.bin", "profile.bin"


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Own `folder` for building; a second builder is refused, and what the disk refuses is an `InputError`."""
    try:
        with refusals(f"document states to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / LOCK, timeout=0):
                yield
    except filelock.Timeout as error:
        raise InputError(
            f"expected one builder in {folder}, got a second; wait for the other, or choose another folder"
        ) from error


class Writer:
    """Appends blocks of documents; what was committed survives a kill, what was not is cut off at the next start.

    header: what the store is of; a folder that was begun with another header is refused.
    """

    def __init__(self, folder: Path, header: dict):
        self.folder, self.header = folder, header
        self.done = {"documents": 0, "tokens": 0, "digest": "", **{name: 0 for name in (STATES, ROWS, IDS)}}
        self.digest = hashlib.sha256()
        self.whole = (folder / MANIFEST).is_file()
        if self.whole or (folder / PROGRESS).is_file():
            before = read_manifest(folder) if self.whole else _unsealed(folder / PROGRESS)
            compare_headers(header, before["header"], f"the states in {folder}", "choose another folder, or delete this one")
            self.done = before["done"]
        for halfway in folder.glob(".*.json.*"):  # what a kill left of `write_text`
            shutil.rmtree(halfway)
        if self.whole:
            (folder / PROGRESS).unlink(missing_ok=True)
            return
        for name in (STATES, ROWS, IDS):
            with open(folder / name, "ab") as file:
                if file.tell() < self.done[name]:
                    raise InputError(
                        f"expected {self.done[name]:,} bytes of finished documents, got {file.tell():,} ({folder / name}); "
                        "delete the folder and build the states again"
                    )
                file.truncate(self.done[name])

    def has(self, doc_id: str, text: str, place: int) -> bool:
        """Count in a document, the next in order; whether its state is stored already.

        Raises:
            InputError: the stored documents turn out to be others.
        """
        for item in (doc_id, text):
            encoded = item.encode()
            self.digest.update(b"%d:" % len(encoded) + encoded)
        stored = self.done["documents"]
        others = place + 1 == stored and self.digest.hexdigest() != self.done["digest"]
        if others or (self.whole and place >= stored):
            raise InputError(
                f"expected the {stored:,} documents that {self.folder} holds the states of, got others; "
                "choose another folder, or delete this one"
            )
        return place < stored

    def add(self, doc_ids: Sequence[str], tokens: Sequence[int], numbers: Sequence[int], records: Iterator, digest: str) -> None:
        """Store a block: `records` yields (place in the block, record) in any order; `digest` is that of all documents so far."""
        sizes = [record_bytes(self.header["dtype"], count) for count in numbers]
        if self.header["marked"]:
            sizes = [size + ids_bytes(count) for size, count in zip(sizes, tokens, strict=True)]
        encoded = [doc_id.encode() for doc_id in doc_ids]
        lengths = [len(name) for name in encoded]
        table = np.zeros(len(doc_ids), dtype=TABLE)
        table["offset"] = self.done[STATES] + np.cumsum([0, *sizes[:-1]])
        table["id_offset"] = self.done[IDS] + np.cumsum([0, *lengths[:-1]])
        table["id_bytes"], table["tokens"] = lengths, tokens
        with open(self.folder / STATES, "r+b") as file:
            for place, record in records:
                file.seek(int(table["offset"][place]))
                file.write(record)
                table["crc"][place] = zlib.crc32(record)
            _flush(file)
        for name, data in ((ROWS, table.tobytes()), (IDS, b"".join(encoded))):
            with open(self.folder / name, "ab") as file:
                file.write(data)
                _flush(file)
        added = {"documents": len(doc_ids), "tokens": int(sum(tokens)), STATES: sum(sizes), ROWS: table.nbytes, IDS: sum(lengths)}
        self.done = {name: value + added.get(name, 0) if name != "digest" else digest for name, value in self.done.items()}
        write_text(self.folder / PROGRESS, _sealed({"header": self.header, "done": self.done}))

    def need(self, size: int) -> None:
        """Refuse to begin what the disk has no room for; size: bytes of all records, 0 if unknown."""
        missing = size - self.done[STATES] - shutil.disk_usage(self.folder).free
        if missing > 0 and not self.whole:
            raise InputError(
                f"expected {size:,} bytes for the states in {self.folder}, got a disk that lacks {missing:,} of them; "
                "free some space, or choose a smaller dtype"
            )

    def profile(self, shapes: Sequence[Sequence[int]]) -> Profile | None:
        """Return the profile if a block was committed, else None: it is made from the first batch of documents."""
        return read_profile(self.folder, shapes) if self.done["documents"] else None

    def write_profile(self, profile: Profile) -> Profile:
        (self.folder / PROFILE).write_bytes(
            b"".join(tensor.contiguous().numpy().tobytes() for pair in profile for tensor in pair)
        )
        return profile

    def finish(self, digest: str) -> None:
        """Make the store whole; digest: of the documents that came.

        Raises:
            InputError: the documents are fewer than those stored before, none at all, or one came twice.
        """
        if not self.done["documents"]:
            raise InputError(f"expected at least one document to build states of, got none for {self.folder}")
        if digest != self.done["digest"]:
            raise InputError(
                f"expected the {self.done['documents']:,} documents of {self.folder}, got fewer; choose another folder"
            )
        if self.whole:
            return
        names = Names(self.folder)
        hashes = np.array([_hash(names[row]) for row in range(len(names))], dtype="<u8")
        order = np.argsort(hashes, kind="stable").astype("<u8")
        for place in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]):
            first, second = order[place : place + 2]
            if names[first] == names[second]:
                raise InputError(f"expected each doc_id once, got {names[first]!r} again as document {second + 1}; remove one")
        (self.folder / LOOKUP).write_bytes(hashes[order].tobytes() + order.tobytes())
        files = [path for name in (ROWS, IDS, LOOKUP, PROFILE) if (path := self.folder / name).is_file()]
        manifest = {"header": self.header, "done": self.done, "sha256": {path.name: sha256(path) for path in files}}
        manifest |= {"version": __version__}
        write_text(self.folder / MANIFEST, _sealed(manifest))
        (self.folder / PROGRESS).unlink(missing_ok=True)


class Names:
    """The doc_ids of a store by row, and rows by doc_id; nothing of it is held in memory."""

    def __init__(self, folder: Path):
        self.table = np.memmap(folder / ROWS, dtype=TABLE, mode="r")
        self._ids = np.memmap(folder / IDS, dtype=np.uint8, mode="r") if os.path.getsize(folder / IDS) else np.empty(0, np.uint8)
        if (folder / LOOKUP).is_file():
            self._hashes, self._rows = np.memmap(folder / LOOKUP, dtype="<u8", mode="r").reshape(2, -1)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> str:
        start = int(self.table["id_offset"][row])
        return self._ids[start : start + int(self.table["id_bytes"][row])].tobytes().decode()

    def find(self, doc_id: str) -> int | None:
        """Return the row of a document, or None."""
        wanted = np.uint64(_hash(doc_id))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self) and self._hashes[place] == wanted:  # as good as never more than one
            row = int(self._rows[place])
            if self[row] == doc_id:
                return row
            place += 1
        return None


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
            if not path.is_file() or path.resolve().parent != folder.resolve():
                raise InputError(f"expected the file {path}, found none in that folder; build the states again")
            size = path.stat().st_size
            if size != sizes.get(name, size):
                raise InputError(f"expected {sizes[name]:,} bytes, got {size:,} ({path}); build the states again")
            if name in sums and sha256(path) != sums[name]:
                raise InputError(f"expected the file as it was written, got an altered one ({path}); build the states again")
        self.names = Names(folder)
        self._states = np.memmap(folder / STATES, dtype=np.uint8, mode="c")  # copy on write: torch wants it writable
        self._checked = np.zeros(len(self.names), dtype=bool)
        self._profile = None

    def profile(self, shapes: Sequence[Sequence[int]]) -> Profile | None:
        """Return the profile that the records were written with, or None if without; shapes: of a document's parts."""
        return read_profile(self.folder, shapes) if PROFILE in self.manifest["sha256"] else None

    def record(self, row: int, numbers: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a document's state, so many numbers, and its ids if queries are marked; the first reading of each one checks it.

        Raises:
            InputError: its bytes are not those that were written.
        """
        start = int(self.names.table["offset"][row])
        end_of_state, tokens = record_bytes(self.dtype, numbers), int(self.names.table["tokens"][row])
        size = end_of_state + (ids_bytes(tokens) if self._marked else 0)
        record = self._states[start : start + size]
        if not self._checked[row]:
            if len(record) < size or zlib.crc32(record) != self.names.table["crc"][row]:
                path = self.folder / STATES
                raise InputError(
                    f"expected the state of {self.names[row]!r} as it was written, got other bytes ({path}, byte {start}); "
                    "build the states again"
                )
            self._checked[row] = True
        ids = record[end_of_state:].view("<i4")[:tokens] if self._marked else None
        return record[:end_of_state], ids

    def verify(self) -> None:
        """Check every record now.

        Raises:
            InputError: one was altered.
        """
        ends = np.append(self.names.table["offset"][1:], self.manifest["done"][STATES])
        for row, (start, end) in enumerate(zip(self.names.table["offset"], ends, strict=True)):
            if zlib.crc32(self._states[int(start) : int(end)]) != self.names.table["crc"][row]:
                raise InputError(
                    f"expected the state of {self.names[row]!r} as it was written, got other bytes; build them again"
                )


def read_profile(folder: Path, shapes: Sequence[Sequence[int]]) -> Profile:
    flat = torch.from_numpy(np.fromfile(folder / PROFILE, dtype=np.float32))
    sizes = [2 * int(np.prod(shape)) for shape in shapes]
    if len(flat) != sum(sizes):
        raise InputError(f"expected {sum(sizes):,} numbers, got {len(flat):,} ({folder / PROFILE}); build the states again")
    pieces = flat.split(sizes)
    return [tuple(piece.view(2, *shape)) for piece, shape in zip(pieces, shapes, strict=True)]


def read_manifest(folder: Path) -> dict:
    """Read and check the manifest of a store."""
    path = folder / MANIFEST
    if not path.is_file():
        begun = folder / PROGRESS
        if begun.is_file():
            raise InputError(
                f"expected finished states in {folder}, got {_unsealed(begun)['done']['documents']:,} documents of a build that "
                "was stopped; build again"
            )
        raise InputError(f"expected a folder of document states, got {folder} without {MANIFEST}; DocumentStates.build makes one")
    manifest = _unsealed(path)
    sums = manifest.get("sha256")
    if not isinstance(sums, dict) or not {ROWS, IDS, LOOKUP} <= set(sums) <= {ROWS, IDS, LOOKUP, PROFILE}:
        raise InputError(
            f"expected the checksums of {ROWS}, {IDS} and {LOOKUP}, got {sums!r:.80} ({path}); build the states again"
        )
    return manifest


def _sealed(content: dict) -> str:
    """The text of a JSON file that says itself whether it is as it was written."""
    return json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n"


def _unsealed(path: Path) -> dict:
    """Read a sealed file with the parts `header` and `done`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        intact = content.pop("checksum") == _checksum(content)
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
    """Refuse states that are not of this model, naming everything that differs."""
    differ = [
        f"{name} (theirs {_short(theirs.get(name))}, ours {_short(ours[name])})"
        for name in ours
        if ours[name] != theirs.get(name)
    ]
    if differ:
        raise InputError(f"expected {what} to fit, got another {', another '.join(differ)}; {remedy}")


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 and isinstance(value, str) else text


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash(doc_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest(), "little")


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
