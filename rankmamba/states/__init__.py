"""Document states: a causal backbone's state after a document, stored, so that a query costs only its own tokens.

In the causal template the document comes first, so nothing before the query depends on the query. A Mamba keeps two tensors of
fixed size, whatever the length of the document; attention keeps keys and values of every token (the KV cache). Where the model
computes in float32, float32 states give the scores of full scoring; smaller formats round the states, never the computation.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.std import tqdm

from ..collection import Collection, check_run
from ..data.formats import Documents
from ..data.runs import head_of, sort_run
from ..errors import InputError
from ..files import replacing
from ..inputs import Pair
from ..model import pooled_positions
from ..reranker import Cost, Reranker, unique
from .build import BLOCK, SAMPLE, blocks, identity, store_block
from .encoding import FLOATS, Parts, check_format, decode, encode, record_bytes
from .kinds import kind_of
from .reader import Reader, compare_headers
from .store import Writer, building, check_folder


class DocumentStates:
    """The states of documents on disk, and scoring from them. Make one with `build` or `open`.

    >>> states = DocumentStates.build(reranker, collection, "states", dtype="float16")
    >>> states.rank("who wrote hamlet", ["d3", "d7"])
    [{'doc_id': 'd7', 'score': 1.9}, {'doc_id': 'd3', 'score': -0.4}]

    cost: pairs, query tokens and seconds of the last scoring. batch_size: documents scored together, at most; batch_bytes: bytes of
    their states, at most (three times that is in memory: one batch computes while the next is loaded).
    """

    def __init__(self, reranker: Reranker, reader: Reader, batch_size: int = 64, batch_bytes: int = 256 << 20):
        self.reranker, self.batch_size, self.batch_bytes = reranker, batch_size, batch_bytes
        self._reader, header = reader, reader.manifest["header"]
        self.dtype = header["dtype"]
        self._kind = kind_of(reranker, header["layers"])
        profile = reader.profile(self._kind.whole_shapes)
        self._profile = profile and self._kind.keep(profile)
        self._kind.rest = profile
        self._around = len(reranker.inputs.between) + len(reranker.inputs.after)  # tokens that the template adds to a query
        self.cost = Cost()

    @classmethod
    def build(
        cls,
        reranker: Reranker,
        documents: Collection | Mapping[str, str],
        folder: str | Path,
        dtype: str = "float32",
        layers: Sequence[int] | None = None,
        batch_tokens: int = 2048,
        show_progress_bar: bool = False,
        on_stored: Callable[[int], None] = lambda count: None,
    ) -> "DocumentStates":
        """Compute the state of every document and store it in `folder`; a build that was stopped resumes where it was.

        If `folder` holds the states of the first of these documents, in this order, only the others are computed and added; until that
        is done it cannot be opened. int8, int4 and some layers are relative to what the first 16 documents or so of the first build
        have in common, so begin with documents like those that follow.

        dtype: float32 (the scores of full scoring), bfloat16, float16, int8 or int4 (with scales). layers: keep only
        these layers' states (Mamba; not exact: the others start from the mean state of some documents). batch_tokens: document
        tokens computed together. on_stored(count): documents just done; an exception that it raises ends the build, which can be
        resumed.

        Raises:
            InputError: the backbone is not causal; the folder holds other states or something else, or is being built by another
                process; the disk is full; an id or a text is not a string.
        """
        check_format(dtype)
        documents = documents.documents if isinstance(documents, Collection) else documents
        if not isinstance(documents, Mapping):
            raise InputError(f"expected a collection or a mapping from ids to texts, got {type(documents).__name__}")
        documents = documents if isinstance(documents, Documents) else Documents(documents)
        kind = kind_of(reranker, layers)
        folder = Path(folder)
        check_folder(folder)
        header = identity(reranker) | {"dtype": dtype, "layers": kind.kept, "batch_tokens": batch_tokens}
        with building(folder):
            writer = Writer(folder, header)
            writer.need(record_bytes(dtype, kind.numbers(1)) * len(documents) if kind.fixed else 0)
            with tqdm(
                total=len(documents), unit="doc", desc=f"states ({dtype})", mininterval=1, disable=not show_progress_bar
            ) as bar:

                def count(done: int) -> None:
                    bar.update(done)
                    on_stored(done)

                for block in blocks(reranker, documents, writer, count):
                    store_block(kind, reranker, writer, block, batch_tokens, count)
            writer.finish(writer.digest.hexdigest())
        return cls.open(folder, reranker)

    @classmethod
    def open(cls, folder: str | Path, reranker: Reranker) -> "DocumentStates":
        """Open the states in `folder`, made by this same model with this same template, truncation and precision.

        Raises:
            InputError: they are another model's (the message says what differs), unfinished, truncated or altered.
        """
        reader = Reader(Path(folder))
        ours = identity(reranker)
        compare_headers(
            ours, reader.manifest["header"], f"the states in {folder}", "open them with the model they were built with"
        )
        return cls(reranker, reader)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._reader.names)

    def __contains__(self, doc_id: object) -> bool:
        return isinstance(doc_id, str) and self._reader.names.find(doc_id) is not None

    @property
    def nbytes(self) -> int:
        """The size of all states on disk, in bytes."""
        return self._reader.manifest["done"]["states.bin"]

    def rank(self, query: str, doc_ids: Iterable[str], top_k: int | None = None) -> list[dict]:
        """Rank documents for a query: [{'doc_id', 'score'}] best first; equal scores keep the given order.

        Raises:
            InputError: the query is not a string, the doc_ids are a single one, `top_k` is negative, or a document has no state here.
        """
        _check_query(query, top_k)
        doc_ids = _listed(doc_ids)
        rows = self._rows(doc_ids)
        return _ranked(doc_ids, self._score([query], np.zeros(len(rows), dtype=int), rows), top_k)

    def rerank(
        self, candidates: pd.DataFrame, collection: Collection, top_k: int = 100, show_progress_bar: bool = False
    ) -> pd.DataFrame:
        """Rerank the `top_k` best candidates of each query, like `Reranker.rerank`: run -> run, scores raw logits.

        Raises:
            InputError: the run lacks a column, its ranks do not count from 1, it names a query that the collection does not have or a
                document that has no state here, or `top_k` is below 1.
        """
        if top_k < 1:
            raise InputError(f"expected top_k of at least 1, got {top_k}")
        head = head_of(candidates, top_k)
        check_run(head, collection, columns=["query_id"])
        query_ids, query_of = unique(head["query_id"])
        doc_ids, document_of = unique(head["doc_id"])
        queries = [collection.queries[query_id] for query_id in query_ids]
        scores = self._score(queries, query_of, self._rows(doc_ids)[document_of], show_progress_bar)
        return sort_run(head.assign(score=scores.astype(np.float64)))

    def convert(self, folder: str | Path, dtype: str, layers: Sequence[int] | None = None) -> "DocumentStates":
        """Write these states, float32 of all layers, in another format to a new folder; the backbone does not run.

        Raises:
            InputError: these states are not float32 of all layers, there is no such format, or the folder is not empty.
        """
        check_format(dtype)
        folder = Path(folder)
        if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"expected a new or empty folder, got {folder}, which is neither; choose another folder")
        manifest, table = self._reader.manifest, self._reader.names.table
        if self.dtype != "float32" or manifest["header"]["layers"] is not None:
            raise InputError(f"expected float32 states of all layers to convert, got {self.dtype} in {self._reader.folder}")
        kind = kind_of(self.reranker, layers)

        def read(row: int) -> tuple[Parts, np.ndarray | None]:
            parts = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in self._kind.shapes(int(table["tokens"][row]))]
            record, ids = self._reader.record(row, sum(part.numel() for part in parts))
            decode(self.dtype, record, parts)
            return parts, ids

        with replacing(folder) as temporary:
            temporary.mkdir()
            writer = Writer(temporary, manifest["header"] | {"dtype": dtype, "layers": kind.kept})
            profile = None
            if dtype not in FLOATS or kind.kept is not None:
                sample = [read(row)[0] for row in range(min(SAMPLE, len(self)))]
                profile = kind.keep(writer.write_profile(kind.profile(sample)))

            def write(row: int) -> np.ndarray:
                parts, ids = read(row)
                return encode(dtype, kind.keep(parts), profile, ids)

            for start in range(0, len(self), BLOCK[0]):
                rows = range(start, min(start + BLOCK[0], len(self)))
                records = ((row - start, write(row)) for row in rows)
                tokens = [int(table["tokens"][row]) for row in rows]
                numbers = [kind.numbers(count) for count in tokens]
                names = [self._reader.names[row] for row in rows]
                writer.add(names, tokens, numbers, records, manifest["done"]["digest"])
            writer.finish(manifest["done"]["digest"])
        return DocumentStates.open(folder, self.reranker)

    def hold(self, doc_ids: Iterable[str]) -> "HeldStates":
        """Load the states of some documents into memory, ready to compute, for many queries.

        Raises:
            InputError: a document has no state here.
        """
        doc_ids = _listed(doc_ids)
        rows = self._rows(doc_ids)
        batches = self._batches(np.zeros(len(rows), dtype=int), rows)
        return HeldStates(self, doc_ids, [(batch, self._load(rows[batch])) for batch in batches])

    def _rows(self, doc_ids: Sequence[str]) -> np.ndarray:
        rows = [self._reader.names.find(doc_id) if isinstance(doc_id, str) else None for doc_id in doc_ids]
        for doc_id, row in zip(doc_ids, rows, strict=True):
            if row is None:
                raise InputError(
                    f"expected a document with a state in {self._reader.folder}, got {doc_id!r}; "
                    "building again in this folder, with it after the same documents, adds it"
                )
        return np.array(rows, dtype=int)

    def _batches(self, query_lengths: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        """Indices of pairs that are scored together: of similar length, so that little is padded, then in the order of the file."""
        # what a state grows with: the document's tokens, or nothing
        lengths = np.ones(len(rows), dtype=int) if self._kind.fixed else self._reader.names.table["tokens"][rows].astype(int)
        order = np.lexsort((rows, query_lengths, lengths))
        batches, start = [], 0
        while start < len(order):
            longest = lengths[order[start : start + self.batch_size]]  # of a batch that ends here
            fits = np.arange(1, len(longest) + 1) * longest * 4 * self._kind.numbers(1) <= self.batch_bytes
            size = max(1, int(fits.sum()))
            batches.append(order[start : start + size])
            start += size
        return batches

    def _load(self, rows: np.ndarray):
        """Read states from the file into a batch that the backbone can continue, and the documents' ids, if queries are marked."""
        lengths = self._reader.names.table["tokens"][rows].astype(int)
        batch, documents = self._kind.room(lengths), []
        for place, row in enumerate(rows):
            parts = self._kind.parts_of(batch, place)
            record, ids = self._reader.record(int(row), sum(part.numel() for part in parts))
            decode(self.dtype, record, parts, self._profile)
            documents.append(ids)
        return self._kind.ready(batch), documents

    @torch.no_grad()
    def _score(self, queries: list[str], query_of, rows, show_progress_bar: bool = False) -> np.ndarray:
        """Score pairs, float32 (n,): while one batch computes, the next is loaded."""
        started = time.perf_counter()
        tokens = self.reranker.inputs.queries(queries)
        lengths = np.array([len(ids) for ids in tokens], dtype=int)[query_of] + self._around
        batches, scores = self._batches(lengths, rows), np.empty(len(rows), dtype=np.float32)
        padded = 0
        with (
            ThreadPoolExecutor(1, thread_name_prefix="states") as loader,
            tqdm(total=len(rows), unit="pair", desc="scoring from states", mininterval=1, disable=not show_progress_bar) as bar,
            self.reranker.scoring(),
        ):
            coming = loader.submit(self._load, rows[batches[0]]) if batches else None
            for place, batch in enumerate(batches):
                loaded = coming.result()
                if place + 1 < len(batches):
                    coming = loader.submit(self._load, rows[batches[place + 1]])
                scores[batch] = self._continue(loaded, [tokens[i] for i in query_of[batch]])
                padded += len(batch) * int(lengths[batch].max())
                bar.update(len(batch))
        self.cost = Cost(len(rows), int(lengths.sum()), padded, time.perf_counter() - started)
        return scores

    def _continue(self, loaded, queries: list[np.ndarray]) -> np.ndarray:
        """Run the queries' tokens after a batch of states, exactly where `PairTokenizer.join` puts them: float32 (B,)."""
        (loaded, documents), inputs = loaded, self.reranker.inputs
        if inputs.marked:
            queries = [inputs.mark(query, ids[len(inputs.before) :]) for query, ids in zip(queries, documents, strict=True)]
        halves = [np.concatenate([inputs.between, query, inputs.after]).astype(np.int32) for query in queries]
        batch = inputs.collate([Pair(ids, np.zeros_like(ids)) for ids in halves])
        features = {name: tensor.to(self.reranker.device) for name, tensor in batch.items()}
        ids, mask = features["input_ids"], features["attention_mask"]
        logits = self.reranker.model.score_hidden(
            lambda: self._kind.go_on(loaded, ids, mask), pooled_positions(ids, mask, "causal")
        )
        return logits[:, 0].float().cpu().numpy()


