"""Document states: what a causal backbone knows after a document, stored, so that a query costs only its own tokens.

In the causal template the document comes first, so nothing up to the query depends on the query. A Mamba keeps two tensors of fixed
size, whatever the length of the document; attention keeps keys and values of every token (the KV cache). float32 states give the
scores of full scoring; smaller formats round the states, never the computation.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from tqdm.std import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .collection import Collection, Documents, sort_run
from .errors import InputError
from .files import replacing
from .inputs import Pair, token_batches
from .mixers import MambaState
from .model import pooled_positions
from .precision import autocast
from .reranker import Cost, Reranker, _unique
from .state_store import DTYPES, FLOATS, Parts, Profile, Reader, Writer, building, compare_headers, decode, encode, record_bytes

BLOCK = 256, 1 << 16  # documents and tokens between two commits of a build
SAMPLE = 16  # documents that the profile of int8 and int4 is made from
VOLATILE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "name_or_path", "output_hidden_states"}


class DocumentStates:
    """The states of documents on disk, and scoring from them. Make one with `build` or `open`.

    >>> states = DocumentStates.build(reranker, collection, "states", dtype="float16")
    >>> states.rank("who wrote hamlet", ["d3", "d7"])
    [{'doc_id': 'd7', 'score': 1.9}, {'doc_id': 'd3', 'score': -0.4}]

    cost: pairs, query tokens and seconds of the last scoring. batch_size: documents scored together; batch_bytes: at most so many
    bytes of their states at once (three times that is in memory: one batch computes, one is being loaded).
    """

    def __init__(self, reranker: Reranker, reader: Reader, batch_size: int = 64, batch_bytes: int = 256 << 20):
        self.reranker, self.batch_size, self.batch_bytes = reranker, batch_size, batch_bytes
        self._reader, header = reader, reader.manifest["header"]
        self.dtype = header["dtype"]
        self._kind = _kind(reranker, header["layers"])
        profile = reader.profile(self._kind.whole_shapes)
        self._profile = profile and self._kind.keep(profile)
        self._kind.rest = profile
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
    ) -> "DocumentStates":
        """Compute the state of every document and store it in `folder`; a build that was stopped goes on where it was.

        dtype: float32 (the scores of full scoring), bfloat16, float16, int8 or int4 (with scales). layers: keep only these layers'
        states (Mamba; not exact: the other layers start from the mean state of some documents). batch_tokens: documents' tokens computed together.

        Raises:
            InputError: the backbone is not causal, the folder holds other states or has another builder, the disk is full, ...
        """
        if dtype not in DTYPES:
            raise InputError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")
        documents = documents.documents if isinstance(documents, Collection) else documents
        documents = documents if isinstance(documents, Documents) else Documents(documents)
        kind = _kind(reranker, layers)
        folder = Path(folder)
        header = identity(reranker) | {"dtype": dtype, "layers": kind.kept, "batch_tokens": batch_tokens}
        with building(folder):
            writer = Writer(folder, header)
            writer.need(record_bytes(dtype, _numbers(kind, 1)) * len(documents) if kind.fixed else 0)
            with tqdm(total=len(documents), unit="doc", desc=f"states ({dtype})", mininterval=1, disable=not show_progress_bar) as bar:
                for block in _blocks(reranker, documents, writer, bar):
                    _store(kind, reranker, writer, block, batch_tokens, bar)
            writer.finish(writer.digest.hexdigest())
        return cls.open(folder, reranker)

    @classmethod
    def open(cls, folder: str | Path, reranker: Reranker) -> "DocumentStates":
        """Open the states in `folder`, made by this same model with this same template, truncation and precision.

        Raises:
            InputError: they are of another one (it says what differs), unfinished, truncated or altered.
        """
        reader = Reader(Path(folder))
        ours = identity(reranker)
        compare_headers(ours, reader.manifest["header"], f"the states in {folder}", "open them with the model they were built with")
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

    def verify(self) -> None:
        """Read everything and compare it with its checksums; scoring does so only with what it reads, the first time.

        Raises:
            InputError: a state was altered.
        """
        self._reader.verify()

    def rank(self, query: str, doc_ids: Sequence[str], top_k: int | None = None) -> list[dict]:
        """Rank documents for a query: [{'doc_id', 'score'}] best first; equal scores keep the given order.

        Raises:
            InputError: a document has no state here.
        """
        rows = self._rows(doc_ids)
        return _ranked(doc_ids, self._score([query], np.zeros(len(rows), dtype=int), rows), top_k)

    def rerank(
        self, candidates: pd.DataFrame, collection: Collection, top_k: int = 100, show_progress_bar: bool = False
    ) -> pd.DataFrame:
        """Rerank the `top_k` best candidates of each query, like `Reranker.rerank`: run -> run, scores raw logits.

        Raises:
            InputError: the run names a query that the collection does not have, or a document that has no state here.
        """
        head = candidates[candidates["rank"] <= top_k]
        unknown = set(head["query_id"]) - set(collection.queries)
        if unknown:
            raise InputError(f"expected queries of {collection.name}, got a run with unknown query {sorted(unknown)[0]!r}")
        query_ids, query_of = _unique(head["query_id"])
        doc_ids, document_of = _unique(head["doc_id"])
        queries = [collection.queries[query_id] for query_id in query_ids]
        scores = self._score(queries, query_of, self._rows(doc_ids)[document_of], show_progress_bar)
        return sort_run(head.assign(score=scores.astype(np.float64)))

    def convert(self, folder: str | Path, dtype: str, layers: Sequence[int] | None = None) -> "DocumentStates":
        """Write these states, float32 of all layers, in another format; the backbone does not run.

        Raises:
            InputError: these states are not float32 of all layers.
        """
        manifest, table = self._reader.manifest, self._reader.names.table
        if self.dtype != "float32" or manifest["header"]["layers"] is not None:
            raise InputError(f"expected float32 states of all layers to convert, got {self.dtype} in {self._reader.folder}")
        kind = _kind(self.reranker, layers)

        def parts_of(row: int) -> Parts:
            room = self._kind.room([int(table["tokens"][row])])
            parts = self._kind.parts_of(room, 0)
            decode(self.dtype, self._reader.record(row, sum(part.numel() for part in parts)), parts)
            return parts

        with replacing(folder) as temporary:
            temporary.mkdir()
            writer = Writer(temporary, manifest["header"] | {"dtype": dtype, "layers": kind.kept})
            profile = None
            if dtype not in FLOATS or kind.kept is not None:
                profile = writer.write_profile(kind.profile([parts_of(row) for row in range(min(SAMPLE, len(self)))]))
            for start in range(0, len(self), BLOCK[0]):
                rows = range(start, min(start + BLOCK[0], len(self)))
                records = ((row - start, encode(dtype, kind.keep(parts_of(row)), profile and kind.keep(profile))) for row in rows)
                tokens = [int(table["tokens"][row]) for row in rows]
                numbers = [_numbers(kind, count) for count in tokens]
                names = [self._reader.names[row] for row in rows]
                writer.add(names, tokens, numbers, records, manifest["done"]["digest"])
            writer.finish(manifest["done"]["digest"])
        return DocumentStates.open(folder, self.reranker)

    def hold(self, doc_ids: Sequence[str]) -> "HeldStates":
        """Load the states of some documents into memory, ready to compute, for many queries.

        Raises:
            InputError: a document has no state here.
        """
        rows = self._rows(doc_ids)
        batches = self._batches(np.zeros(len(rows), dtype=int), rows)
        return HeldStates(self, list(doc_ids), [(batch, self._load(rows[batch])) for batch in batches])

    def _rows(self, doc_ids: Sequence[str]) -> np.ndarray:
        rows = [self._reader.names.find(doc_id) for doc_id in doc_ids]
        for doc_id, row in zip(doc_ids, rows, strict=True):
            if row is None:
                raise InputError(f"expected a document with a state in {self._reader.folder}, got {doc_id!r}; build the states again")
        return np.array(rows, dtype=int)

    def _batches(self, query_lengths: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        """Indices of pairs that are scored together: of like length, so that little is padded, then in the order of the file."""
        lengths = self._reader.names.table["tokens"][rows].astype(int)
        order = np.lexsort((rows, query_lengths) if self._kind.fixed else (rows, query_lengths, lengths))
        batches, start = [], 0
        while start < len(order):
            size = self.batch_size
            if not self._kind.fixed:  # the last of a batch is the longest
                longest = lengths[order[start : start + size]]
                fits = np.arange(1, len(longest) + 1) * longest * 4 * _numbers(self._kind, 1) <= self.batch_bytes
                size = max(1, int(fits.sum()))
            else:
                size = max(1, min(size, self.batch_bytes // (4 * _numbers(self._kind, 1))))
            batches.append(order[start : start + size])
            start += size
        return batches

    def _load(self, rows: np.ndarray):
        """Read states from the file into a batch that the backbone can continue."""
        lengths = self._reader.names.table["tokens"][rows].astype(int)
        batch = self._kind.room(lengths)
        for place, row in enumerate(rows):
            parts = self._kind.parts_of(batch, place)
            decode(self.dtype, self._reader.record(int(row), sum(part.numel() for part in parts)), parts, self._profile)
        return self._kind.ready(batch)

    @torch.inference_mode()
    def _score(self, queries: list[str], query_of, rows, show_progress_bar: bool = False) -> np.ndarray:
        """Score pairs, float32 (n,): while one batch computes, the next is loaded."""
        started = time.perf_counter()
        tokens = _query_pairs(self.reranker, queries)
        lengths = np.array([len(pair) for pair in tokens], dtype=int)[query_of]
        batches, scores = self._batches(lengths, rows), np.empty(len(rows), dtype=np.float32)
        padded = 0
        with (
            ThreadPoolExecutor(1, thread_name_prefix="states") as loader,
            tqdm(total=len(rows), unit="pair", desc="scoring from states", mininterval=1, disable=not show_progress_bar) as bar,
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

    def _continue(self, loaded, queries: list[Pair]) -> np.ndarray:
        """Run the queries' tokens after a batch of states: float32 (B,)."""
        features = {name: tensor.to(self.reranker.device) for name, tensor in self.reranker.inputs.collate(queries).items()}
        ids, mask = features["input_ids"], features["attention_mask"]
        positions, head = pooled_positions(ids, mask, "causal"), self.reranker.model.score
        with autocast(self.reranker.device, self.reranker.dtype), self.reranker.model._last_layer.only(positions):
            hidden = self._kind.go_on(loaded, ids, mask)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), positions].float()
        return F.linear(pooled, head.weight.float(), head.bias.float())[:, 0].cpu().numpy()


