"""`Reranker`: score (query, document) pairs with any backbone; rank lists, rerank runs, save and load."""

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from tqdm.std import tqdm

from . import backbones, scan
from .collection import Collection, check_run
from .data.lines import refuse_duplicates
from .data.runs import head_of, sort_run
from .data.sources import say
from .data.token_store import document_tokens
from .errors import InputError
from .files import replacing
from .inputs import Pair, PairTokenizer, token_batches
from .memory import free_memory, out_of_memory
from .model import RerankerModel
from .network import fused, mixers
from .network.attention import choose_attention
from .network.embeddings import table_rows
from .precision import autocast, autocast_dtype
from .reranking.passages import best_of, cut, spread, tokens_needed
from .reranking.saved import carry_over, check_target
from .reranking.threads import at_once, batch_cost, even_batches, side_by_side

# Tokens of a batch when scoring: for each CPU thread as many as stay in its cache, many on any other device.
TOKENS_PER_THREAD, TOKENS_ON_A_GPU = 2048, 16384
_WRAPPED = re.compile(r"\.base_layer\.|lora_|modules_to_save|_orig_mod\.")  # in names of weights, by PEFT and torch.compile

_log = logging.getLogger(__name__)


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
    """Scores how relevant a document is to a query; higher is better. Scores are raw logits (float32), not probabilities.

    >>> reranker = Reranker.from_pretrained("nano-mamba")  # minilm-l6, say, has a head only once it was trained
    >>> reranker.rank("who wrote hamlet", ["A small dog.", "Hamlet is a play by Shakespeare."], top_k=1)[0]["corpus_id"]
    1
    """

    num_labels = 1  # asked for by sentence-transformers' evaluators: one score per pair

    def __init__(
        self, model: RerankerModel, tokenizer, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ):
        """device: default CUDA if available, else the CPU. dtype: of matrix products; the default depends on the device
        (`precision.autocast_dtype`). Weights stay as they are."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device == torch.device("cuda"):  # the current one, for threads as well, which have their own
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype, self.precision = autocast_dtype(self.device, dtype)
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer
        self.attention = choose_attention(model.backbone, self.device, self.dtype)
        config = model.config
        marked = 0 if config.word_embeddings is None else table_rows(config.word_embeddings)
        self.inputs = PairTokenizer(tokenizer, config.kind, **config.limits, marked=marked)
        if self.inputs.pad_id >= getattr(config.backbone_config, "vocab_size", self.inputs.pad_id + 1):
            self.inputs.pad_id = 0  # added to the tokenizer alone; the mask hides it
        self.has_scan = mixers.has_scan(model)
        self.cost = Cost()  # of the last call that scored
        self._said_smaller = False

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, device=None, dtype=None, max_length: int | None = None, max_query_length: int | None = None
    ) -> "Reranker":
        """Load a saved reranker's folder, a name in the table of systems, or a checkpoint (Hub id or folder) that gets a new head.

        max_length, max_query_length: tokens; by default the folder's own, or 512 and 50.

        Raises:
            InputError: there is no such system, folder or checkpoint, it is damaged, or it is not a language model.
        """
        given = {"max_length": max_length, "max_query_length": max_query_length}
        limits = {name: value for name, value in given.items() if value is not None}
        model, tokenizer = backbones.load(path_or_id, **limits)
        if not model.config.name_or_path:  # only what was saved has a place
            say(f"{path_or_id}: with a new head, whose scores mean nothing before it is trained")
        return cls(model, tokenizer, device, dtype)

    @property
    def setup(self) -> dict[str, str]:
        """What the reranker computes with, and why: "precision", "attention", "fused" (`fused.runs`: "native" or "none"), "scan" and, where
        there is a scan, "scan_reason"."""
        kernel = {"scan": "none"}
        if self.has_scan:
            chosen = scan.kernel(self.device)
            kernel = {"scan": chosen.name, "scan_reason": chosen.reason}
        between = "native" if fused.runs(self.model, self.device, self.dtype) else "none"
        return {"precision": self.precision, "attention": self.attention, "fused": between} | kernel

    @property
    def batch_tokens(self) -> int:
        """The default number of tokens computed at a time."""
        return TOKENS_PER_THREAD * torch.get_num_threads() if self.device.type == "cpu" else TOKENS_ON_A_GPU

    @property
    def model_card_data(self):
        """What sentence-transformers' evaluators expect of a model (`cross_encoder.NoModelCard`)."""
        from .cross_encoder import NoModelCard

        return NoModelCard()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors), configuration with the template, and tokenizer; the folder is whole or absent.

        Where it replaces a saved reranker, other files in the folder are kept.

        Raises:
            InputError: the folder holds something other than a saved reranker, or cannot be written, or the network is wrapped, by
                adapters or torch.compile.
        """
        from .cross_encoder import write_files

        wrapped = [name for name in self.model.state_dict() if _WRAPPED.search(name)]
        if not isinstance(self.model, RerankerModel) or wrapped:
            raise InputError(
                f"expected a plain network to save, got a wrapped one ({(wrapped or [type(self.model).__name__])[0]}); merge adapters "
                "first (merge_and_unload of PEFT), and save before torch.compile"
            )
        check_target(folder)
        with replacing(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            write_files(temporary)
            carry_over(folder, temporary)

    def predict(
        self, pairs: Iterable[tuple[str, str]], batch_tokens: int | None = None, show_progress_bar: bool = False, **cross_encoder
    ) -> np.ndarray:
        """Score [(query, document)]: float32 (n,), raw logits, in the order given.

        A model in training mode is put into evaluation mode, as CrossEncoder does: dropout would make the scores random.

        batch_tokens: tokens computed at a time after padding (on a CPU in one batch per thread), default `self.batch_tokens`; it
        changes speed and memory, not the scores (in bfloat16 their last digits).
        cross_encoder: further keywords of `CrossEncoder.predict`, see `cross_encoder.conversion`; with them the scores may be a tensor.

        Raises:
            InputError: a pair is not two strings, a keyword is unknown, or one pair does not fit into the memory.
        """
        convert = None
        if cross_encoder:
            from .cross_encoder import conversion

            convert = conversion(**cross_encoder)
        pairs = list(pairs)
        for pair in pairs:
            ordered = isinstance(pair, Sequence | np.ndarray) and not isinstance(pair, str)
            if not ordered or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise InputError(f"expected pairs (query, document) of strings, got {pair!r}")
        queries, query_of = unique(query for query, _ in pairs)
        documents, document_of = unique(document for _, document in pairs)
        scores = self._score(
            self.inputs.queries(queries), self.inputs.documents(documents), query_of, document_of, batch_tokens, show_progress_bar
        )
        return scores if convert is None else convert(scores)

    def rank(
        self, query: str, documents: Iterable[str], top_k: int | None = None, return_documents: bool = False, **predict
    ) -> list[dict]:
        """Rank documents for a query: [{'corpus_id', 'score', 'text'?}] best first; equal scores keep the given order.

        predict: further keywords of `predict`.

        Raises:
            InputError: a text is not a string, documents are a mapping, a table or a single text, or `top_k` is negative.
        """
        if isinstance(documents, pd.DataFrame):
            raise InputError("expected a sequence of texts, got a DataFrame; pass one of its columns")
        if isinstance(documents, Mapping):
            raise InputError("expected a sequence of texts, got a mapping; pass list(documents.values())")
        if isinstance(documents, str):
            raise InputError(f"expected a sequence of texts, got the text {documents!r:.80}; pass [text] to score a single one")
        if top_k is not None and top_k < 0:
            raise InputError(f"expected top_k >= 0, got {top_k}")
        documents = list(documents)
        as_array = {"convert_to_numpy": True, "convert_to_tensor": False} if predict else {}
        scores = self.predict([(query, document) for document in documents], **predict | as_array)
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
        batch_tokens: int | None = None,
        show_progress_bar: bool = False,
        max_passages: int = 1,
    ) -> pd.DataFrame:
        """Rerank the `top_k` best candidates of each query: run -> run of those documents, scores raw logits.

        Where torch.distributed is initialised, all processes call it alike and share the work; each gets the whole run, the same that
        one process would give.

        max_passages: 1 reads the beginning of a document (FirstP; LongP if the reranker's max_length is long); a larger number scores
        that many passages and takes the best (MaxP); `cost` then counts passages.

        Raises:
            InputError: the run lacks a column, its ranks do not count from 1, it names a query or a document that the collection does
                not have, or a number is below 1.
        """
        if top_k < 1 or max_passages < 1:
            raise InputError(f"expected top_k and max_passages of at least 1, got {top_k} and {max_passages}")
        head = head_of(candidates, top_k)
        check_run(head, collection, columns=["query_id"])
        refuse_duplicates(head, "the candidates")
        query_ids, query_of = unique(head["query_id"])
        doc_ids, document_of = unique(head["doc_id"])
        tokens = document_tokens(collection.documents, doc_ids, self.inputs, tokens_needed(self.inputs, max_passages))
        cuts = [cut(tokens[doc_id], self.inputs, max_passages) for doc_id in doc_ids]
        query_of, passage_of, per_pair = spread(cuts, query_of, document_of)
        scores = self._score(
            self.inputs.queries([collection.queries[query_id] for query_id in query_ids]),
            [passage for passages in cuts for passage in passages],
            query_of,
            passage_of,
            batch_tokens,
            show_progress_bar,
            share=dist.is_available() and dist.is_initialized(),
        )
        return sort_run(head.assign(score=best_of(scores, per_pair).astype(np.float64)))

    def transform(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The PyTerrier interface: columns qid, query, docno, text -> the same with score, and rank from 0 within each qid."""
        missing = {"qid", "query", "docno", "text"} - set(frame.columns)
        if missing:
            raise InputError(f"expected columns qid, query, docno and text, got none called {', '.join(sorted(missing))}")
        scored = frame.assign(score=self.predict(list(zip(frame["query"], frame["text"], strict=True))))
        scored["rank"] = scored.groupby("qid", sort=False)["score"].rank(method="first", ascending=False).astype(int) - 1
        return scored.sort_values(["qid", "rank"], ignore_index=True)

    def scoring(self) -> torch.autocast:
        """The context that the network scores and reads in: without dropout, products in `dtype`.

        One for all batches converts the weights once; in inference mode it would do so for every batch.
        """
        if self.model.training:
            self.model.eval()
        at_once(self.device)  # a thread that has not computed yet gets its number of torch's threads here, see `threads`
        return autocast(self.device, self.dtype)

    @torch.no_grad()
    def _score(self, queries, documents, query_of, document_of, batch_tokens, show_progress_bar, share=False) -> np.ndarray:
        """Score pairs given as two index arrays into tokenised queries and documents; a pair that recurs is computed once.

        share: each process computes some of the batches, which are those of a single process, so the scores are the same too.
        """
        started = time.perf_counter()
        distinct, recurring = np.unique(np.stack([query_of, document_of]), axis=1, return_inverse=True)
        query_of, document_of = distinct
        specials = len(self.inputs.before) + len(self.inputs.between) + len(self.inputs.after)
        query_lengths = np.array([len(ids) for ids in queries], dtype=int)
        document_lengths = np.array([len(ids) for ids in documents], dtype=int)
        lengths = query_lengths[query_of] + document_lengths[document_of] + specials
        count = at_once(self.device)
        budget = [batch_tokens or self.batch_tokens, count, batch_cost(self.device, count)]
        if share:  # processes may have different numbers of threads; all must cut alike
            dist.broadcast_object_list(budget, src=0, device=self.device)
        batches = even_batches(lengths, *budget)
        if share:
            batches = batches[dist.get_rank() :: dist.get_world_size()]
        scores, padded_tokens = np.zeros(len(lengths), dtype=np.float32), 0

        def compute(batch: np.ndarray) -> tuple[np.ndarray, int] | None:
            pairs = [self.inputs.join(queries[query_of[i]], documents[document_of[i]]) for i in batch]
            return self._score_batch(pairs, alone=count == 1)

        bar = tqdm(total=sum(map(len, batches)), unit="pair", desc="scoring", mininterval=1, disable=not show_progress_bar)
        with bar, self.scoring():
            while batches:
                count, left = min(count, len(batches)), dict(enumerate(batches))
                with closing(side_by_side(compute, batches, count, self.device, self.dtype)) as results:
                    for place, computed in results:
                        if computed is None:
                            break
                        batch = left.pop(place)
                        scores[batch], size = computed
                        padded_tokens += size
                        bar.update(len(batch))
                batches = list(left.values())
                if batches:
                    batches, count = self._smaller(batches, lengths), 1
        if share:
            scores, padded_tokens = _sum_over_processes(scores, padded_tokens, self.device)
        self.cost = Cost(len(lengths), int(lengths.sum()), padded_tokens, time.perf_counter() - started)
        return scores[recurring]

    def _score_batch(self, pairs: Sequence[Pair], alone: bool) -> tuple[np.ndarray, int] | None:
        """Score a batch: float32 (B,) and the number of padded tokens, or None if the memory is too small for it.

        Raises:
            InputError: the memory is too small even for one pair `alone`, with no other batch being computed.
        """
        try:
            features = {name: tensor.to(self.device) for name, tensor in self.inputs.collate(pairs).items()}
            return self.model(**features).logits[:, 0].float().cpu().numpy(), features["input_ids"].numel()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(pairs) == 1 and alone:
                raise InputError(
                    f"expected a pair of {len(pairs[0])} tokens to fit into the memory of {self.device}, got: {error}; "
                    "load the model with a smaller max_length"
                ) from error
        return None

    def _smaller(self, batches: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
        """Cut the remaining batches again, with half the tokens of the first one, which did not fit into memory."""
        free_memory()
        batch_tokens = int(lengths[batches[0]].max()) * len(batches[0]) // 2
        if not self._said_smaller:
            self._said_smaller = True
            _log.warning("a batch does not fit into the memory of %s: continuing with batch_tokens=%d", self.device, batch_tokens)
        left = np.concatenate(batches)
        return [left[batch] for batch in token_batches(lengths[left], batch_tokens, batch_cost(self.device))]


def _sum_over_processes(scores: np.ndarray, count: int, device: torch.device) -> tuple[np.ndarray, int]:
    """Put together what the processes have computed; what a process has not computed is 0 there."""
    scores, count = torch.from_numpy(scores).to(device), torch.tensor(count, device=device)
    for tensor in (scores, count):
        dist.all_reduce(tensor)
    return scores.cpu().numpy(), int(count)


def unique(values: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Return the distinct values in order of first appearance, and for each value its place among them."""
    places: dict[str, int] = {}
    index = np.array([places.setdefault(value, len(places)) for value in values], dtype=int)
    return list(places), index