class HeldStates:
    """States in memory, from `DocumentStates.hold`: `rank` reads nothing from the disk."""

    def __init__(self, states: DocumentStates, doc_ids: list[str], batches: list):
        self.states, self.doc_ids, self._batches = states, doc_ids, batches
        self._lock = threading.Lock()  # a query's keys and values go after the documents' own, into the same tensor

    @torch.no_grad()
    def rank(self, query: str, top_k: int | None = None) -> list[dict]:
        """Rank the documents held for a query: [{'doc_id', 'score'}] best first; equal scores keep the given order.

        Raises:
            InputError: the query is not a string, or `top_k` is negative.
        """
        _check_query(query, top_k)
        tokens = self.states.reranker.inputs.queries([query])
        scores = np.empty(len(self.doc_ids), dtype=np.float32)
        with self._lock, self.states.reranker.scoring():
            for batch, loaded in self._batches:
                scores[batch] = self.states._continue(loaded, tokens * len(batch))
        return _ranked(self.doc_ids, scores, top_k)


def _check_query(query: object, top_k: int | None) -> None:
    if not isinstance(query, str):
        raise InputError(f"expected a query as a string, got {query!r:.80}")
    if top_k is not None and top_k < 0:
        raise InputError(f"expected top_k >= 0, got {top_k}")


def _listed(doc_ids: Iterable[str]) -> list[str]:
    if isinstance(doc_ids, str):
        raise InputError(f"expected a sequence of doc_ids, got the string {doc_ids!r:.80}; pass [doc_id] for a single one")
    return list(doc_ids)


def _ranked(doc_ids: Sequence[str], scores: np.ndarray, top_k: int | None) -> list[dict]:
    return [{"doc_id": doc_ids[i], "score": float(scores[i])} for i in np.argsort(-scores, kind="stable")[:top_k]]
