"""Our own collections, registered in ir_datasets as rankmamba/...: importing this registers them, using one makes it.

rankmamba/tiny   40 documents and 24 queries written for this project (data/tiny); /train, /dev and /test are parts of it
rankmamba/nq     13,741 Wikipedia passages and 17,506 search queries of Natural Questions, in /train, /dev and /test
rankmamba/wiki   introductions of Wikipedia articles with queries made from them, for pre-training; /train, /dev and /test
rankmamba/squad  9,750 paragraphs of four domains with 47,389 crowd questions, in /test; ids begin with the domain
rankmamba/squad-long/600, rankmamba/squad-long/1500   the same joined into documents of up to that many words, in /test

A set is made once, under `IR_DATASETS_HOME`/rankmamba (default ~/.ir_datasets/rankmamba), in a folder that appears only when it
is complete; delete the folder to have it made again. The candidates (scoreddocs) are BM25's first 100 with k1 = 0.9, b = 0.4.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ir_datasets
import pandas as pd
from ir_datasets.formats import (
    BaseDocs,
    BaseQrels,
    BaseQueries,
    BaseScoredDocs,
    GenericDoc,
    GenericQrel,
    GenericQuery,
    GenericScoredDoc,
)
from ir_datasets.indices import Docstore

from ...candidates import BM25, K1, B
from ...errors import InputError
from ...files import alone, replacing, sha256, slug, write_text
from ..formats import (
    QRELS_COLUMNS,
    Documents,
    JsonlDocuments,
    read_qrels,
    read_queries,
    write_documents,
    write_qrels,
    write_queries,
)
from ..runs import read_run, write_run
from ..sources import fetch, say
from . import nq, squad, wiki
from .nq import SPLITS

TINY = Path(__file__).resolve().parents[3] / "data" / "tiny"


def home() -> Path:
    """The folder that our sets are kept in."""
    return ir_datasets.util.home_path() / "rankmamba"


def prepared(name: str) -> Path:
    """Return the folder of a set ("tiny", "nq", ...), made first if need be; any other process that wants it waits.

    Raises:
        InputError: the source is missing or cannot be fetched, or the disk is too small.
    """
    make, _, version = _SETS[name]
    folder = home() / f"{slug(name)}-{version or _tiny_version()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.parent / f".{slug(name)}.lock", f"another process is preparing rankmamba/{name}; waiting for it"):
            if not folder.is_dir():
                started = time.perf_counter()
                with replacing(folder) as temporary:
                    temporary.mkdir()
                    make(temporary)
                say(f"rankmamba/{name} is ready in {folder} ({time.perf_counter() - started:.0f} s)")
    for left_over in folder.parent.glob(f".{folder.name}.*"):  # of processes that were killed: nobody is making the set now
        shutil.rmtree(left_over, ignore_errors=True)
    return folder


def _tiny_version() -> str:
    names = ("documents.jsonl", "queries.tsv", "qrels.txt")
    missing = [name for name in names if not (TINY / name).exists()]
    if missing:
        raise InputError(
            f"expected the tiny set in {TINY}, got no {missing[0]} there; install rankmamba from its repository: pip install -e ."
        )
    return hashlib.sha256("".join(sha256(TINY / name) for name in names).encode()).hexdigest()[:8]


def _make_tiny(folder: Path) -> None:
    """Copy the documents and assign queries to splits by the first word of their ids: train-1, dev-1, test-1."""
    documents, queries = JsonlDocuments(TINY / "documents.jsonl"), read_queries(TINY / "queries.tsv")
    qrels = read_qrels(TINY / "qrels.txt")
    parts = {split: {i: text for i, text in queries.items() if i.startswith(f"{split}-")} for split in SPLITS}
    _write(folder, documents, {"all": queries, **parts}, {part: qrels for part in ("all", *SPLITS)}, {"source": "data/tiny"})


def _make_splits(folder: Path, module: ModuleType, read: Callable[[Path], list]) -> None:
    """Make a set with train, dev and test from one member of an archive; module: `nq` or `wiki`."""
    result = module.prepare(read(fetch(module.SOURCE, home())))
    qrels = {split: pd.DataFrame(rows, columns=QRELS_COLUMNS) for split, rows in result.qrels.items()}
    source = {"source": f"{module.SOURCE.requirement}: {module.MEMBER}", "source_sha256": module.SOURCE.sha256}
    _write(folder, Documents(result.documents), result.queries, qrels, source)


def _make_squad(folder: Path, words: int | None) -> None:
    result = squad.prepare(squad.read_paragraphs(fetch(nq.SOURCE, home())), words)
    qrels = pd.DataFrame(result.qrels, columns=QRELS_COLUMNS)
    source = {"source": f"{nq.SOURCE.requirement}: {squad.FOLDER}", "source_sha256": nq.SOURCE.sha256}
    _write(folder, Documents(result.documents), {"test": result.queries}, {"test": qrels}, source)
    starts = "".join(f"{query_id}\t{start}\n" for query_id, start in result.starts.items())
    write_text(folder / "test" / "starts.tsv", starts)


def answer_starts(name: str) -> dict[str, int]:
    """{query_id: number of words before the answering paragraph in its document} of "squad", "squad-long/600" or "squad-long/1500"."""
    lines = (prepared(name) / "test" / "starts.tsv").read_text(encoding="utf-8").splitlines()
    return {query_id: int(start) for query_id, start in (line.split("\t") for line in lines)}


def _write(
    folder: Path, documents: Documents, queries: dict[str, dict[str, str]], qrels: dict[str, pd.DataFrame], source: dict
) -> None:
    """Write a set: documents.jsonl, and for each part its queries, qrels and candidates."""
    write_documents(folder / "documents.jsonl", documents.pairs())
    index = BM25.build(documents, K1, B)
    counts = {}
    for part, texts in queries.items():
        judged = qrels[part][qrels[part]["query_id"].isin(list(texts))]
        write_queries(folder / part / "queries.tsv", texts)
        write_qrels(folder / part / "qrels.txt", judged)
        run = index.search(texts, show_progress=len(documents) > 1000)
        write_run(folder / part / "candidates.run", run, f"bm25-k{K1}-b{B}")
        counts[part] = {"queries": len(texts), "judgements": len(judged)}
    manifest = {**source, "documents": len(documents), "parts": counts, "candidates": {"system": "bm25s", "k1": K1, "b": B}}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


_GRADES = {
    "tiny": {0: "not relevant", 1: "on the topic", 2: "answers in part", 3: "answers"},
    "nq": {1: "the passage of the query, or a revision of it that holds the answer too"},
    "wiki": {1: "the article that the query's words are from"},
    **dict.fromkeys(("squad", "squad-long/600", "squad-long/1500"), {1: "holds the paragraph that the question was written for"}),
}


class _Set(NamedTuple):
    """How a set is made. version: a new one gets a new folder (None: by its source). "all" among the parts is the set's own id."""

    make: Callable[[Path], None]
    parts: tuple[str, ...] = SPLITS
    version: str | None = "1"


