"""The documents of a large collection, tokenised once into files that training and scoring map, so none of them sit in memory.

A store is a folder of shards, each of 65,536 documents and each whole or absent, so a build that was killed resumes after its last
shard. A shard holds tokens.npy (one document after another), ends.npy, ids.npy and the SHA-256 of the three; lookup.npy leads from
the hash of a doc_id to its row; manifest.json, written last, says that the store is whole.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from tqdm.std import tqdm

from ..errors import InputError
from ..files import alone, json_sha256, replacing, sha256, write_text
from ..inputs import PairTokenizer
from . import lookup
from .formats import Documents

LARGE = 500_000  # documents; smaller collections are tokenised for each run, in seconds
LONGEST = 4096  # tokens kept of a document: as many as the longest setting reads
SHARD, BATCH = 1 << 16, 1024  # documents
PARTS = ("tokens.npy", "ends.npy", "ids.npy")


def document_tokens(
    documents: Documents, doc_ids: Sequence[str], inputs: PairTokenizer, limit: int | None = None
) -> Mapping[str, np.ndarray]:
    """Return the token ids of some documents by doc_id, at most `limit` each (default: what a pair has room for).

    Those of a large ir_datasets collection come from its store, which is made on first use; others are tokenised now.

    Raises:
        InputError: a doc_id is unknown, or `limit` exceeds what a store holds.
    """
    limit = limit or inputs.document_limit
    store = stored(documents, inputs)
    if store is not None:
        return _Selection(store, doc_ids, limit)
    texts = documents.get_many(doc_ids)
    _refuse_unknown(doc_ids, texts)
    return dict(zip(doc_ids, inputs.documents([texts[doc_id] for doc_id in doc_ids], limit), strict=True))


def all_ids(documents: Documents, inputs: PairTokenizer) -> Sequence[str]:
    """Return the ids of all documents; those of a large collection stay on the disk."""
    store = stored(documents, inputs)
    return list(documents) if store is None else store.doc_ids


def stored(documents: Documents, inputs: PairTokenizer) -> "TokenStore | None":
    """Return the store of a large ir_datasets collection, made first if need be; None for any other documents."""
    namespace = getattr(documents, "namespace", None)
    if namespace is None or len(documents) < LARGE:
        return None
    return TokenStore.build(documents, inputs, place(namespace, inputs))


def _refuse_unknown(doc_ids: Sequence[str], known: Mapping) -> None:
    unknown = [doc_id for doc_id in doc_ids if doc_id not in known]
    if unknown:
        raise InputError(f"expected documents of the collection, got the unknown {unknown[0]!r} and {len(unknown) - 1} more")


def place(namespace: str, inputs: PairTokenizer) -> Path:
    """Return the folder of a collection's tokens, which depend on tokenizer and template."""
    import ir_datasets

    digest = json_sha256([inputs.vocabulary_digest, inputs.document_prefix, LONGEST])
    return ir_datasets.util.home_path() / "rankmamba" / "tokens" / f"{namespace.replace('/', '-')}-{digest[:12]}"


class TokenStore(Mapping[str, np.ndarray]):
    """The token ids of documents by doc_id, uint16 or uint32 arrays in the memory map. Make one with `build`.

    Raises:
        InputError: the store is unfinished, or one of its files is missing or altered; a shard is checked when it is first read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = _read_json(folder / "manifest.json", "build it again")
        try:
            self._count, expected = int(manifest["documents"]), manifest["lookup"]
            self._shards = [{part: shard[part] for part in PARTS} for shard in manifest["shards"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"expected a manifest of tokens, got another form ({folder / 'manifest.json'}); delete it"
            ) from error
        _check(folder / "lookup.npy", expected)
        self._lookup = np.load(folder / "lookup.npy", mmap_mode="r")
        if not self._count == self._lookup.shape[1] <= len(self._shards) * SHARD:
            raise InputError(
                f"expected {self._lookup.shape[1]} documents, got {self._count} ({folder / 'manifest.json'}); delete it"
            )
        self._open: dict[int, tuple[np.ndarray, ...]] = {}

    @classmethod
    def build(cls, documents: Documents, inputs: PairTokenizer, folder: Path) -> "TokenStore":
        """Open the store in `folder`, made or finished first if need be; any other process that wants it waits.

        Raises:
            InputError: the existing shards are of other documents, a doc_id occurs twice, or the disk is full.
        """
        if not (folder / "manifest.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder / ".lock", f"another process is tokenising {folder.name}; waiting for it"):
                if not (folder / "manifest.json").is_file():
                    _build(documents, inputs, folder)
        return _opened(folder)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (self.doc_ids[row] for row in range(len(self)))

    def __getitem__(self, doc_id: str) -> np.ndarray:
        row = self._row(doc_id)
        if row is None:
            raise KeyError(doc_id)
        tokens, ends, _ = self._shard(row // SHARD)
        row %= SHARD
        start = int(ends[row - 1]) if row else 0
        return tokens[start : int(ends[row])]

    def __contains__(self, doc_id: object) -> bool:
        return isinstance(doc_id, str) and self._row(doc_id) is not None

    @cached_property
    def doc_ids(self) -> Sequence[str]:
        """The ids in the collection's order, read from the map one by one."""
        return _Ids(self)

    def _row(self, doc_id: str) -> int | None:
        return lookup.find(self._lookup, doc_id, self.doc_ids.__getitem__)

    def _shard(self, shard: int) -> tuple[np.ndarray, ...]:
        if shard not in self._open:
            folder = self.folder / _name(shard)
            for part, expected in self._shards[shard].items():
                _check(folder / part, expected)
            self._open[shard] = tuple(np.load(folder / part, mmap_mode="r") for part in PARTS)
        return self._open[shard]

    def __reduce__(self):
        return TokenStore, (self.folder,)  # pickled by path: another process maps the files itself