class HeldStates:
    """States in memory, from `DocumentStates.hold`: `rank` reads nothing from the disk."""

    def __init__(self, states: DocumentStates, doc_ids: list[str], batches: list):
        self.states, self.doc_ids, self._batches = states, doc_ids, batches

    @torch.inference_mode()
    def rank(self, query: str, top_k: int | None = None) -> list[dict]:
        """Rank the documents held for a query: [{'doc_id', 'score'}] best first; equal scores keep the order they were given in."""
        tokens = _query_pairs(self.states.reranker, [query])
        scores = np.empty(len(self.doc_ids), dtype=np.float32)
        for batch, loaded in self._batches:
            scores[batch] = self.states._continue(loaded, tokens * len(batch))
        return _ranked(self.doc_ids, scores, top_k)


def identity(reranker: Reranker) -> dict[str, str | int]:
    """What a document's state depends on: backbone, weights, template, tokenizer, truncation, precision."""
    backbone, inputs, tokenizer = reranker.model.backbone, reranker.inputs, reranker.tokenizer
    weights = hashlib.sha256()
    for name, tensor in sorted([*backbone.named_parameters(), *backbone.named_buffers()], key=lambda item: item[0]):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {name: value for name, value in backbone.config.to_dict().items() if name[0] != "_" and name not in VOLATILE}
    if tokenizer.is_fast:
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        words = {name: value for name, value in words.items() if name not in ("truncation", "padding")}  # set by each call
    else:
        words = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    return {
        "backbone": backbone.config.model_type,
        "configuration": _digest(config),
        "weights": weights.hexdigest(),
        "template": json.dumps([inputs.before, inputs.document_prefix, inputs.query_prefix, inputs.after]),
        "tokenizer": _digest(words),
        "truncation": f"{inputs.document_limit} tokens of a document",
        "precision": str(reranker.dtype).removeprefix("torch."),
    }


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _query_pairs(reranker: Reranker, queries: list[str]) -> list[Pair]:
    """The query half of each model input, exactly as `PairTokenizer.join` would put it behind the document half."""
    inputs = reranker.inputs
    halves = [np.concatenate([inputs.between, query, inputs.after]).astype(np.int32) for query in inputs.queries(queries)]
    return [Pair(ids, np.zeros_like(ids)) for ids in halves]


