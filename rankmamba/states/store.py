"""Writing a store of document states (`states.reader` describes its files), by a writer that may be killed at any moment."""

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np

from .. import __version__
from ..data import lookup
from ..errors import InputError
from ..files import check_room, refusals, replacing, sha256, write_text
from .encoding import Profile, ids_bytes, record_bytes
from .reader import (
    IDS,
    LOOKUP,
    MANIFEST,
    PROFILE,
    PROGRESS,
    ROWS,
    STATES,
    TABLE,
    Names,
    Reader,
    compare_headers,
    read_manifest,
    read_profile,
    sealed,
    unsealed,
)

LOCK = "build.lock"
FILES = (STATES, ROWS, IDS, LOOKUP, PROFILE, MANIFEST, PROGRESS, LOCK)


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Own `folder` for building; a second builder, or a disk that refuses to write, is an `InputError`."""
    try:
        with refusals(f"document states to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / LOCK, timeout=0):
                yield
    except filelock.Timeout as error:
        raise InputError(
            f"expected one builder in {folder}, got a second; wait for the other, or choose another folder"
        ) from error


def check_folder(folder: Path) -> None:
    """Check that states may be written to `folder`: it is absent, or holds only states, finished or not.

    Raises:
        InputError: it is a file, or holds something else.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(name for name in names if name not in FILES and not name.startswith(".") or (folder / name).is_symlink())
    if folder.is_file() or others:
        found = f"{others[0]} in it" if others else "a file"
        raise InputError(f"expected a new folder, or one of states, got {folder} ({found}); choose another folder")


class Writer:
    """Appends blocks of documents; what was committed survives a kill, the rest is cut off at the next start.

    header: identifies the model and the format; a folder begun with another header is refused. Documents that follow those of a
    finished store are added; until that is finished the store cannot be opened, but readers that have it open read on.
    """

    def __init__(self, folder: Path, header: dict):
        self.folder, self.header = folder, header
        self.done = {"documents": 0, "tokens": 0, "digest": "", **{name: 0 for name in (STATES, ROWS, IDS)}}
        self.digest = hashlib.sha256()
        self._finished: Names | None = None  # the documents of a finished store that others are added to
        self.whole = (folder / MANIFEST).is_file()
        if self.whole or (folder / PROGRESS).is_file():
            before = read_manifest(folder) if self.whole else unsealed(folder / PROGRESS)
            compare_headers(header, before["header"], f"the states in {folder}", "choose another folder, or delete this one")
            self.done = before["done"]
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
        """Take in the next document in order; returns whether its state is stored already.

        Raises:
            InputError: the stored documents are others or their files were altered, an added one is among them, or an id or a text is
                not a string.
        """
        for item in (doc_id, text):
            if not isinstance(item, str):
                raise InputError(f"expected a string as id and as text of each document, got {item!r:.80} (document {place + 1})")
            try:
                encoded = item.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"expected text that is UTF-8, got {item!r:.80} (document {place + 1})") from error
            self.digest.update(b"%d:" % len(encoded) + encoded)
        stored = self.done["documents"]
        if place + 1 == stored and self.digest.hexdigest() != self.done["digest"]:
            raise InputError(
                f"expected the {stored:,} documents that {self.folder} holds the states of, got others; "
                "choose another folder, or delete this one"
            )
        if self.whole and place == stored:
            self._finished = Reader(self.folder).names  # checked: the new manifest vouches for all of it
        if place >= stored and self._finished is not None and self._finished.find(doc_id) is not None:
            raise InputError(f"expected each doc_id once, got {doc_id!r} again as document {place + 1}; remove one")
        return place < stored

    def add(self, doc_ids: Sequence[str], tokens: Sequence[int], numbers: Sequence[int], records: Iterator, digest: str) -> None:
        """Store a block: `records` yields (place in the block, record) in any order; `digest` is that of all documents so far."""
        if self.whole:
            self._commit()
            (self.folder / MANIFEST).unlink()
            self.whole = False
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
        self._commit()

    def _commit(self) -> None:
        write_text(self.folder / PROGRESS, sealed({"header": self.header, "done": self.done}))

    def need(self, size: int) -> None:
        """Refuse to begin a build that the disk has no room for; size: bytes of all records, 0 if unknown."""
        check_room(self.folder, size - self.done[STATES], "for the states", "free some space, or choose a smaller dtype")

    def profile(self, shapes: Sequence[Sequence[int]]) -> Profile | None:
        """Return the profile if a block was committed, else None: the first batch of documents decides it."""
        return read_profile(self.folder, shapes) if self.done["documents"] else None

    def write_profile(self, profile: Profile) -> Profile:
        """Write the profile, float32, and return it."""
        (self.folder / PROFILE).write_bytes(
            b"".join(tensor.contiguous().numpy().tobytes() for pair in profile for tensor in pair)
        )
        return profile

    def finish(self, digest: str) -> None:
        """Make the store whole; digest: of all documents given.

        Raises:
            InputError: the documents are fewer than those already stored, there are none, or one occurs twice.
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
        table = lookup.make([lookup.hash_id(names[row]) for row in range(len(names))], names.__getitem__)
        with replacing(self.folder / LOOKUP) as temporary:  # an open store still reads the old one
            temporary.write_bytes(table.tobytes())
        files = [path for name in (ROWS, IDS, LOOKUP, PROFILE) if (path := self.folder / name).is_file()]
        manifest = {"header": self.header, "done": self.done, "sha256": {path.name: sha256(path) for path in files}}
        manifest |= {"version": __version__}
        write_text(self.folder / MANIFEST, sealed(manifest))
        (self.folder / PROGRESS).unlink(missing_ok=True)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
