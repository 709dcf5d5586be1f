"""From (query, document) to token ids: the template, the truncation, right padding, batches by token budget.

The two halves of a pair are tokenised apart and joined as ids. So a document's tokens never depend on the query, the same ids
serve training, scoring and stored document states, and every text is tokenised once, however many pairs it is in.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .errors import InputError
from .files import json_sha256

PROBES = "a", "the"  # not "a" and "b": T5 begins both, and hardly another text, with a token for the space before them
MOST_MATCHES = 3  # of a query token in the document: a mark counts no further

# What each kind of model reads, and the token whose hidden state becomes the score.
KINDS = {
    "encoder": "query and document as the tokenizer's own pair, read at the first token",
    "causal": "document, query, end of sequence, read at the last token",
    "encoder-decoder": "query and document as the tokenizer's own pair, read at the first decoder step",
}


@dataclass(frozen=True)
class Pair:
    """One tokenised pair: `ids` and `types` (segment 0 or 1) are int32 arrays of length L."""

    ids: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class PairTokenizer:
    """Turns texts into token ids, and two halves into one model input.

    encoder, encoder-decoder: the tokenizer's own pair format, e.g. `[CLS] query [SEP] document [SEP]`, with segment ids.
    causal: `Document: document\\n\\nQuery: query<eos>`, so that the query's tokens see the document, and the document's do not
    depend on the query (arXiv 2403.18276, section 3).

    A document keeps its first `max_length - max_query_length` tokens, a query what `max_query_length` leaves after the special
    tokens: both limits are fixed, so truncation never depends on the other half, and a pair never exceeds `max_length`.

    marked: for a model with `embeddings.FixedWordEmbedding`, the rows of its table: query tokens that occur in the document become
    other words beyond these (`mark`). 0 leaves them as they are.
    """

    def __init__(self, tokenizer, kind: str, max_length: int = 512, max_query_length: int = 50, marked: int = 0):
        if kind not in KINDS:
            raise InputError(f"expected a kind of model among {', '.join(KINDS)}, got {kind!r}")
        self.tokenizer, self.kind = tokenizer, kind
        self.max_length, self.max_query_length, self.marked = max_length, max_query_length, marked
        self.query_first = kind != "causal"
        if self.query_first:
            self.query_prefix = self.document_prefix = ""
            self.before, self.between, self.after = pair_specials(tokenizer)
        else:
            if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
                raise InputError("expected a tokenizer with an end-of-sequence token for a causal model, got none; set eos_token")
            self.query_prefix, self.document_prefix = "\n\nQuery: ", "Document: "
            end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
            begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            self.before, self.between, self.after = [tokenizer.bos_token_id] if begins else [], [], [end]
        specials = len(self.before) + len(self.between) + len(self.after)
        self.document_limit = max_length - max_query_length
        self.query_limit = max_query_length - specials
        if self.document_limit < 1 or self.query_limit < 1:
            raise InputError(
                f"expected max_length > max_query_length > {specials} special tokens, "
                f"got max_length={max_length}, max_query_length={max_query_length}"
            )
        if self.document_limit == len(self.document_head) or self.query_limit == len(self.query_head):
            raise InputError(
                "expected room for text after the words that the template puts before document and query, got "
                f"max_length={max_length}, max_query_length={max_query_length}, which these words fill; choose larger limits"
            )
        ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
        self.pad_id = next(i for i in ids if i is not None)  # its value does not matter: the mask hides it
        self.typed = "token_type_ids" in tokenizer.model_input_names and self.query_first

    def queries(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokenise queries; each array holds at most `query_limit` ids."""
        return self._tokenise(self.query_prefix, texts, self.query_limit)

    def documents(self, texts: Sequence[str], limit: int | None = None) -> list[np.ndarray]:
        """Tokenise documents; each array holds at most `limit` ids (default `document_limit`)."""
        return self._tokenise(self.document_prefix, texts, limit or self.document_limit)

    @cached_property
    def document_head(self) -> np.ndarray:
        """The ids that every document begins with, whatever its text."""
        return _common_start(*self.documents(PROBES))

    @cached_property
    def query_head(self) -> np.ndarray:
        """The ids that every query begins with, whatever its text."""
        return _common_start(*self.queries(PROBES))

    @cached_property
    def vocabulary_digest(self) -> str:
        """The SHA-256 of everything that decides which ids a text becomes, apart from the template and the truncation."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            words = json.loads(tokenizer.backend_tokenizer.to_str())
            # without what each call sets anew
            words = {name: value for name, value in words.items() if name not in ("truncation", "padding")}
        else:
            words = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
        return json_sha256(words)

    def _tokenise(self, prefix: str, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        if not texts:
            return []
        try:
            # cut here: a fast tokenizer would keep a call's limit as its own state, and threads would have to wait for one another
            encoded = self.tokenizer(
                [prefix + text for text in texts],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except TypeError as error:
            wrong = [text for text in texts if not isinstance(text, str)]
            if wrong:
                raise InputError(f"expected text, got {wrong[0]!r:.80}; leave it out, or put a text there") from error
            broken = next((text for text in texts if any("\ud800" <= letter <= "\udfff" for letter in text)), None)
            if broken is None:
                raise
            raise InputError(f"expected text that UTF-8 can hold, got half a surrogate pair in {broken!r:.80}") from error
        return [np.asarray(ids[:limit], dtype=np.int32) for ids in encoded["input_ids"]]

    def join(self, query: np.ndarray, document: np.ndarray) -> Pair:
        """Join a tokenised query and a tokenised document (arrays of ids) into one model input."""
        query = self.mark(query, document) if self.marked else query
        first, second = (query, document) if self.query_first else (document, query)
        ids = np.concatenate([self.before, first, self.between, second, self.after]).astype(np.int32)
        types = np.zeros(len(ids), dtype=np.int32)
        types[len(self.before) + len(first) + len(self.between) :] = 1
        return Pair(ids, types)

    def mark(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """Add to each of a query's ids how often it occurs in the document (up to `MOST_MATCHES`) times `marked`.

        This spares a small model from learning to compare words (after MarkedBERT, ECIR 2021). Only the query is marked: what a causal
        model reads before it stays the same for every query.
        """
        counts = (query[:, None] == document[len(self.document_head) :]).sum(1)
        counts[: len(self.query_head)] = 0
        return query + self.marked * np.minimum(counts, MOST_MATCHES).astype(np.int32)

    def collate(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Right-pad B pairs to the longest: `input_ids`, `attention_mask` and, where the model has segments, `token_type_ids`,
        int64 tensors of shape (B, L)."""
        width = max(len(pair) for pair in pairs)
        ids = np.full((len(pairs), width), self.pad_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, pair in enumerate(pairs):
            ids[row, : len(pair)], types[row, : len(pair)], mask[row, : len(pair)] = pair.ids, pair.types, 1
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self.typed:
            batch["token_type_ids"] = torch.from_numpy(types)
        return batch


def _common_start(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[: next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))]