def _ranked(doc_ids: Sequence[str], scores: np.ndarray, top_k: int | None) -> list[dict]:
    return [{"doc_id": doc_ids[i], "score": float(scores[i])} for i in np.argsort(-scores, kind="stable")[:top_k]]


def _numbers(kind, tokens: int) -> int:
    return sum(int(np.prod(shape)) for shape in kind.shapes(tokens))


def _blocks(reranker: Reranker, documents: Documents, writer: Writer, bar) -> Iterator[list[tuple[str, Pair, str]]]:
    """Yield what is to be stored between two commits: [(doc_id, document half, digest of all documents so far)]."""
    waiting: list[tuple[str, str, str]] = []
    block: list[tuple[str, Pair, str]] = []
    inputs, tokens = reranker.inputs, 0
    last = object()
    for place, item in enumerate(_then(documents.pairs(), last)):
        if item is not last:
            if writer.has(*item, place):
                bar.update(1)
                continue
            waiting.append((*item, writer.digest.hexdigest()))
        if len(waiting) < 64 and item is not last:
            continue
        halves = inputs.documents([text for _, text, _ in waiting])
        for (doc_id, _, digest), half in zip(waiting, halves, strict=True):
            ids = np.concatenate([inputs.before, half]).astype(np.int32)
            block.append((doc_id, Pair(ids, np.zeros_like(ids)), digest))
            tokens += len(ids)
            if len(block) == BLOCK[0] or tokens >= BLOCK[1]:
                yield block
                block, tokens = [], 0
        waiting = []
    if block:
        yield block


