"""`Reranker`: score (query, document) pairs with any backbone; rank lists, rerank runs, save and load."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm.std import tqdm
from transformers import AutoConfig, AutoTokenizer

from . import backbones, mixers
from .collection import Collection, check_run, sort_run
from .errors import InputError
from .files import replacing
from .inputs import PairTokenizer, token_batches
from .model import RerankerModel
from .precision import autocast, autocast_dtype

if TYPE_CHECKING:
    from .states import DocumentStates


@dataclass
class Cost:
    """What a scoring call took: pairs, real and padded tokens (counts), wall-clock seconds."""

    pairs: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Reranker:
    """Scores how relevant a document is to a query; the higher the better. Scores are raw logits (float32), not probabilities.

    >>> reranker = Reranker.from_pretrained("minilm-l6")
    >>> reranker.rank("who wrote hamlet", ["A play by Shakespeare.", "A small dog."], top_k=1)[0]["corpus_id"] in (0, 1)
    True
    """

    def __init__(
        self, model: RerankerModel, tokenizer, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ):
        """device: default CUDA if there is one, else the CPU. dtype: what matrix products run in; default by the device
        (`precision.autocast_dtype`); weights stay as they are."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, self.precision = autocast_dtype(self.device, dtype)
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        config = model.config
        self.inputs = PairTokenizer(tokenizer, config.kind, **config.limits)
        self.has_scan = mixers.has_scan(model)
        self.cost = Cost()  # of the last call that scored

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, device=None, dtype=None, max_length: int | None = None, max_query_length: int | None = None
    ) -> "Reranker":
        """Load a folder of ours, a name in the table of systems, or a checkpoint (Hub id or folder) that gets a new head.

        max_length, max_query_length: tokens; default what the folder says, or 512 and 50.

        Raises:
            InputError: there is no such system, folder or checkpoint, or it is not a language model.
        """
        given = {"max_length": max_length, "max_query_length": max_query_length}
        limits = {name: value for name, value in given.items() if value is not None}
        folder = Path(path_or_id)
        if (folder / "config.json").is_file() and AutoConfig.from_pretrained(folder).model_type == "rankmamba":
            config = AutoConfig.from_pretrained(folder)
            config.limits = config.limits | limits
            model = RerankerModel.from_pretrained(folder, config=config)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            model, tokenizer = backbones.build(backbones.find(str(path_or_id)), **limits)
        return cls(model, tokenizer, device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors), configuration with the template, and tokenizer; the folder is whole or absent."""
        with replacing(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)

    def predict(self, pairs: Sequence[tuple[str, str]], batch_tokens: int = 2048, show_progress_bar: bool = False) -> np.ndarray:
        """Score [(query, document)]: float32 (n,), raw logits, in the order given.

        batch_tokens: tokens in one batch after padding; it changes speed and memory, not the scores.
        """
        for pair in pairs:
            if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise InputError(f"expected pairs (query, document) of strings, got {pair!r}")
        queries, query_of = _unique(query for query, _ in pairs)
        documents, document_of = _unique(document for _, document in pairs)
        return self._score(
            self.inputs.queries(queries), self.inputs.documents(documents), query_of, document_of, batch_tokens, show_progress_bar
        )

    def rank(self, query: str, documents: Sequence[str], top_k: int | None = None, return_documents: bool = False) -> list[dict]:
        """Rank documents for a query: [{'corpus_id', 'score', 'text'?}] best first; equal scores keep the given order."""
        scores = self.predict([(query, document) for document in documents])
        order = np.argsort(-scores, kind="stable")[:top_k]
        ranked = [{"corpus_id": int(i), "score": float(scores[i])} for i in order]
        if return_documents:
            for row in ranked:
                row["text"] = documents[row["corpus_id"]]
        return ranked

    def rerank(
        self,
        candidates: pd.DataFrame,
        collection: Collection,
        top_k: int = 100,
        batch_tokens: int = 2048,
        show_progress_bar: bool = False,
        states: "DocumentStates | None" = None,
    ) -> pd.DataFrame:
        """Rerank the `top_k` best candidates of each query: run -> run of those documents, scores raw logits.

        states: the stored states of the documents, made by this reranker (`states.DocumentStates`); then only the queries'
        tokens run.

        Raises:
            InputError: the run names a query or a document that the collection does not have.
        """
        if states is not None:
            run = states.rerank(candidates, collection, top_k, show_progress_bar)
            self.cost = Cost(states.cost.pairs, states.cost.tokens, states.cost.tokens, states.cost.seconds)
            return run
        head = candidates[candidates["rank"] <= top_k]
        check_run(head, collection, columns=["query_id"])
        query_ids, query_of = _unique(head["query_id"])
        doc_ids, document_of = _unique(head["doc_id"])
        texts = collection.documents.get_many(doc_ids)
        missing = [doc_id for doc_id in doc_ids if doc_id not in texts]
        if missing:
            raise InputError(f"expected documents of {collection.name}, got a run with unknown document {missing[0]!r}")
        scores = self._score(
            self.inputs.queries([collection.queries[query_id] for query_id in query_ids]),
            self.inputs.documents([texts[doc_id] for doc_id in doc_ids]),
            query_of,
            document_of,
            batch_tokens,
            show_progress_bar,
        )
        return sort_run(head.assign(score=scores.astype(np.float64)))

    def transform(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The PyTerrier interface: columns qid, query, docno, text -> the same with score, and rank from 0 within each qid."""
        missing = {"qid", "query", "docno", "text"} - set(frame.columns)
        if missing:
            raise InputError(f"expected columns qid, query, docno and text, got none called {', '.join(sorted(missing))}")
        scored = frame.assign(score=self.predict(list(zip(frame["query"], frame["text"], strict=True))))
        scored["rank"] = scored.groupby("qid", sort=False)["score"].rank(method="first", ascending=False).astype(int) - 1
        return scored.sort_values(["qid", "rank"], ignore_index=True)

    @torch.inference_mode()
    def _score(self, queries, documents, query_of, document_of, batch_tokens, show_progress_bar) -> np.ndarray:
        """Score pairs given as two index arrays into tokenised queries and documents; a pair that recurs is computed once."""
        started = time.perf_counter()
        distinct, place = np.unique(np.stack([query_of, document_of]), axis=1, return_inverse=True)
        query_of, document_of = distinct
        specials = len(self.inputs.before) + len(self.inputs.between) + len(self.inputs.after)
        query_lengths = np.array([len(ids) for ids in queries], dtype=int)
        document_lengths = np.array([len(ids) for ids in documents], dtype=int)
        lengths = query_lengths[query_of] + document_lengths[document_of] + specials
        scores, padded_tokens = np.empty(len(lengths), dtype=np.float32), 0
        with tqdm(total=len(lengths), unit="pair", desc="scoring", mininterval=1, disable=not show_progress_bar) as bar:
            for batch in token_batches(lengths, batch_tokens):
                pairs = [self.inputs.join(queries[query_of[i]], documents[document_of[i]]) for i in batch]
                features = {name: tensor.to(self.device) for name, tensor in self.inputs.collate(pairs).items()}
                with autocast(self.device, self.dtype):
                    scores[batch] = self.model(**features).logits[:, 0].float().cpu().numpy()
                padded_tokens += features["input_ids"].numel()
                bar.update(len(batch))
        self.cost = Cost(len(lengths), int(lengths.sum()), padded_tokens, time.perf_counter() - started)
        return scores[place]


def _unique(values: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Return the distinct values in order of first appearance, and for each value its place among them."""
    places: dict[str, int] = {}
    index = [places.setdefault(value, len(places)) for value in values]
    return list(places), np.array(index, dtype=int)
