"""Collections: documents, queries, judgements and first-stage candidates, loaded by one name."""

import difflib
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

import pandas as pd

from .data.formats import QRELS_COLUMNS, Documents, JsonlDocuments, read_qrels, read_queries
from .data.lines import read_lines, refuse_duplicates
from .data.runs import RUN_COLUMNS, read_run, sort_run
from .errors import InputError
from .files import sha256

# ids of ours that join several of ir_datasets': the two years that the papers test on, 43 and 45 queries with graded judgements
UNIONS = {"msmarco-document/test": ("msmarco-document/trec-dl-2019/judged", "msmarco-document/trec-dl-2020/judged")}

FILES = ("documents.jsonl", "queries.tsv", "qrels.txt", "candidates.run")  # of a folder of one's own; the last may be missing


class IrDocuments(Documents):
    """The documents of an ir_datasets dataset, looked up in its document store (built by ir_datasets on first use)."""

    def __init__(self, dataset, name: str):
        import ir_datasets

        self._dataset, self._name = dataset, name
        self.namespace = ir_datasets.docs_parent_id(name)  # the same for all ids that share documents

    @cached_property
    def _store(self):
        with _fetching(self._name, "docs"):
            return self._dataset.docs_store()

    @cached_property
    def published(self) -> int | None:
        """How many documents there are by ir_datasets' own list; None if they are not in it."""
        listed = getattr(self._dataset, "metadata", dict)()
        return listed.get("docs", {}).get("count")

    def __len__(self) -> int:
        if self.published is not None:
            return self.published
        with _fetching(self._name, "docs"):
            count = self._dataset.docs_count()
        return sum(1 for _ in self) if count is None else count

    def __iter__(self) -> Iterator[str]:
        with _fetching(self._name, "docs"):
            for document in self._dataset.docs_iter():
                yield document.doc_id

    def __contains__(self, doc_id: object) -> bool:
        return bool(self.get_many([doc_id]))

    def __getitem__(self, doc_id: str) -> str:
        return self.get_many([doc_id])[doc_id]

    def get_many(self, doc_ids: Iterable[str]) -> dict[str, str]:
        doc_ids = list(doc_ids)
        with _fetching(self._name, "docs"):
            found = self._store.get_many(doc_ids)
        return {doc_id: found[doc_id].default_text() for doc_id in doc_ids if doc_id in found}

    def pairs(self) -> Iterator[tuple[str, str]]:
        count = 0
        with _fetching(self._name, "docs"):
            for document in self._dataset.docs_iter():
                yield document.doc_id, document.default_text()
                count += 1
        if count < (self.published or 0):
            raise InputError(
                f"expected the {self.published:,} documents of {self._name}, got {count:,}: their file is cut off, or another one; "
                f"delete it, then {_download_remedy(self._name, 'docs')}"
            )


class Collection:
    """What one experiment ranks: documents, queries {query_id: text}, qrels and the first-stage run `candidates` (or None).

    A query without candidates is legal: it stays in `queries` and counts 0 when measured. `candidates` may be given as a
    function, called on first use, because the run of a large training set takes a while to read.
    """

    def __init__(
        self,
        name: str,
        documents: Mapping[str, str],
        queries: dict[str, str],
        qrels: pd.DataFrame,
        candidates: pd.DataFrame | Callable[[], pd.DataFrame] | None = None,
    ):
        self.name, self.queries, self.qrels = name, queries, qrels
        self.documents = documents if isinstance(documents, Documents) else Documents(documents)
        self._candidates = candidates

    @property
    def candidates(self) -> pd.DataFrame | None:
        """The first-stage run that comes with the collection, or None."""
        if callable(self._candidates):
            self._candidates = self._candidates()
        return self._candidates

    def __repr__(self) -> str:
        return f"Collection({self.name!r}: {len(self.queries):,} queries, {len(self.qrels):,} judgements)"

    def counts(self) -> dict[str, float]:
        """Count documents, queries, judgements, relevant judgements, and candidates per query."""
        candidates = 0 if self.candidates is None else len(self.candidates)
        return {
            "documents": len(self.documents),
            "queries": len(self.queries),
            "judgements": len(self.qrels),
            "relevant": int((self.qrels["relevance"] > 0).sum()),
            "candidates per query": candidates / len(self.queries),
        }

    def examples(self, count: int, seed: int = 0) -> pd.DataFrame:
        """Draw `count` judged relevant pairs: columns query and document (texts)."""
        relevant = self.qrels[self.qrels["relevance"] > 0]
        drawn = relevant.sample(min(count, len(relevant)), random_state=seed)
        texts = self.documents.get_many(drawn["doc_id"])
        if len(drawn) and not texts:
            raise InputError(f"expected documents that are judged relevant, got none of them in {self.name}: other documents are there")
        return pd.DataFrame({"query": drawn["query_id"].map(self.queries), "document": drawn["doc_id"].map(texts)}).dropna(
            ignore_index=True
        )

    def judged(self) -> list[str]:
        """The ids of the queries that have judgements, sorted; of all queries where none has."""
        return sorted(set(self.queries) & set(self.qrels["query_id"]) or self.queries)

    def sample(self, count: int | None, seed: int = 0) -> "Collection":
        """Draw `count` of the queries that have judgements (all queries if None), the same for the same seed, with these and candidates.

        Raises:
            InputError: `count` is below one.
        """
        if count is not None and count < 1:
            raise InputError(f"expected at least one query, got {count}; a number beyond the collection's takes all of them")
        judged = self.judged()
        if count is None or count >= len(judged):
            return self
        kept = set(random.Random(seed).sample(judged, count))

        def of_kept(table: pd.DataFrame) -> pd.DataFrame:
            return table[table["query_id"].isin(kept)].reset_index(drop=True)

        candidates = None if self._candidates is None else lambda: of_kept(self.candidates)
        queries = {query_id: text for query_id, text in self.queries.items() if query_id in kept}
        return Collection(self.name, self.documents, queries, of_kept(self.qrels), candidates)