def _then(items: Iterator, last) -> Iterator:
    yield from items
    yield last


@torch.inference_mode()
def _store(kind, reranker: Reranker, writer: Writer, block, batch_tokens: int, bar) -> None:
    """Compute and store the states of one block."""
    doc_ids, pairs, digests = zip(*block, strict=True)
    dtype, profile = writer.header["dtype"], None
    with_profile = dtype not in FLOATS or kind.kept is not None
    if with_profile:
        profile = writer.profile(kind.whole_shapes)

    def records():
        nonlocal profile
        waiting, computed = [], 0
        # a state of fixed size makes short documents as large as long ones
        lengths = np.maximum([len(pair) for pair in pairs], 16 if kind.fixed else 1)
        for batch in token_batches(lengths, batch_tokens):
            features = reranker.inputs.collate([pairs[i] for i in batch])
            ids, mask = (features[name].to(reranker.device) for name in ("input_ids", "attention_mask"))
            with autocast(reranker.device, reranker.dtype):
                states = kind.read(ids, mask)
            waiting += zip(batch, states, strict=True)
            computed += len(batch)
            bar.update(len(batch))
            if profile is None and with_profile:
                if len(waiting) < SAMPLE and computed < len(pairs):
                    continue
                profile = writer.write_profile(kind.profile([parts for _, parts in waiting]))
            for place, parts in waiting:
                yield place, encode(dtype, kind.keep(parts), profile and kind.keep(profile))
            waiting = []

    numbers = [_numbers(kind, len(pair)) for pair in pairs]
    writer.add(doc_ids, [len(pair) for pair in pairs], numbers, records(), digests[-1])