def pair_specials(tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Return the special ids that a tokenizer puts before, between and after the two texts of a pair."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    whole = tokenizer("a", "b")["input_ids"]
    start = whole.index(first[0])
    middle = start + len(first)
    end = len(whole) - whole[::-1].index(second[-1])
    return whole[:start], whole[middle : end - len(second)], whole[end:]


def token_batches(lengths: Sequence[int], batch_tokens: int, batch_cost: int) -> list[np.ndarray]:
    """Cut sequences, longest first, into batches of at most `batch_tokens` tokens after padding: arrays of indices.

    Every index occurs exactly once. Of all ways to cut the sequences in the order of their lengths, the cheapest is taken; the cost
    is the tokens computed after padding, plus `batch_cost` tokens per batch (`threads.batch_cost`). The longest come first, so that a
    batch too large for the memory fails at the start and not at the end. A sequence longer than the budget is a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    longest = np.maximum(1, np.asarray(lengths)[order])
    sizes = np.clip(batch_tokens // longest, 1, max(1, len(order)))
    counts = np.arange(1, len(order) + 1)
    # cost[j]: the least for the first j sequences; start[j]: where the last of their batches begins
    cost, start = np.full(len(order) + 1, np.inf), np.zeros(len(order) + 1, dtype=int)
    cost[0] = 0
    for i, (length, size) in enumerate(zip(longest.tolist(), sizes.tolist(), strict=True)):
        with_batch = cost[i] + batch_cost + length * counts[: min(size, len(order) - i)]
        there = slice(i + 1, i + 1 + len(with_batch))
        start[there] = np.where(with_batch < cost[there], i, start[there])
        np.minimum(cost[there], with_batch, out=cost[there])
    cuts = [len(order)]
    while cuts[-1] > 0:
        cuts.append(int(start[cuts[-1]]))
    return np.split(order, cuts[-2:0:-1]) if len(order) else []
