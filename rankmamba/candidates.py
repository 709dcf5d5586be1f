"""The first stage: BM25 candidates, and the groups of one relevant and several hard negative documents that training reads."""

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from .collection import Collection
from .data.formats import Documents
from .data.runs import head_of, sort_run
from .errors import InputError

# bm25s imports JAX where it is installed, and JAX would reserve three quarters of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
import bm25s  # noqa: E402

K1, B = 0.9, 0.4  # Anserini's defaults, usual for passages
GRID = tuple(product((0.6, 0.9, 1.2, 1.6, 2.0), (0.2, 0.4, 0.6, 0.8)))


class BM25:
    """BM25 as in Lucene (bm25s): idf ln(1 + (N - df + 0.5) / (df + 0.5)), tf / (tf + k1 (1 - b + b length / mean length)).

    Documents and queries are tokenised alike: lower case, words of two characters and more, without bm25s' 33 English stop words,
    not stemmed. A word that a query repeats counts every time. Scores are float32.
    """

    def __init__(self, index: bm25s.BM25, doc_ids: Sequence[str]):
        self.k1, self.b = index.k1, index.b
        self._index, self._doc_ids = index, np.array(doc_ids, dtype=object)
        self._id_order = np.empty(len(doc_ids), dtype=np.int64)  # rank of each document among the sorted ids
        self._id_order[np.argsort(self._doc_ids, kind="stable")] = np.arange(len(doc_ids))

    @classmethod
    def build(cls, documents: Mapping[str, str], k1: float = K1, b: float = B) -> "BM25":
        """Index documents {doc_id: text}, read one at a time.

        Raises:
            InputError: k1 or b is out of range, or no document has a word to index.
        """
        return cls._from_tokens(*_tokenise(documents), k1, b)

    @classmethod
    def _from_tokens(cls, doc_ids: Sequence[str], tokens, k1: float, b: float) -> "BM25":
        if not (k1 >= 0 and 0 <= b <= 1):
            raise InputError(f"expected k1 >= 0 and b from 0 to 1, got k1={k1} and b={b}")
        index = bm25s.BM25(k1=k1, b=b, method="lucene")
        index.index(tokens, create_empty_token=False, show_progress=False)
        return cls(index, doc_ids)

    def search(self, queries: Mapping[str, str], top_k: int = 100, show_progress: bool = False) -> pd.DataFrame:
        """Return the run of the `top_k` best documents of each query, exact under the tie rule even where the cut-off splits a tie.

        Documents that share no word with the query are not candidates: a query may have fewer than `top_k` results, or none.
        """
        vocabulary, query_ids, documents, scores = self._index.vocab_dict, [], [], []
        cut = zip(queries, words(list(queries.values())), strict=True)
        for query_id, its_words in tqdm(
            cut, "BM25", total=len(queries), unit=" queries", mininterval=1, disable=not show_progress
        ):
            known = [vocabulary[word] for word in its_words if word in vocabulary]
            if not known:
                continue
            all_scores = self._index.get_scores_from_ids(known)
            found = np.flatnonzero(all_scores > 0)
            if len(found) > top_k:
                # everything tied with the last place stays in until the tie rule has decided
                found = found[all_scores[found] >= np.partition(all_scores, -top_k)[-top_k]]
            found = found[np.lexsort((self._id_order[found], -all_scores[found]))[:top_k]]
            query_ids += [query_id] * len(found)
            documents.append(found)
            scores.append(all_scores[found])
        places = np.concatenate([np.empty(0, dtype=np.int64), *documents])
        scores = np.concatenate([np.empty(0), *scores])
        return sort_run(pd.DataFrame({"query_id": query_ids, "doc_id": self._doc_ids[places], "score": scores}))


def words(texts: Iterable[str]) -> list[list[str]]:
    """Split texts into the words that BM25 looks for."""
    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def _tokenise(documents: Mapping[str, str]):
    """Split all documents into words: (doc_ids, bm25s tokens)."""
    documents = documents if isinstance(documents, Documents) else Documents(documents)
    doc_ids = []

    def texts():
        for doc_id, text in documents.pairs():
            doc_ids.append(doc_id)
            yield text

    tokens = bm25s.tokenize(texts(), stopwords="en", show_progress=False)
    if not tokens.vocab:
        raise InputError(f"expected documents with words to index, got {len(doc_ids)} documents without any")
    return doc_ids, tokens