def _kind(reranker: Reranker, layers: Sequence[int] | None):
    if reranker.model.config.kind != "causal":
        raise InputError(
            f"expected a causal backbone, got the {reranker.model.config.kind} {reranker.model.config.system!r}: "
            "it reads the document in the light of the query, so nothing can be stored beforehand"
        )
    return (_Recurrent if reranker.has_scan else _Attention)(reranker, layers)


class _Recurrent:
    """Mamba, FalconMamba and Mamba-2: conv (layers, K-1, W) and ssm (layers, E, N) or (layers, H, P, N), whatever the length."""

    fixed = True

    @torch.inference_mode()
    def __init__(self, reranker: Reranker, layers: Sequence[int] | None):
        self.backbone, self.device, self.kept = reranker.model.backbone, reranker.device, None
        probe = MambaState()
        self.backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), cache_params=probe, use_cache=False)
        try:
            one = probe.after
        except InputError:
            one = None
        depth = self.backbone.config.num_hidden_layers
        if one is None or len(one.ssm) != depth:
            raise InputError(f"expected Mamba mixers in all {depth} layers, got others in {type(self.backbone).__name__}")
        self.whole_shapes = [tuple(one.conv[:, 0].shape), tuple(one.ssm[:, 0].shape)]
        self.rest: Profile | None = None  # where the layers that were not kept start from
        if layers is not None:
            self.kept = sorted({int(layer) for layer in layers})
            if not self.kept or not set(self.kept) <= set(range(depth)):
                raise InputError(f"expected layers from 0 to {depth - 1}, got {list(layers)}")

    def shapes(self, tokens: int) -> list[tuple[int, ...]]:
        """The shapes of what is kept of one document."""
        return [(len(self.kept or range(shape[0])), *shape[1:]) for shape in self.whole_shapes]

    def keep(self, parts):
        """Of all layers' parts, or pairs in a profile, those that are kept."""
        if self.kept is None:
            return parts
        return [tuple(t[self.kept] for t in part) if isinstance(part, tuple) else part[self.kept] for part in parts]

    def read(self, ids, mask) -> list[Parts]:
        """Read documents: ids, mask (B, L) -> each one's parts of all layers, float32 on the CPU."""
        state = MambaState()
        self.backbone(input_ids=ids, attention_mask=mask, cache_params=state, use_cache=False)
        after = state.after
        parts = [part.float().cpu() for part in (after.conv, after.ssm)]
        return [[part[:, row] for part in parts] for row in range(len(ids))]

    def profile(self, states: list[Parts]) -> Profile:
        return [_mean_and_unit(torch.stack(parts), 0) for parts in zip(*states, strict=True)]

    def room(self, lengths):
        return [torch.empty(shape[0], len(lengths), *shape[1:]) for shape in self.shapes(1)]

    def parts_of(self, batch, place: int) -> Parts:
        return [part[:, place] for part in batch]

    def ready(self, batch) -> MambaState:
        if self.kept is not None:
            means = [mean[:, None].repeat_interleave(part.shape[1], 1) for (mean, _), part in zip(self.rest, batch, strict=True)]
            batch = [mean.index_copy_(0, torch.tensor(self.kept), part) for mean, part in zip(means, batch, strict=True)]
        return MambaState(*(part.to(self.device) for part in batch), record=False)

    def go_on(self, state, ids, mask):
        """Continue B states with queries (B, L): hidden (B, L, D). Behind a query nothing is read, so padding needs no mask."""
        return self.backbone(input_ids=ids, cache_params=state, use_cache=False).last_hidden_state