_SETS = {
    "tiny": _Set(_make_tiny, ("all", *SPLITS), version=None),
    "nq": _Set(partial(_make_splits, module=nq, read=nq.read_examples)),
    "wiki": _Set(partial(_make_splits, module=wiki, read=wiki.read_articles)),
    "squad": _Set(partial(_make_squad, words=None), ("test",)),
    "squad-long/600": _Set(partial(_make_squad, words=600), ("test",)),
    "squad-long/1500": _Set(partial(_make_squad, words=1500), ("test",)),
}


_open = lru_cache(maxsize=4)(JsonlDocuments)


class _DocsIter:
    """Documents in order; can be sliced like ir_datasets' own iterators: docs_iter()[10:20]."""

    def __init__(self, documents: JsonlDocuments, ids: list[str]):
        self._documents, self._ids, self._next = documents, ids, 0

    def __iter__(self) -> Iterator[GenericDoc]:
        return self

    def __next__(self) -> GenericDoc:
        if self._next >= len(self._ids):
            raise StopIteration
        self._next += 1
        return self[self._next - 1]

    def __getitem__(self, key):
        if isinstance(key, slice):
            return _DocsIter(self._documents, self._ids[key])
        return GenericDoc(self._ids[key], self._documents[self._ids[key]])


class _Docstore(Docstore):
    def __init__(self, documents: JsonlDocuments):
        super().__init__(GenericDoc)
        self._documents = documents

    def get_many_iter(self, doc_ids):
        return (GenericDoc(doc_id, text) for doc_id, text in self._documents.get_many(doc_ids).items())


class _Docs(BaseDocs):
    def __init__(self, name: str):
        self._name = name

    def _documents(self) -> JsonlDocuments:
        return _open(self.docs_path())

    def docs_path(self, force: bool = True) -> Path:
        return prepared(self._name) / "documents.jsonl"

    def docs_iter(self) -> _DocsIter:
        return _DocsIter(self._documents(), list(self._documents()))

    def docs_store(self, field: str = "doc_id") -> _Docstore:
        return _Docstore(self._documents())

    def docs_count(self) -> int:
        return len(self._documents())

    def docs_namespace(self) -> str:
        return f"rankmamba/{self._name}"

    def docs_lang(self) -> str:
        return "en"


class _Part:
    """One part of a set: a folder with queries.tsv, qrels.txt and candidates.run."""

    def __init__(self, name: str, part: str):
        self._name, self._part = name, part

    def _file(self, file: str) -> Path:
        return prepared(self._name) / self._part / file


class _Queries(_Part, BaseQueries):
    def queries_iter(self) -> Iterator[GenericQuery]:
        return (GenericQuery(*row) for row in read_queries(self._file("queries.tsv")).items())

    def queries_lang(self) -> str:
        return "en"


class _Qrels(_Part, BaseQrels):
    def qrels_iter(self) -> Iterator[GenericQrel]:
        return (GenericQrel(*row) for row in read_qrels(self._file("qrels.txt")).itertuples(index=False))

    def qrels_defs(self) -> dict[int, str]:
        return _GRADES[self._name]


class _ScoredDocs(_Part, BaseScoredDocs):
    def scoreddocs_run(self) -> pd.DataFrame:
        """The candidates as a run, ranks included."""
        return read_run(self._file("candidates.run"))

    def scoreddocs_iter(self) -> Iterator[GenericScoredDoc]:
        run = self.scoreddocs_run()[["query_id", "doc_id", "score"]]
        return (GenericScoredDoc(*row) for row in run.itertuples(index=False))


def _register() -> None:
    for name, made in _SETS.items():
        docs = _Docs(name)
        for part in made.parts:
            dataset_id = f"rankmamba/{name}" if part == "all" else f"rankmamba/{name}/{part}"
            _register_once(dataset_id, docs, _Queries(name, part), _Qrels(name, part), _ScoredDocs(name, part))
        _register_once(f"rankmamba/{name}", docs)  # documents alone, where there is no part "all"


def _register_once(dataset_id: str, *constituents) -> None:
    if dataset_id not in ir_datasets.registry:
        ir_datasets.registry.register(dataset_id, ir_datasets.Dataset(*constituents))


_register()