def import_ir_datasets():
    """Import ir_datasets, which makes the folder that it keeps its files in, and return it.

    Raises:
        InputError: that folder cannot be made.
    """
    try:
        import ir_datasets
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"expected a folder for collections that may be written, got: {error}; name one: export IR_DATASETS_HOME=FOLDER"
        ) from error
    return ir_datasets


def load(name_or_folder: str | Path) -> Collection:
    """Load a collection: an ir_datasets id (ours: see `embedded`), msmarco-document/test (both TREC years with judgements) or a
    folder of your own.

    A folder holds documents.jsonl, queries.tsv (query_id, tab, text), qrels.txt (TREC) and, optionally, candidates.run (TREC).
    Where an id and a folder have the same name, the id wins; write ./name for the folder.

    Raises:
        InputError: there is no such id or folder, the id lacks queries or judgements, a file cannot be fetched or is malformed, or
            there is no folder to keep files in.
    """
    ir_datasets = import_ir_datasets()
    name = str(name_or_folder)
    if name in UNIONS:
        return _union(name, [load(part) for part in UNIONS[name]])
    if not isinstance(name_or_folder, Path) and is_id(name):
        return _from_ir_datasets(name, ir_datasets.load(name))
    if Path(name).is_dir():
        return _from_folder(Path(name))
    close = difflib.get_close_matches(name, list(ir_datasets.registry), n=3)
    raise InputError(
        f"expected an ir_datasets id or a folder with documents.jsonl, got {name!r}; "
        + (f"did you mean {' or '.join(close)}?" if close else "check the spelling and the current folder")
    )


def is_id(name: str) -> bool:
    """Whether `name` is a dataset of ir_datasets, ours and `UNIONS` included."""
    import ir_datasets

    from .data import embedded  # noqa: F401  registers rankmamba/... in ir_datasets; here, because the two take long to import

    try:
        return name in UNIONS or ir_datasets.load(name) is not None
    except KeyError:
        return False


def digest_of(names: Iterable[str]) -> dict[str, str]:
    """The digest of the files of the user's own folders, for a record's config: an edit changes it. Nothing for ids of ir_datasets."""
    folders = [Path(name) for name in names if Path(name).is_dir() and not is_id(name)]
    files = sorted(folder / name for folder in folders for name in FILES if (folder / name).is_file())
    return {"files": hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()} if files else {}


def _union(name: str, parts: Sequence[Collection]) -> Collection:
    """Join collections of the same documents that share no query."""

    def candidates() -> pd.DataFrame:
        return sort_run(pd.concat([part.candidates for part in parts], ignore_index=True))

    queries = {query_id: text for part in parts for query_id, text in part.queries.items()}
    return Collection(name, parts[0].documents, queries, pd.concat([part.qrels for part in parts], ignore_index=True), candidates)


def _from_folder(folder: Path) -> Collection:
    documents, queries, qrels, candidates = (folder / name for name in FILES)
    collection = Collection(str(folder), JsonlDocuments(documents), read_queries(queries), read_qrels(qrels))
    check_run(collection.qrels, collection, qrels)
    if candidates.exists():
        collection._candidates = read_run(candidates)
        check_run(collection.candidates, collection, candidates)
    return collection