class _Attention:
    """GPT-NeoX, OPT, GPT-2, Llama and the like: keys and values of every token, (layers, 2, H, L, head width)."""

    fixed, kept, rest = False, None, None

    @torch.inference_mode()
    def __init__(self, reranker: Reranker, layers: Sequence[int] | None):
        self.backbone, self.device, self.dtype = reranker.model.backbone, reranker.device, reranker.dtype
        self.longest_query = reranker.inputs.max_query_length
        if layers is not None:
            raise InputError(f"expected a Mamba backbone to keep only some layers of, got {type(self.backbone).__name__}; leave it out")
        one = self._caches(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        self.depth, _, _, self.heads, _, self.width = torch.stack([torch.stack([c.keys, c.values]) for c in one]).shape

    def _caches(self, ids) -> list:
        cache = DynamicCache(config=self.backbone.config)
        self.backbone(input_ids=ids, past_key_values=cache, use_cache=True)
        layers = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.get_seq_length() == ids.shape[1]]
        shapes = {(layer.keys.shape, layer.values.shape) for layer in layers}
        if len(layers) != self.backbone.config.num_hidden_layers or len({shape for both in shapes for shape in both}) != 1:
            raise InputError(f"expected a backbone with the same full attention in all layers, got {type(self.backbone).__name__}")
        return layers

    @property
    def whole_shapes(self) -> list[tuple[int, ...]]:
        return self.shapes(1)

    def shapes(self, tokens: int) -> list[tuple[int, ...]]:
        """The shape of one document's part."""
        return [(self.depth, 2, self.heads, tokens, self.width)]

    def keep(self, parts):
        return parts

    def read(self, ids, mask) -> list[Parts]:
        """Read documents: ids, mask (B, L), padded on the right, where no token looks -> each one's part, float32 on the CPU."""
        both = torch.stack([torch.stack([layer.keys, layer.values]) for layer in self._caches(ids)]).float().cpu()
        return [[both[:, :, row, :, :length]] for row, length in enumerate(mask.sum(1).tolist())]

    def profile(self, states: list[Parts]) -> Profile:
        return [_mean_and_unit(torch.cat([part for (part,) in states], 3), 3, keepdim=True)]

    def room(self, lengths):
        room = torch.empty(self.depth, 2, len(lengths), self.heads, int(max(lengths)) + self.longest_query, self.width, dtype=self.dtype)
        for place, length in enumerate(lengths):
            room[:, :, place, :, length:].zero_()  # hidden by the mask, but NaN would show through
        return room, np.asarray(lengths)

    def parts_of(self, batch, place: int) -> Parts:
        room, lengths = batch
        return [room[:, :, place, :, : lengths[place]]]

    def ready(self, batch):
        room, lengths = batch
        return room.to(self.device), torch.as_tensor(lengths, device=self.device)

    def go_on(self, loaded, ids, mask):
        """Continue B documents with queries (B, L): hidden (B, L, D). Each query's positions go on from its own document's length."""
        room, lengths = loaded
        longest = int(lengths.max())
        seen = torch.arange(longest, device=self.device) < lengths[:, None]
        cache = DynamicCache(config=self.backbone.config)
        cache.layers = [_Held(room[layer], longest) for layer in range(self.depth)]
        return self.backbone(
            input_ids=ids,
            attention_mask=torch.cat([seen.to(mask.dtype), mask], 1),
            position_ids=lengths[:, None] + torch.arange(ids.shape[1], device=self.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


class _Held(DynamicLayer):
    """One layer's keys and values (2, B, H, room, width) of which `length` are read; the query's go behind them, nothing is copied."""

    def __init__(self, room: torch.Tensor, length: int):
        super().__init__()
        self.room, self.is_initialized, self.dtype, self.device = room, True, room.dtype, room.device
        self.keys, self.values = room[:, :, :, :length]

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self.room[0, :, :, start:end] = key_states
        self.room[1, :, :, start:end] = value_states
        return self.room[0, :, :, :end], self.room[1, :, :, :end]


def _mean_and_unit(values: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, and the square root of the standard deviation: midway between one error for all numbers and the same relative one."""
    spread, mean = torch.std_mean(values, dim, correction=0, keepdim=keepdim)
    return mean, torch.where(spread > 0, spread.sqrt(), 1.0)
