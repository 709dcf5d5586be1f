"""Any query on the documents of a study: BM25's candidates, what each trained reranker says of them, and why."""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .candidates import BM25, words
from .collection import Collection
from .reranker import Reranker

FIRST_STAGE = "bm25"
STEP = 16  # documents that are scored between two looks at whether to stop


class Ranking(NamedTuple):
    """What one system made of a query: documents best first, their scores (BM25's, or raw logits), the seconds it took."""

    doc_ids: list[str]
    scores: list[float]
    seconds: float


class Search:
    """Rank a collection's documents for one query after another, by BM25 and by rerankers that are loaded when they are first asked.

    models: {system: folder of its trained reranker}. Calls from several threads come one after the other.
    """

    def __init__(self, collection: Collection, models: Mapping[str, str | Path]):
        self.collection, self.models = collection, dict(models)
        self._index: BM25 | None = None
        self._rerankers: dict[str, Reranker] = {}
        self._lock = threading.RLock()

    def candidates(self, query: str, top_k: int) -> Ranking:
        """BM25's `top_k` documents for a query; none, where no word of it is in any document."""
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
        """Those documents in the order of a reranker; None if `stop` was set on the way. on_scored(count): documents just scored."""
        reranker, texts, scores = self.reranker(system), self.texts(doc_ids), {}
        started = time.perf_counter()
        longest_first = sorted(doc_ids, key=lambda doc_id: -len(texts[doc_id]))  # a step's documents are of like length
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
                self._rerankers[system] = Reranker.from_pretrained(self.models[system])
            return self._rerankers[system]

    def texts(self, doc_ids: Sequence[str]) -> dict[str, str]:
        """The texts of documents, {doc_id: text}."""
        return self.collection.documents.get_many(doc_ids)

    def judgements(self, query: str) -> dict[str, int]:
        """What was judged for a query of the collection, {doc_id: relevance}; nothing for any other query."""
        asked = [query_id for query_id, text in self.collection.queries.items() if text == query]
        judged = self.collection.qrels[self.collection.qrels["query_id"].isin(asked)]
        return dict(zip(judged["doc_id"], judged["relevance"], strict=True))

    def occlusion(self, system: str, query: str, doc_id: str) -> pd.DataFrame:
        """Which sentences of a document move its score: one row a sentence, in order.

        Columns: sentence (text, up to the next one), difference (the document's score minus its score without the sentence:
        above 0, the sentence speaks for the document), read (whether the model reads any of it before the cut at its length).
        """
        reranker, text = self.reranker(system), self.texts([doc_id])[doc_id]
        parts = sentences(text)
        starts = np.cumsum([0, *map(len, parts)])
        variants = [text] + ["".join(parts[:place] + parts[place + 1 :]) for place in range(len(parts))]
        with self._lock:
            scores = reranker.predict([(query, variant) for variant in variants])
            end = read_until(reranker, text)
        return pd.DataFrame({"sentence": parts, "difference": scores[0] - scores[1:], "read": starts[:-1] < end})


def sentences(text: str) -> list[str]:
    """Cut a text into sentences, each with the white space behind it: put together they are the text again."""
    return re.findall(r".+?(?:[.!?][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n+|\Z)", text, flags=re.DOTALL) or [text]


def read_until(reranker: Reranker, text: str) -> int:
    """How many characters of a document a reranker reads before it cuts it."""
    inputs = reranker.inputs
    given = inputs.document_prefix + text
    encoded = inputs.tokenizer(
        given, add_special_tokens=False, truncation=True, max_length=inputs.document_limit, return_offsets_mapping=True
    )
    return max((end for _, end in encoded["offset_mapping"]), default=0) - len(inputs.document_prefix)


def query_words(query: str) -> set[str]:
    """The words of a query that BM25 looks for."""
    return set(words([query])[0])
