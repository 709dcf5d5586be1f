"""From a doc_id to its row in a store too large for a dictionary: the sorted 64-bit hashes of all ids, and the row of each.

A lookup is an array "<u8" (2, documents), which may be mapped. name(row) gives the doc_id of a row; it tells apart ids that share a
hash.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import InputError


def hash_id(doc_id: str) -> int:
    """Return the 64-bit hash that a doc_id is sorted by."""
    encoded = doc_id.encode("utf-8", "surrogatepass")  # no store has half a surrogate pair, but one may be asked for
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def make(hashes: Sequence[int], name: Callable[[int], str]) -> np.ndarray:
    """Return the lookup of documents by the `hash_id` of each, in the order of their rows.

    Raises:
        InputError: a doc_id comes twice.
    """
    hashes = np.array(hashes, dtype="<u8")
    rows = np.argsort(hashes, kind="stable").astype("<u8")
    hashes = hashes[rows]
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        first, second = map(int, rows[place : place + 2])
        if name(first) == name(second):
            raise InputError(f"expected each doc_id once, got {name(first)!r} again as document {second + 1}; remove one")
    return np.stack([hashes, rows])


def find(lookup: np.ndarray, doc_id: str, name: Callable[[int], str]) -> int | None:
    """Return the row of a document, or None."""
    hashes, rows = lookup
    wanted = np.uint64(hash_id(doc_id))
    place = int(np.searchsorted(hashes, wanted))
    while place < len(hashes) and hashes[place] == wanted:  # hardly ever more than one
        if name(int(rows[place])) == doc_id:
            return int(rows[place])
        place += 1
    return None
