"""A document's state by kind of backbone: how it is computed, what it consists of, how a query continues it.

`Recurrent` and `Attention` have the same attributes and methods:

fixed           whether a state has the same size whatever the document's length
kept, rest      the layers that are stored, and the profile whose means stand for the others; None for all layers
whole_shapes    the shapes of a one-token document's parts, all layers
shapes, numbers the shapes of what is stored of a document of so many tokens, and how many numbers that is
read            building: token ids of B documents -> each one's parts
profile         building: some documents' parts -> mean and unit of every number, which int8 and int4 are relative to
keep            building and scoring: of parts or a profile, the layers that are stored
room, parts_of  scoring: memory for a batch of states, and one document's parts in it, which a record is decoded into
ready           scoring: that batch on the device
go_on           scoring: the batch and B queries' token ids -> hidden states of the queries' tokens
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..backbones import family_of
from ..errors import InputError
from ..network.mixers import MambaState
from ..reranker import Reranker
from .encoding import Parts, Profile

ATTENTION = ("opt", "gpt_neox", "gpt2", "llama", "qwen2", "bloom", "gptj")  # families whose keys and values can be continued


def kind_of(reranker: Reranker, layers: Sequence[int] | None = None) -> "Recurrent | Attention":
    """Return what handles the states of a reranker's backbone; layers: those whose states are kept, None for all.

    Raises:
        InputError: the backbone is not causal, or not of a kind whose states are known.
    """
    if reranker.model.config.kind != "causal":
        raise InputError(
            f"expected a causal backbone, got the {reranker.model.config.kind} {reranker.model.config.system!r}: "
            "its reading of the document depends on the query, so nothing can be stored beforehand"
        )
    if family_of(reranker.model.backbone.config).hybrid:
        raise InputError(f"expected a backbone with layers of one kind, got the hybrid {reranker.model.config.system!r}")
    with reranker.scoring():  # both try the backbone, and flash attention takes no float32
        return (Recurrent if reranker.has_scan else Attention)(reranker, layers)


class Recurrent:
    """Mamba, FalconMamba and Mamba-2: conv (layers, K-1, W) and ssm (layers, E, N) or (layers, H, P, N), whatever the length."""

    fixed = True

    @torch.no_grad()
    def __init__(self, reranker: Reranker, layers: Sequence[int] | None):
        self.backbone, self.device, self.kept = reranker.model.backbone, reranker.device, None
        probe = MambaState()
        self.backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), cache=probe, use_cache=False)
        try:
            one = probe.after
        except InputError:
            one = None
        depth = self.backbone.config.num_hidden_layers
        if one is None or len(one.ssm) != depth:
            raise InputError(f"expected Mamba mixers in all {depth} layers, got others in {type(self.backbone).__name__}")
        self.whole_shapes = [tuple(one.conv[:, 0].shape), tuple(one.ssm[:, 0].shape)]
        self.rest: Profile | None = None  # its means are where the layers that were not kept start
        if layers is not None:
            self.kept = sorted({int(layer) for layer in layers})
            if not self.kept or not set(self.kept) <= set(range(depth)):
                raise InputError(f"expected layers from 0 to {depth - 1}, got {list(layers)}")

    def shapes(self, tokens: int) -> list[tuple[int, ...]]:
        """The shapes of what is kept of one document."""
        return [(len(self.kept or range(shape[0])), *shape[1:]) for shape in self.whole_shapes]

    def numbers(self, tokens: int) -> int:
        """How many numbers are kept of one document."""
        return sum(int(np.prod(shape)) for shape in self.shapes(tokens))

    def keep(self, parts):
        """Return those parts, or pairs of a profile, whose layers are kept."""
        if self.kept is None:
            return parts
        return [tuple(t[self.kept] for t in part) if isinstance(part, tuple) else part[self.kept] for part in parts]

    def read(self, ids, mask) -> list[Parts]:
        """Read documents: ids, mask (B, L) -> each one's parts of all layers, float32 on the CPU."""
        state = MambaState()
        self.backbone(input_ids=ids, attention_mask=mask, cache=state, use_cache=False)
        after = state.after
        parts = [part.float().cpu() for part in (after.conv, after.ssm)]
        return [[part[:, row] for part in parts] for row in range(len(ids))]

    def profile(self, states: list[Parts]) -> Profile:
        """Mean and unit of every number, over some documents' parts."""
        return [_mean_and_unit(torch.stack(parts), 0) for parts in zip(*states, strict=True)]

    def room(self, lengths) -> list[torch.Tensor]:
        """Memory for the kept layers of B documents: conv (layers, B, K-1, W), ssm (layers, B, E, N) or (layers, B, H, P, N)."""
        return [torch.empty(shape[0], len(lengths), *shape[1:], dtype=torch.float32, device="cpu") for shape in self.shapes(1)]

    def parts_of(self, batch, place: int) -> Parts:
        """The parts of one document in a batch, as views."""
        return [part[:, place] for part in batch]

    def ready(self, batch) -> MambaState:
        """Put a batch on the device; layers that were not kept start from the profile's means."""
        if self.kept is not None:
            means = [mean[:, None].repeat_interleave(part.shape[1], 1) for (mean, _), part in zip(self.rest, batch, strict=True)]
            batch = [mean.index_copy_(0, torch.tensor(self.kept), part) for mean, part in zip(means, batch, strict=True)]
        return MambaState(*(part.to(self.device) for part in batch), record=False)

    def go_on(self, state, ids, mask):
        """Continue B states with queries (B, L): hidden (B, L, D). Nothing after a query is read, so padding needs no mask."""
        return self.backbone(input_ids=ids, cache=state, use_cache=False).last_hidden_state


