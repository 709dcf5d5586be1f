"""The files of a store of document states: number formats, a writer that may be killed at any moment, a reader that maps them.

A folder holds manifest.json (whose presence says that the store is whole), states.bin (one record a document), table.bin (where
each record is, its tokens and its CRC-32), ids.bin and lookup.bin (from doc_id to row) and, for int8, int4 and stores without all layers, profile.bin.
"""

import errno
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
from .files import sha256, write_text

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4}
DTYPES = (*FLOATS, *BITS)
GROUP = 32  # numbers that share a scale
ALIGN = 64  # bytes; a record begins at a multiple of it
TABLE = np.dtype([("offset", "<u8"), ("id_offset", "<u8"), ("id_bytes", "<u4"), ("tokens", "<u4"), ("crc", "<u4"), ("zero", "<u4")])
MANIFEST, PROGRESS, LOCK = "manifest.json", "progress.json", "build.lock"
STATES, ROWS, IDS, LOOKUP, PROFILE = "states.bin", "table.bin", "ids.bin", "lookup.bin", "profile.bin"

Parts = list[torch.Tensor]  # what one document's state is made of, in a fixed order
Profile = list[tuple[torch.Tensor, torch.Tensor]]  # for each part the mean of each number over documents, and its unit


def record_bytes(dtype: str, numbers: int) -> int:
    """Return the bytes that a document of so many numbers takes."""
    size = numbers * FLOATS[dtype].itemsize if dtype in FLOATS else -(-numbers // GROUP) * (GROUP * BITS[dtype] // 8 + 2)
    return -(-size // ALIGN) * ALIGN


def encode(dtype: str, parts: Parts, profile: Profile | None = None) -> np.ndarray:
    """Write one document's parts (float32) as a record, uint8 (record_bytes,).

    int8, int4: every number is taken as its distance from the mean of its place, in units of its place (both in `profile`); then
    each 32 in a row share a scale (float16).

    Raises:
        InputError: a number is not finite, or too large for float16.
    """
    if dtype in FLOATS:
        stored = torch.cat([part.reshape(-1) for part in parts]).to(FLOATS[dtype])
        if not stored.isfinite().all():
            raise InputError(f"expected states that {dtype} can hold, got numbers beyond its range; use bfloat16 or float32")
        encoded = stored.view(torch.uint8)
    else:
        flat = torch.cat([((part - mean) / unit).reshape(-1) for part, (mean, unit) in zip(parts, profile, strict=True)])
        if not flat.isfinite().all():
            raise InputError("expected finite states, got infinite ones or NaN; check the model's weights")
        groups = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
        limit = 2 ** (BITS[dtype] - 1) - 1
        scales = (groups.abs().amax(1) / limit).half()
        whole = (groups / scales.float().clamp(min=1e-7)[:, None]).round_().clamp_(-limit, limit).to(torch.int8)
        if dtype == "int4":
            low, high = (whole + 8).view(torch.uint8).view(-1, 2, GROUP // 2).unbind(1)
            whole = low | high << 4
        encoded = torch.cat([scales.view(torch.uint8), whole.reshape(-1).view(torch.uint8)])
    record = np.zeros(-(-len(encoded) // ALIGN) * ALIGN, dtype=np.uint8)
    record[: len(encoded)] = encoded.numpy()
    return record


def decode(dtype: str, record: np.ndarray, parts: Parts, profile: Profile | None = None) -> None:
    """Read a record into one document's parts, which may be strided and of any float type."""
    numbers = sum(part.numel() for part in parts)
    raw = torch.from_numpy(record)
    if dtype in FLOATS:
        flat = raw[: numbers * FLOATS[dtype].itemsize].view(FLOATS[dtype])
    else:
        groups = -(-numbers // GROUP)
        scales = raw[: 2 * groups].view(torch.float16).float()
        packed = raw[2 * groups : groups * (2 + GROUP * BITS[dtype] // 8)]
        if dtype == "int4":
            low, high = (packed & 15).view(-1, 1, GROUP // 2), (packed >> 4).view(-1, 1, GROUP // 2)
            whole = torch.cat([low, high], 1).view(groups, GROUP).float().sub_(8)
        else:
            whole = packed.view(torch.int8).view(groups, GROUP).float()
        flat = whole.mul_(scales[:, None]).view(-1)
    start = 0
    for place, part in enumerate(parts):
        values = flat[start : start + part.numel()].view(part.shape)
        if dtype in BITS:
            mean, unit = profile[place]
            values = torch.addcmul(mean, values, unit)
        part.copy_(values)
        start += part.numel()


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Own `folder` for building; a second builder is refused, and what the disk refuses is an `InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / LOCK, timeout=0):
            yield
    except filelock.Timeout as error:
        raise InputError(f"expected one builder in {folder}, got a second; wait for the other, or choose another folder") from error
    except OSError as error:
        room = f"{shutil.disk_usage(folder).free:,} bytes are free; " if error.errno == errno.ENOSPC else ""
        raise InputError(
            f"expected to write document states to {folder}, got: {error.strerror or error}; {room}mend that and build again, "
            "documents that are finished are kept"
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
            before = read_manifest(folder) if self.whole else json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            compare_headers(header, before["header"], f"the states in {folder}", "choose another folder, or delete this one")
            self.done = before["done"]
        if not self.whole:
            for halfway in folder.glob(".*.json.*"):  # what a kill left of `write_text`
                shutil.rmtree(halfway)
            for name in (STATES, ROWS, IDS):
                with open(folder / name, "ab") as file:
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
        write_text(self.folder / PROGRESS, json.dumps({"header": self.header, "done": self.done}))

    def need(self, size: int) -> None:
        """Refuse to begin what the disk has no room for; size: bytes of all records, 0 if unknown."""
        missing = size - self.done[STATES] - shutil.disk_usage(self.folder).free
        if missing > 0 and not self.whole:
            raise InputError(f"expected {size:,} bytes for the states in {self.folder}, got a disk that lacks {missing:,} of them; "
                             "free some space, or choose a smaller dtype")  # fmt: skip

    def profile(self, shapes: Sequence[Sequence[int]]) -> Profile | None:
        """Return the profile if a block was committed, else None: it is made from the first batch of documents."""
        return read_profile(self.folder, shapes) if self.done["documents"] else None

    def write_profile(self, profile: Profile) -> Profile:
        (self.folder / PROFILE).write_bytes(b"".join(tensor.contiguous().numpy().tobytes() for pair in profile for tensor in pair))
        return profile

    def finish(self, digest: str) -> None:
        """Make the store whole; digest: of the documents that came.

        Raises:
            InputError: the documents are fewer than those stored before, none at all, or one came twice.
        """
        if not self.done["documents"]:
            raise InputError(f"expected at least one document to build states of, got none for {self.folder}")
        if digest != self.done["digest"]:
            raise InputError(f"expected the {self.done['documents']:,} documents of {self.folder}, got fewer; choose another folder")
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
        write_text(self.folder / MANIFEST, json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1) + "\n")
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
        self.dtype = self.manifest["header"]["dtype"]
        for name, size in ((STATES, self.manifest["done"][STATES]), *((name, None) for name in self.manifest["sha256"])):
            path = folder / name
            if not path.is_file():
                raise InputError(f"expected the file {path}, found none; build the states again")
            if size is not None and path.stat().st_size != size:
                raise InputError(f"expected {size:,} bytes, got {path.stat().st_size:,} ({path}); build the states again")
            if size is None and sha256(path) != self.manifest["sha256"][name]:
                raise InputError(f"expected the file as it was written, got an altered one ({path}); build the states again")
        self.names = Names(folder)
        self._states = np.memmap(folder / STATES, dtype=np.uint8, mode="c")  # copy on write: torch wants it writable
        self._checked = np.zeros(len(self.names), dtype=bool)
        self._profile = None

    def profile(self, shapes: Sequence[Sequence[int]]) -> Profile | None:
        """Return the profile that the records were written with, or None if without; shapes: of a document's parts."""
        return read_profile(self.folder, shapes) if PROFILE in self.manifest["sha256"] else None

    def record(self, row: int, numbers: int) -> np.ndarray:
        """Return a document's record; the first reading of each one checks it.

        Raises:
            InputError: its bytes are not those that were written.
        """
        start = int(self.names.table["offset"][row])
        record = self._states[start : start + record_bytes(self.dtype, numbers)]
        if not self._checked[row]:
            if zlib.crc32(record) != self.names.table["crc"][row]:
                path = self.folder / STATES
                raise InputError(f"expected the state of {self.names[row]!r} as it was written, got other bytes ({path}, byte {start}); "
                                 "build the states again")  # fmt: skip
            self._checked[row] = True
        return record

    def verify(self) -> None:
        """Check every record now.

        Raises:
            InputError: one was altered.
        """
        ends = np.append(self.names.table["offset"][1:], self.manifest["done"][STATES])
        for row, (start, end) in enumerate(zip(self.names.table["offset"], ends, strict=True)):
            if zlib.crc32(self._states[int(start) : int(end)]) != self.names.table["crc"][row]:
                raise InputError(f"expected the state of {self.names[row]!r} as it was written, got other bytes; build them again")


def read_profile(folder: Path, shapes: Sequence[Sequence[int]]) -> Profile:
    flat = torch.from_numpy(np.fromfile(folder / PROFILE, dtype=np.float32))
    pieces = flat.split([2 * int(np.prod(shape)) for shape in shapes])
    return [tuple(piece.view(2, *shape)) for piece, shape in zip(pieces, shapes, strict=True)]


def read_manifest(folder: Path) -> dict:
    """Read and check the manifest of a store."""
    path = folder / MANIFEST
    if not path.is_file():
        begun = folder / PROGRESS
        if begun.is_file():
            stored = json.loads(begun.read_text(encoding="utf-8"))["done"]["documents"]
            raise InputError(f"expected finished states in {folder}, got {stored:,} documents of a build that was stopped; build again")
        raise InputError(f"expected a folder of document states, got {folder} without {MANIFEST}; DocumentStates.build makes one")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        intact = manifest.pop("checksum") == _checksum(manifest)
    except (ValueError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise InputError(f"expected the manifest as it was written, got an altered one ({path}); build the states again")
    return manifest


def compare_headers(ours: dict, theirs: dict, what: str, remedy: str) -> None:
    """Refuse states that are not of this model, naming everything that differs."""
    differ = [
        f"{name} (theirs {_short(theirs.get(name))}, ours {_short(ours[name])})" for name in ours if ours[name] != theirs.get(name)
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
