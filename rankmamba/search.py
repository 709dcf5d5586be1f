"""Any query against the documents of a study: BM25's candidates, how each trained reranker ranks them, and why.

A causal reranker whose states of all documents are stored answers from them; the others read the documents.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .backbones import find
from .candidates import BM25, words
from .collection import Collection, digest_of
from .errors import InputError
from .files import json_sha256, sha256, slug
from .reranker import Reranker
from .reranking.saved import WEIGHTS
from .states import DocumentStates
from .states.encoding import record_bytes
from .states.kinds import kind_of
from .states.reader import MANIFEST
from .training.progress import Stopped

STEP = 16  # documents scored between two checks whether to stop
STORED = "float16"  # half of float32's bytes, and the rankings of full scoring except for near ties


class Ranking(NamedTuple):
    """One system's answer to a query: documents best first, their scores (BM25's, or raw logits), the seconds it took, and whether
    it read stored states instead of the documents."""

    doc_ids: list[str]
    scores: list[float]
    seconds: float
    from_states: bool = False


class Search:
    """Rank a collection's documents for one query after another, by BM25 and by rerankers that are loaded on first use.

    models: {system: folder of its trained reranker}. stores: the folder with the stored states, one folder per system, made by `store`.
    Scoring from several threads takes turns; `store` runs alongside.
    """

    def __init__(self, collection: Collection, models: Mapping[str, str | Path], stores: str | Path):
        self.collection, self.models, self.stores = collection, dict(models), Path(stores)
        self._index: BM25 | None = None
        self._rerankers: dict[str, Reranker] = {}
        self._states: dict[str, DocumentStates] = {}
        self._stores: dict[str, Path] = {}
        self._causal = [system for system in self.models if find(system).has_states]
        self._lock = threading.RLock()

    def candidates(self, query: str, top_k: int) -> Ranking:
        """BM25's `top_k` documents for a query; none where no document contains any of its words."""
        with self._lock:
            if self._index is None:
                self._index = BM25.build(self.collection.documents)
            started = time.perf_counter()
            run = self._index.search({"query": query}, top_k)
        return Ranking(list(run["doc_id"]), list(run["score"]), time.perf_counter() - started)

    def rerank(
        self,
        system: str,
        query: str,
        doc_ids: Sequence[str],
        on_scored: Callable[[int], None] = lambda count: None,
        stop: threading.Event | None = None,
    ) -> Ranking | None:
        """Put these documents in a reranker's order; None if `stop` was set meanwhile. on_scored(count): documents just scored."""
        if (states := self.states(system)) is not None:
            started = time.perf_counter()
            with self._lock:
                ranked = states.rank(query, doc_ids)
            on_scored(len(doc_ids))
            scores = [row["score"] for row in ranked]
            return Ranking([row["doc_id"] for row in ranked], scores, time.perf_counter() - started, from_states=True)
        reranker, texts, scores = self.reranker(system), self.texts(doc_ids), {}
        started = time.perf_counter()
        longest_first = sorted(doc_ids, key=lambda doc_id: -len(texts[doc_id]))  # the documents of a step are of similar length
        for start in range(0, len(doc_ids), STEP):
            if stop is not None and stop.is_set():
                return None
            step = longest_first[start : start + STEP]
            with self._lock:
                found = reranker.predict([(query, texts[doc_id]) for doc_id in step])
            scores |= zip(step, map(float, found), strict=True)
            on_scored(len(step))
        ranked = sorted(doc_ids, key=lambda doc_id: -scores[doc_id])  # stable: equal scores keep the given order
        return Ranking(ranked, [scores[doc_id] for doc_id in ranked], time.perf_counter() - started)

    def reranker(self, system: str) -> Reranker:
        """A system's reranker, loaded once."""
        with self._lock:
            if system not in self._rerankers:
                self._rerankers[system] = Reranker.from_pretrained(self._model(system))
            return self._rerankers[system]

    def store(self, system: str, on_stored: Callable[[int], None], stop: threading.Event) -> None:
        """Compute and keep the states of all documents for a causal system; if stopped, it resumes where it was.

        on_stored(count): documents just done.

        Raises:
            InputError: the system has no states, the disk is full, or the states there are another model's.
        """

        def look_up(count: int) -> None:
            on_stored(count)
            if stop.is_set():
                raise Stopped

        folder = self._store(system)
        for other in self.stores.glob(f"{slug(system)}-*"):
            of_this = re.fullmatch(re.escape(slug(system)) + "-[0-9a-f]{12}", other.name)  # not of nano-mamba-scratch
            if of_this and other != folder:  # of a model that has been retrained since
                shutil.rmtree(other)
        with suppress(Stopped):
            self._states[system] = DocumentStates.build(self.reranker(system), self.collection, folder, STORED, on_stored=look_up)

    def states_gb(self, system: str, doc_ids: Sequence[str]) -> float:
        """The GB that the states of all documents would take, judged by these."""
        with self._lock:
            reranker = self.reranker(system)
            kind, tokens = kind_of(reranker), map(len, reranker.inputs.documents(list(self.texts(doc_ids).values())))
            return np.mean([record_bytes(STORED, kind.numbers(count)) for count in tokens]) * len(self.collection.documents) / 1e9

    def states(self, system: str) -> DocumentStates | None:
        """A system's stored states; None unless all documents have one."""
        with self._lock:
            if system not in self._states and self._stored(system):
                self._states[system] = DocumentStates.open(self._store(system), self.reranker(system))
            return self._states.get(system)

    def storable(self) -> list[str]:
        """The systems whose documents can have states and have none yet."""
        return [system for system in self._causal if not self._stored(system)]

    def _stored(self, system: str) -> bool:
        return (self._store(system) / MANIFEST).is_file()

    def _store(self, system: str) -> Path:
        """The folder of a system's states; other weights, or texts that were edited, get another folder."""
        if system not in self._stores:
            made_of = [sha256(self._model(system) / WEIGHTS), digest_of([self.collection.name])]
            self._stores[system] = self.stores / f"{slug(system)}-{json_sha256(made_of)[:12]}"
        return self._stores[system]

    def _model(self, system: str) -> Path:
        """The folder of a system's trained reranker.

        Raises:
            InputError: it was never trained, or its model is gone.
        """
        folder = Path(self.models[system])
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"expected the trained model {folder}, found none; run 02_train with {system!r} among its systems")
        return folder

    def texts(self, doc_ids: Sequence[str]) -> dict[str, str]:
        """The texts of documents, {doc_id: text}."""
        return self.collection.documents.get_many(doc_ids)

    def judgements(self, query: str) -> dict[str, int]:
        """The judgements of a query of the collection, {doc_id: relevance}; none for any other query."""
        asked = [query_id for query_id, text in self.collection.queries.items() if text == query]
        judged = self.collection.qrels[self.collection.qrels["query_id"].isin(asked)]
        return dict(zip(judged["doc_id"], judged["relevance"], strict=True))

    def occlusion(
        self,
        system: str,
        query: str,
        doc_id: str,
        on_scored: Callable[[int, int], None] = lambda done, total: None,
        stop: threading.Event | None = None,
    ) -> pd.DataFrame | None:
        """Which sentences of a document move its score: one row a sentence, in order; None if `stop` was set meanwhile.

        Columns: sentence (text, up to the next one), difference (the document's score minus its score without the sentence:
        above 0, the sentence speaks for the document; 0 where it is not read), read (whether the model reads any of it before the cut
        at its length). on_scored(done, total): counts sentences.
        """
        reranker, text = self.reranker(system), self.texts([doc_id])[doc_id]
        parts = sentences(text)
        read = np.cumsum([0, *map(len, parts)])[:-1] < read_until(reranker, text)
        variants = [text] + ["".join(parts[:place] + parts[place + 1 :]) for place in np.flatnonzero(read)]
        scores = []
        for start in range(0, len(variants), STEP):
            if stop is not None and stop.is_set():
                return None
            with self._lock:
                scores += reranker.predict([(query, variant) for variant in variants[start : start + STEP]]).tolist()
            on_scored(len(scores) - 1, len(variants) - 1)
        difference = np.zeros(len(parts))
        difference[read] = scores[0] - np.array(scores[1:])
        return pd.DataFrame({"sentence": parts, "difference": difference, "read": read})


def sentences(text: str) -> list[str]:
    """Split a text into sentences, each with the white space after it: joined, they are the text again."""
    return re.findall(r".+?(?:[.!?][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n+|\Z)", text, flags=re.DOTALL) or [text]


def read_until(reranker: Reranker, text: str) -> int:
    """How many characters of a document a reranker reads before it cuts it."""
    inputs = reranker.inputs
    given = inputs.document_prefix + text
    offsets = inputs.tokenizer(given, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return max((end for _, end in offsets[: inputs.document_limit]), default=0) - len(inputs.document_prefix)


def query_words(query: str) -> set[str]:
    """The words of a query that BM25 looks for."""
    return set(words([query])[0])