def _from_ir_datasets(name: str, dataset) -> Collection:
    import ir_datasets

    missing = [kind for kind in ("docs", "queries", "qrels") if not dataset.has(kind)]
    if missing:
        below = [other for other in ir_datasets.registry if other.startswith(f"{name}/")]
        remedy = f"try one of {', '.join(sorted(below)[:6])}" if below else "choose another id"
        raise InputError(f"expected an id with documents, queries and judgements, got {name!r} without {missing}; {remedy}")
    with _fetching(name, "queries"):
        queries = {query.query_id: query.default_text() for query in dataset.queries_iter()}
    for query_id, text in queries.items():
        if not text.strip():
            raise InputError(f"expected a text for each query, got none for query {query_id!r} of {name}")
    with _fetching(name, "qrels"):
        qrels = pd.DataFrame(
            [(row.query_id, row.doc_id, row.relevance) for row in dataset.qrels_iter()], columns=QRELS_COLUMNS
        ).drop_duplicates(ignore_index=True)
    refuse_duplicates(qrels, f"the qrels of {name}")

    def candidates() -> pd.DataFrame:
        if hasattr(dataset, "scoreddocs_run"):  # ours are TREC files already
            return dataset.scoreddocs_run()
        with _fetching(name, "scoreddocs"):
            columns, one = ([], [], []), {}  # one string object per id, however many of 37 million rows name it
            for row in dataset.scoreddocs_iter():
                for column, value in zip(columns, (row.query_id, row.doc_id, row.score), strict=True):
                    column.append(one.setdefault(value, value) if isinstance(value, str) else value)
        run = pd.DataFrame(dict(zip(RUN_COLUMNS[:3], columns, strict=True)))
        if len(run) > 1 and run["score"].nunique() == 1:  # msmarco-passage's top 1,000: a set in no order
            raise InputError(
                f"expected candidates with scores, got {run['score'].iloc[0]} for all {len(run):,} of {name}; "
                "rank its documents yourself (rankmamba.candidates), write the run with write_run and put it in a folder of your own"
            )
        return sort_run(run)

    return Collection(name, IrDocuments(dataset, name), queries, qrels, candidates if dataset.has("scoreddocs") else None)


@contextmanager
def _fetching(name: str, kind: str) -> Iterator[None]:
    """Turn ir_datasets' bare download errors into one InputError that says which file, how big, and where to put it by hand."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"expected ir_datasets to provide the {kind} of {name}, got {type(error).__name__}: {str(error)[:200]}; "
            f"{_download_remedy(name, kind)} (or use rankmamba/tiny, which needs no network)"
        ) from error


def _download_remedy(name: str, kind: str) -> str:
    """Say which file ir_datasets wanted, and where to put it by hand."""
    import ir_datasets

    _, file = download_of(name, kind)
    if "expected_md5" not in file:
        return "check the network and the disk, and try again"
    # a file at its own place is taken as it is; one below `downloads`, large ones only, is found by its checksum
    home = ir_datasets.util.home_path()
    place = home / name.split("/")[0] / file["cache_path"] if "cache_path" in file else home / "downloads" / file["expected_md5"]
    size = f"{file['size_hint'] / 1e6:,.1f} MB" if "size_hint" in file else "unknown size"
    return f"check the network and try again, or put {file.get('url', 'the file')} ({size}) at {place}"


def download_of(name: str, kind: str) -> tuple[str, dict]:
    """Look up the file behind the "docs", "queries", "qrels" or "scoreddocs" of an id in ir_datasets' own list of downloads.

    Returns its key in that list ("msmarco-document/dev/queries") and its entry, both empty if there is none. An id without files of
    its own (".../judged") has those of the id above it.
    """
    base, *subsets = name.split("/")
    of_base = _downloads().get(base, {})
    keys = ("/".join([*subsets[:depth], kind]) for depth in range(len(subsets), -1, -1))
    return next(((f"{base}/{key}", of_base[key]) for key in keys if key in of_base), ("", {}))


@cache
def _downloads() -> dict:
    import ir_datasets

    with ir_datasets.util.PackageDataFile("etc/downloads.json").stream() as stream:
        return json.load(stream)


def check_run(
    run: pd.DataFrame,
    collection: Collection,
    path: str | Path | None = None,
    columns: Sequence[str] = ("query_id", "doc_id"),
) -> None:
    """Check that a run (or qrels) names only queries and documents of the collection; `path` is the file it was read from.

    columns: which to check; checking doc_id reads the documents of a large collection from the disk.

    Raises:
        InputError: it names an unknown query or document; the message gives the first, with file and line where there is a file.
    """
    for column in columns:
        names = list(dict.fromkeys(run[column]))
        if column == "query_id":
            unknown = [name for name in names if name not in collection.queries]
        else:  # in pieces: a large run's texts would fill the memory
            unknown = []
            for start in range(0, len(names), 10_000):
                known = collection.documents.get_many(names[start : start + 10_000])
                unknown += [name for name in names[start : start + 10_000] if name not in known]
        if unknown:
            where = ""
            if path is not None:
                field = 0 if column == "query_id" else 2
                where = next(f" ({path}:{n})" for n, _, line in read_lines(Path(path)) if line.split()[field] == unknown[0])
            raise InputError(
                f"expected every {column} to be one of {collection.name}, got {unknown[0]!r}{where} and {len(unknown) - 1} more "
                "that are unknown; remove them, or load the collection that they belong to"
            )
