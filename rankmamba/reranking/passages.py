"""How much of a long document is read: FirstP its beginning, LongP a longer beginning, MaxP several passages of which the best counts.

FirstP and LongP differ only in `max_length`. MaxP (Dai and Callan, SIGIR 2019) cuts a document into passages as long as a pair has
room for, half of each shared with the next; the document's score is that of its best passage.
"""

from collections.abc import Sequence

import numpy as np

from ..inputs import PairTokenizer


def cut(document: np.ndarray, inputs: PairTokenizer, most: int) -> list[np.ndarray]:
    """Cut the token ids of a whole document into at most `most` passages of at most `inputs.document_limit` ids each.

    Each begins with the template's words before a document, as a document does. With most=1 it is the document's beginning.
    """
    head, body = np.split(document, [min(len(inputs.document_head), len(document))])
    room = inputs.document_limit - len(head)
    step = max(1, room // 2)
    starts = range(0, max(1, len(body) - room + step), step)[:most]
    return [np.concatenate([head, body[start : start + room]]) for start in starts]


def tokens_needed(inputs: PairTokenizer, most: int) -> int:
    """Return how many tokens of a document `most` passages can reach."""
    room = inputs.document_limit - len(inputs.document_head)
    return len(inputs.document_head) + room + (most - 1) * max(1, room // 2)


def spread(
    documents: Sequence[Sequence[np.ndarray]], query_of: np.ndarray, document_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make pairs of queries and passages out of pairs of queries and documents.

    documents: the passages of each. query_of, document_of: places in lists, (pairs,). Returns the places of query and passage, where
    passages are counted through all documents, and how many passages each pair became, (pairs,).
    """
    counts = np.array([len(passages) for passages in documents], dtype=int)
    first, per_pair = np.cumsum(counts) - counts, counts[document_of]
    within = np.arange(per_pair.sum()) - np.repeat(np.cumsum(per_pair) - per_pair, per_pair)
    return np.repeat(query_of, per_pair), np.repeat(first[document_of], per_pair) + within, per_pair


def best_of(scores: np.ndarray, per_pair: np.ndarray) -> np.ndarray:
    """Return each pair's highest score: scores of all passages in order, passages per pair (pairs,) -> (pairs,)."""
    return np.maximum.reduceat(scores, np.cumsum(per_pair) - per_pair) if len(per_pair) else scores
