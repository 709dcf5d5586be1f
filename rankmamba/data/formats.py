"""The files of a collection: documents (JSONL), queries (TSV), judgements (TREC qrels), read strictly and written plainly.

Qrels are a DataFrame query_id (str), doc_id (str) and relevance (int). Anything that is not as described is an `InputError` with file
and line. Runs have a module of their own (`runs`).
"""

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..files import replacing
from .lines import checked_id, numbers, read_lines, refuse_duplicates

QRELS_COLUMNS = ["query_id", "doc_id", "relevance"]


class Documents(Mapping[str, str]):
    """Texts by doc_id, in a fixed order: `len`, iteration over ids, `documents[doc_id]`, `in`, `get_many`, `pairs`.

    This one holds its texts in memory; subclasses leave them on disk. An empty text is legal.
    """

    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __getitem__(self, doc_id: str) -> str:
        return self._texts[doc_id]

    def get_many(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the texts of several documents; ids that do not exist are absent from the result."""
        return {doc_id: self[doc_id] for doc_id in doc_ids if doc_id in self}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield (doc_id, text) in order, one document in memory at a time."""
        return ((doc_id, self[doc_id]) for doc_id in self)


class JsonlDocuments(Documents):
    """The documents of a JSONL file, left on disk: a line is {"doc_id": ..., "text": ...} and may have a "title".

    The whole file is checked once, here; after that a document costs one read. The text is the title, a space and the text.

    Raises:
        InputError: a line is not such an object or not UTF-8, a doc_id occurs twice, or the file has no document.
    """

    def __init__(self, path: str | Path):
        self._path, self._rows, ends = Path(path), {}, []
        begins: list[int] = []
        for number, begin, line in read_lines(self._path):
            doc_id = _document(line, f"{path}:{number}")[0]
            if doc_id in self._rows:
                raise InputError(f"expected each doc_id once, got {doc_id!r} again ({path}:{number}); remove one of the two")
            self._rows[doc_id] = len(begins)
            begins.append(begin)
            ends.append(begin + len(line.encode()))
        if not begins:
            raise InputError(f"expected at least one document, got an empty file ({path})")
        self._spans = np.array([begins, ends], dtype=np.int64)
        with open(path, "rb") as handle:
            self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def __reduce__(self):
        return JsonlDocuments, (self._path,)  # pickled by path: another process maps the file itself

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self._rows

    def __getitem__(self, doc_id: str) -> str:
        begin, end = self._spans[:, self._rows[doc_id]]
        return _document(self._bytes[begin:end].decode(), str(self._path))[1]


def write_documents(path: str | Path, documents: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """Write {doc_id: text}, or such pairs, as JSONL.

    Raises:
        InputError: there are none, one is not such a pair of strings, or a doc_id occurs twice; nothing is written then.
    """
    written: set[str] = set()
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as handle:
        for pair in documents.items() if isinstance(documents, Mapping) else documents:
            if isinstance(pair, str) or len(pair) != 2:
                raise InputError(f"expected pairs (doc_id, text), got {pair!r:.80} ({path}); pass a mapping or its items")
            doc_id, text = _checked(pair[0], pair[1], path)
            if doc_id in written:
                raise InputError(f"expected each doc_id once, got {doc_id!r} again ({path}); remove one of the two")
            written.add(doc_id)
            handle.write(json.dumps({"doc_id": doc_id, "text": text}, ensure_ascii=False) + "\n")
        if not written:
            raise InputError(f"expected at least one document, got none ({path})")


def read_queries(path: str | Path) -> dict[str, str]:
    """Read queries from TSV (query_id, tab, text) as {query_id: text}; empty lines are skipped.

    Raises:
        InputError: a line does not have two columns, an id occurs twice, a text is empty, or there is no query.
    """
    queries = {}
    for number, _, line in read_lines(Path(path)):
        where = f"{path}:{number}"
        columns = line.split("\t")
        if len(columns) != 2:
            raise InputError(
                f"expected query_id, one tab and the query text, got {len(columns)} columns ({where}): {line[:80]!r}"
            )
        query_id, text = checked_id(columns[0], "query_id", where), columns[1].strip()
        if not text:
            raise InputError(
                f"expected a query text, got an empty one for query {query_id!r} ({where}); write one or remove the line"
            )
        if query_id in queries:
            raise InputError(f"expected each query_id once, got {query_id!r} again ({where}); remove one of the two")
        queries[query_id] = text
    if not queries:
        raise InputError(f"expected at least one query, got an empty file ({path})")
    return queries


def write_queries(path: str | Path, queries: Mapping[str, str]) -> None:
    """Write queries as TSV.

    Raises:
        InputError: there are none, or an id or a text could not be read back; nothing is written then.
    """
    if not queries:
        raise InputError(f"expected at least one query, got none ({path})")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as handle:
        for query_id, text in queries.items():
            if not isinstance(text, str) or not text.strip() or any(character in text for character in "\t\n\r"):
                raise InputError(f"expected a query text without tabs and line breaks, got {text!r:.80} for query {query_id!r}")
            handle.write(f"{checked_id(query_id, 'query_id', path)}\t{_encodable(text, f'query {query_id!r}', path)}\n")


def read_qrels(path: str | Path) -> pd.DataFrame:
    """Read TREC qrels (query_id, iteration, doc_id, relevance) as a DataFrame query_id, doc_id, relevance, in file order.

    Raises:
        InputError: a line does not have four columns, a relevance is not a whole number, a pair is judged twice, or there is no line.
    """
    rows = []
    for number, _, line in read_lines(Path(path)):
        columns = line.split()
        if len(columns) != 4:
            raise InputError(
                f"expected 4 columns (query_id, iteration, doc_id, relevance), got {len(columns)} "
                f"({path}:{number}): {line[:80]!r}"
            )
        rows.append((columns[0], columns[2], columns[3]))
    if not rows:
        raise InputError(f"expected at least one judgement, got an empty file ({path})")
    query_ids, doc_ids, texts = (list(column) for column in zip(*rows, strict=True))
    relevance = numbers(texts, int, "a whole number as relevance", path)
    qrels = pd.DataFrame({"query_id": query_ids, "doc_id": doc_ids, "relevance": relevance})
    refuse_duplicates(qrels, "qrels", path)
    return qrels


def write_qrels(path: str | Path, qrels: pd.DataFrame) -> None:
    """Write qrels in the TREC format.

    Raises:
        InputError: there are none, a relevance is not a whole number, an id contains white space, or a pair is judged twice; nothing is
            written then.
    """
    if qrels.empty:
        raise InputError(f"expected at least one judgement, got none ({path})")
    for relevance in qrels["relevance"]:
        if not isinstance(relevance, Real) or not relevance % 1 == 0 or abs(relevance) >= 2**63:
            raise InputError(f"expected a whole number as relevance, got {relevance!r} ({path}); convert the column")
    refuse_duplicates(qrels, "qrels")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as handle:
        for query_id, doc_id, relevance in zip(qrels["query_id"], qrels["doc_id"], qrels["relevance"], strict=True):
            handle.write(f"{checked_id(query_id, 'query_id', path)} 0 {checked_id(doc_id, 'doc_id', path)} {int(relevance)}\n")


def _document(line: str, where: str) -> tuple[str, str]:
    """Read one line of a JSONL file of documents: (doc_id, text)."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected one JSON object in the line, got {line[:80]!r} ({where}): {error}") from None
    fields = sorted(document) if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or "doc_id" not in document or "text" not in document:
        raise InputError(f'expected an object with "doc_id" and "text", got {fields} ({where})')
    return _checked(document["doc_id"], document["text"], where, document.get("title") or "")


def _checked(doc_id: str, text: str, where: str | Path, title: str = "") -> tuple[str, str]:
    """Check the fields of a document, read or to be written: (doc_id, text with its title)."""
    for field, value in (("doc_id", doc_id), ("title", title), ("text", text)):
        if not isinstance(value, str):
            remedy = 'write "" for none' if value is None else "put it in quotes"
            raise InputError(f"expected a string as {field}, got {value!r:.80} ({where}); {remedy}")
    text = f"{title} {text}" if title else text
    return checked_id(doc_id, "doc_id", where), _encodable(text, f"document {doc_id!r}", where)


def _encodable(text: str, of: str, where: str | Path) -> str:
    """Check that a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"expected text that UTF-8 can hold, got half a surrogate pair in {of} ({where})") from None
    return text