def tune_bm25(
    documents: Mapping[str, str],
    queries: Mapping[str, str],
    qrels: pd.DataFrame,
    grid: Sequence[tuple[float, float]] = GRID,
    top_k: int = 100,
) -> pd.DataFrame:
    """Try BM25 with each (k1, b) of the grid on development queries: a table k1, b, RR@k, R@k for k = `top_k`, best RR first."""
    from .evaluate import per_query  # slow to import

    judged = qrels[qrels["query_id"].isin(list(queries))]
    if not (judged["relevance"] > 0).any():
        raise InputError("expected qrels with a relevant document for at least one of the queries, got none")
    asked, measures = {i: queries[i] for i in judged["query_id"].unique()}, [f"RR@{top_k}", f"R@{top_k}"]
    doc_ids, tokens = _tokenise(documents)
    rows = []
    for k1, b in grid:
        run = BM25._from_tokens(doc_ids, tokens, k1, b).search(asked, top_k)
        rows.append((k1, b, *per_query(run, judged, measures).mean()))
    table = pd.DataFrame(rows, columns=["k1", "b", *measures])
    return table.sort_values(measures[0], ascending=False, kind="stable", ignore_index=True)


def candidates_of(collection: Collection) -> pd.DataFrame:
    """The candidates that come with a collection, or BM25's."""
    given = collection.candidates
    return BM25.build(collection.documents).search(collection.queries) if given is None else given


class Group(NamedTuple):
    """One training example for LCE: a query, a relevant document, and the documents that it must beat."""

    query_id: str
    positive: str
    negatives: tuple[str, ...]

    @property
    def doc_ids(self) -> tuple[str, ...]:
        """The positive, then the negatives."""
        return self.positive, *self.negatives


def lce_groups(
    candidates: pd.DataFrame,
    qrels: pd.DataFrame,
    group_size: int = 8,
    seed: int = 0,
    epoch: int = 0,
    depth: int = 100,
    doc_ids: Sequence[str] | None = None,
) -> list[Group]:
    """Draw one group for each relevant (query, document) pair of the qrels, and shuffle the groups.

    The `group_size` - 1 negatives are drawn without replacement from the query's first `depth` candidates, leaving out every
    document that is judged relevant to the query (relevance > 0). The positive need not be a candidate. Where there are too few
    negatives, the rest are random documents out of `doc_ids`, the ids of the collection.

    The draw depends only on seed, epoch, and the query's own candidates and judgements; every epoch draws afresh. LCE
    (localized contrastive estimation) is by Gao, Dai and Callan, ECIR 2021.

    Raises:
        InputError: there are too few negatives, and `doc_ids` is not given or too short; the run lacks a column, or its ranks do not
            count from 1.
    """
    relevant: dict[str, set[str]] = defaultdict(set)
    judged = qrels[qrels["relevance"] > 0]
    for query_id, doc_id in zip(judged["query_id"], judged["doc_id"], strict=True):
        relevant[query_id].add(doc_id)
    pools: dict[str, list[str]] = defaultdict(list)
    head = head_of(candidates, depth)
    head = head[head["query_id"].isin(list(relevant))]
    for query_id, doc_id in zip(head["query_id"], head["doc_id"], strict=True):
        if doc_id not in relevant[query_id]:
            pools[query_id].append(doc_id)
    groups = []
    for query_id, positive in sorted((query_id, doc_id) for query_id, ids in relevant.items() for doc_id in ids):
        pool = sorted(pools[query_id])
        rng = np.random.default_rng([seed, epoch, zlib.crc32(f"{query_id} {positive}".encode())])
        drawn = [pool[i] for i in rng.permutation(len(pool))[: group_size - 1]]
        if len(drawn) < group_size - 1:
            drawn += _random_documents(group_size - 1 - len(drawn), relevant[query_id].union(drawn), doc_ids, query_id, rng)
        groups.append(Group(query_id, positive, tuple(drawn)))
    return [groups[i] for i in np.random.default_rng([seed, epoch]).permutation(len(groups))]


def _random_documents(count: int, excluded: set[str], doc_ids: Sequence[str] | None, query_id: str, rng) -> list[str]:
    if doc_ids is None or len(doc_ids) < count + len(excluded):
        have = "no doc_ids" if doc_ids is None else f"{len(doc_ids)} documents in all"
        remedy = "pass doc_ids=list(collection.documents), or " if doc_ids is None else "choose "
        raise InputError(
            f"expected {count} more negatives for query {query_id!r} than its candidates have, got {have}; {remedy}a smaller group_size"
        )
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        doc_id = doc_ids[int(rng.integers(len(doc_ids)))]
        if doc_id not in excluded:
            drawn[doc_id] = None
    return list(drawn)