class Attention:
    """GPT-NeoX, OPT, GPT-2, Llama and the like: keys and values of every token, (layers, 2, H, L, head width)."""

    fixed, kept, rest = False, None, None

    @torch.no_grad()
    def __init__(self, reranker: Reranker, layers: Sequence[int] | None):
        self.backbone, self.device = reranker.model.backbone, reranker.device
        weights = next(self.backbone.parameters()).dtype
        self.dtype = reranker.dtype if weights == torch.float32 else weights  # of keys and values: autocast casts float32 alone
        self.longest_query = reranker.inputs.max_query_length
        if layers is not None:
            raise InputError(
                f"expected a Mamba backbone to keep only some layers of, got {type(self.backbone).__name__}; leave it out"
            )
        config = self.backbone.config
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        if config.model_type not in ATTENTION or rope == "longrope":
            raise InputError(
                f"expected a backbone whose attention goes by positions alone ({', '.join(ATTENTION)}), got {config.model_type!r}"
                f"{' with longrope' if rope == 'longrope' else ''}: the states of some others count places in the cache, so a score "
                "would depend on the documents beside it"
            )
        one = self._caches(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        self.depth, _, _, self.heads, _, self.width = torch.stack([torch.stack([c.keys, c.values]) for c in one]).shape

    def _caches(self, ids) -> list:
        cache = DynamicCache(config=self.backbone.config)
        self.backbone(input_ids=ids, cache=cache, use_cache=True)
        layers = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.get_seq_length() == ids.shape[1]]
        shapes = {(layer.keys.shape, layer.values.shape) for layer in layers}
        if len(layers) != self.backbone.config.num_hidden_layers or len({shape for both in shapes for shape in both}) != 1:
            raise InputError(
                f"expected a backbone with the same full attention in all layers, got {type(self.backbone).__name__}"
            )
        return layers

    @property
    def whole_shapes(self) -> list[tuple[int, ...]]:
        """The shape of the part of a document of one token, which is also that of the profile."""
        return self.shapes(1)

    def shapes(self, tokens: int) -> list[tuple[int, ...]]:
        """The shape of one document's part."""
        return [(self.depth, 2, self.heads, tokens, self.width)]

    def numbers(self, tokens: int) -> int:
        """How many numbers one document's part has."""
        return int(np.prod(self.shapes(tokens)[0]))

    def keep(self, parts):
        """Return all parts: every layer is kept."""
        return parts

    def read(self, ids, mask) -> list[Parts]:
        """Read documents: ids, mask (B, L), padded on the right, which no token sees -> each one's part, float32 on the CPU."""
        both = torch.stack([torch.stack([layer.keys, layer.values]) for layer in self._caches(ids)]).float().cpu()
        return [[both[:, :, row, :, :length]] for row, length in enumerate(mask.sum(1).tolist())]

    def profile(self, states: list[Parts]) -> Profile:
        """Mean and unit of every number of a token, over all tokens of some documents."""
        return [_mean_and_unit(torch.cat([part for (part,) in states], 3), 3, keepdim=True)]

    @torch.inference_mode(False)  # what is held in it may be written to outside
    def room(self, lengths):
        """Memory for B documents and a query after each, (layers, 2, B, H, longest document + longest query, width), and the lengths."""
        room = torch.empty(
            *(self.depth, 2, len(lengths), self.heads, int(max(lengths)) + self.longest_query, self.width),
            dtype=self.dtype,
            device="cpu",
        )
        for place, length in enumerate(lengths):
            room[:, :, place, :, length:].zero_()  # hidden by the mask, but a NaN there would still spread
        return room, np.asarray(lengths)

    def parts_of(self, batch, place: int) -> Parts:
        """The part of one document in a batch, as a view."""
        room, lengths = batch
        return [room[:, :, place, :, : lengths[place]]]

    def ready(self, batch):
        """Put a batch on the device."""
        room, lengths = batch
        return room.to(self.device), torch.as_tensor(lengths, device=self.device)

    def go_on(self, loaded, ids, mask):
        """Continue B documents with queries (B, L): hidden (B, L, D). Positions go on from each document's length."""
        room, lengths = loaded
        longest = int(lengths.max())
        seen = torch.arange(longest, device=self.device) < lengths[:, None]
        cache = DynamicCache(config=self.backbone.config)
        cache.layers = [_Held(room[layer], longest) for layer in range(self.depth)]
        return self.backbone(
            input_ids=ids,
            attention_mask=torch.cat([seen.to(mask.dtype), mask], 1),
            position_ids=lengths[:, None] + torch.arange(ids.shape[1], device=self.device),
            cache=cache,
            use_cache=True,
        ).last_hidden_state


class _Held(DynamicLayer):
    """One layer's keys and values (2, B, H, room, width), `length` of them in use; the query's go after these, nothing is copied."""

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
    """The mean, and as unit the square root of the standard deviation: midway between equal absolute and equal relative errors."""
    spread, mean = torch.std_mean(values, dim, correction=0, keepdim=keepdim)
    return mean, torch.where(spread > 0, spread.sqrt(), 1.0)