@lru_cache(maxsize=4)
def _opened(folder: Path) -> TokenStore:
    return TokenStore(folder)


class _Selection(Mapping[str, np.ndarray]):
    """Some documents of a store, in a given order, of each the first `limit` tokens."""

    def __init__(self, store: TokenStore, doc_ids: Sequence[str], limit: int):
        if limit > LONGEST:
            raise InputError(f"expected at most {LONGEST} tokens of a document, got {limit}; choose a smaller max_length or fewer passages")
        _refuse_unknown(doc_ids, store)
        self._store, self._doc_ids, self._limit = store, doc_ids, limit

    def __len__(self) -> int:
        return len(self._doc_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._doc_ids)

    def __getitem__(self, doc_id: str) -> np.ndarray:
        return self._store[doc_id][: self._limit]


class _Ids(Sequence):
    def __init__(self, store: TokenStore):
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, row: int) -> str:
        return self._store._shard(row // SHARD)[2][row % SHARD].decode()


def _build(documents: Documents, inputs: PairTokenizer, folder: Path) -> None:
    dtype = np.uint16 if len(inputs.tokenizer) <= 1 << 16 else np.uint32
    shards, hashes = [], []
    with tqdm(total=len(documents), unit=" documents", desc=f"tokenising {folder.name}", mininterval=1) as bar:
        for shard, pairs in enumerate(_batches(documents.pairs(), SHARD)):
            target = folder / _name(shard)
            if target.is_dir():
                ids = _finished(target, pairs, bar)
            else:
                ids = _write_shard(target, pairs, inputs, dtype, bar)
            shards.append(_read_json(target / "sha256.json", "delete the folder"))
            hashes.append(np.array([lookup.hash_id(doc_id.decode()) for doc_id in ids.tolist()], dtype=np.uint64))
    hashes = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)

    def name(row: int) -> str:
        return np.load(folder / _name(row // SHARD) / "ids.npy", mmap_mode="r")[row % SHARD].decode()

    table = lookup.make(hashes, name)
    with replacing(folder / "lookup.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, table)
    manifest = {"documents": len(hashes), "shards": shards, "lookup": sha256(folder / "lookup.npy")}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _write_shard(target: Path, pairs: Iterable[tuple[str, str]], inputs: PairTokenizer, dtype, bar) -> np.ndarray:
    ids, ends, tokens, total = [], [], [], 0
    for batch in _batches(pairs, BATCH):
        names, texts = zip(*batch, strict=True)
        ids += [name.encode() for name in names]
        halves = inputs.documents(texts, LONGEST)
        ends += (total + np.cumsum([len(half) for half in halves])).tolist()
        total = ends[-1]
        tokens.append(np.concatenate(halves).astype(dtype))
        bar.update(len(names))
    arrays = np.concatenate(tokens), np.array(ends, dtype=np.int64), np.array(ids)
    with replacing(target) as temporary:
        temporary.mkdir()
        for part, array in zip(PARTS, arrays, strict=True):
            np.save(temporary / part, array)
        write_text(temporary / "sha256.json", json.dumps({part: sha256(temporary / part) for part in PARTS}))
    return arrays[2]


def _finished(target: Path, pairs: Iterable[tuple[str, str]], bar) -> np.ndarray:
    """Return the ids of a shard that an earlier build finished, which must be of these documents."""
    ids = np.load(target / "ids.npy")
    here = np.array([doc_id.encode() for doc_id, _ in pairs])
    if not np.array_equal(ids, here):
        raise InputError(f"expected the documents that {target} holds the tokens of, got others; delete {target.parent}")
    bar.update(len(ids))
    return ids


def _batches(items: Iterable, size: int) -> Iterator[Iterator]:
    """Yield iterators over `size` items each, one in memory at a time; each is to be used up before the next."""
    items = iter(items)
    for first in items:
        yield itertools.chain([first], itertools.islice(items, size - 1))


def _name(shard: int) -> str:
    return f"{int(shard):05d}"


def _read_json(path: Path, remedy: str):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"expected the file {path} as it was written, got {type(error).__name__}; {remedy}") from error


def _check(path: Path, expected: str) -> None:
    if not path.is_file() or sha256(path) != expected:
        state = "an altered file" if path.is_file() else "none"
        raise InputError(f"expected {path} as it was written, got {state}; delete its folder {path.parent} to have it made again")
