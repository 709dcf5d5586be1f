"""The last layer computes only what the head reads.

A reranker uses one token of the last layer's output. Everything in that layer that works token by token (projections of the
queries, the feed-forward network, a mixer's gate and output projection), and the attention or Mamba-2's scan of the other tokens, is
therefore skipped; the scores stay the same, and a sixth of a six-layer encoder's work is saved.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .native_attention import NATIVE, POOLED_NATIVE, native_attention

# For each type of backbone: its list of layers, its attention, and the parts of a layer that work token by token and whose output at
# other tokens nobody reads: a module, or a span from one (its inputs are cut) to another (its output is filled up), "" being the layer
# itself. Neither end of such a span is a linear map: an adapter would wrap it and see only half of this.
BERT = ("encoder.layer", "attention.self", ("attention.self.query", ("attention.output", "")))
MAMBA = ("layers", None, ())  # its mixers compute one token's output themselves
TOKENWISE = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "gpt_neox": ("layers", "attention", ("attention.dense", "mlp")),
    # unlike its queries, OPT's keys and values are read from every token
    "opt": ("decoder.layers", "self_attn", ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")),
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "falcon_mamba": MAMBA,
    "nemotron_h": MAMBA,
}
# implementation of attention -> the name by which Hugging Face finds the same for the pooled token
POOLED = {"sdpa": "rankmamba_pooled_sdpa", NATIVE: POOLED_NATIVE}


class LastLayer:
    """Makes the token-wise parts and the attention (SDPA or ours) of a backbone's last layer skip every token but the pooled one, inside
    `only(positions)`.

    Outside of it, with a backbone that is not in `TOKENWISE`, or while layers are recomputed for gradient checkpointing (when the
    positions of an earlier batch would be wrong), the backbone computes everything. Threads may share the backbone: each has its
    own positions.
    """

    def __init__(self, backbone: nn.Module):
        self._batch, self._layer, self._attention = _Batch(), None, None
        if backbone.config.model_type not in TOKENWISE:
            return
        layers, attention, parts = TOKENWISE[backbone.config.model_type]
        self._layer = backbone.get_submodule(layers)[-1]
        modules = dict(self._layer.named_modules())
        for part in parts:
            first, last = (part, part) if isinstance(part, str) else part
            if first in modules:  # a hybrid's last layer may be of another kind
                modules[first].register_forward_pre_hook(self._take)
                modules[last].register_forward_hook(self._put_back)
        if "mixer" in modules:
            modules["mixer"].pooled_batch = self._batch
        self._attention = modules.get(attention)
        if self._attention is not None:
            self._config, self._pooled_config = self._attention.config, copy.copy(self._attention.config)
            self._attention.pooled_batch = self._batch

    @property
    def pools_attention(self) -> bool:
        """Whether the attention, too, computes only the pooled token: it must be SDPA or ours."""
        return self._attention is not None and self._config._attn_implementation in POOLED

    @contextmanager
    def only(self, positions: torch.Tensor) -> Iterator[None]:
        """positions: int64 (B,), the token of each sequence whose output is needed."""
        if self.pools_attention:
            self._pooled_config._attn_implementation = POOLED[self._config._attn_implementation]
            self._attention.config = self._pooled_config
        elif self._attention is not None:
            self._attention.config = self._config
        if not getattr(self._layer, "gradient_checkpointing", False):
            self._batch.positions = positions
        try:
            yield
        finally:
            self._batch.positions = None

    def _take(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]):
        if self._batch.positions is None:
            return None
        self._batch.shape = inputs[0].shape[:-1]  # (B, L), or (B L,) where a family flattens its tokens
        rows = self._rows(inputs[0])
        return tuple(hidden.flatten(0, -2)[rows] for hidden in inputs)

    def _put_back(self, module: nn.Module, inputs, output: torch.Tensor):
        if self._batch.positions is None:
            return None
        whole = output.new_zeros(*self._batch.shape, output.shape[-1])
        whole.view(-1, output.shape[-1])[self._rows(whole)] = output.flatten(0, -2)
        return whole

    def _rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """The place of each pooled token among all tokens."""
        positions, tokens = self._batch.positions, hidden.shape[:-1].numel()
        return torch.arange(len(positions), device=hidden.device) * (tokens // len(positions)) + positions


class _Batch(threading.local):
    """What a thread is computing: the positions (B,) that are needed, None for all, and the shape of the inputs that were cut."""

    positions, shape = None, None

    def __reduce__(self):
        return _Batch, ()  # a copy of a model computes nothing yet


def pooled_attention(
    attend: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`attend` for the token `module.pooled_batch.positions` (B,) of each sequence; at all others the output is 0.

    query: (B, heads, L, head size). key, value: the same with K >= L tokens, where the last L are those of the query.
    attention_mask: None, (B or 1, 1, L, K) or, where `attend` takes it, (B, K). Returns (B, L, heads, head size).
    """
    positions = module.pooled_batch.positions
    if positions is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    batch, heads, length, size = query.shape
    keys = key.shape[2]
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = _rows_at(attention_mask.expand(batch, -1, length, -1), positions)
    elif module.is_causal:
        before = torch.arange(keys, device=query.device) <= positions[:, None] + keys - length
        attention_mask = before if attention_mask is None else before & attention_mask.bool()
        if attend is sdpa_attention_forward:
            attention_mask = attention_mask[:, None, None]
    kwargs["is_causal"] = False
    if "rotary" in kwargs:  # of the queries, then of the keys
        turns = [_rows_at(part.expand(batch, -1, -1)[:, None], positions)[:, 0] for part in kwargs["rotary"][:2]]
        kwargs["rotary"] = *turns, *kwargs["rotary"][2:]
    output, _ = attend(module, _rows_at(query, positions), key, value, attention_mask, **kwargs)
    places = positions.view(-1, 1, 1, 1).expand(-1, 1, heads, size)
    return output.new_zeros(batch, length, heads, size).scatter(1, places, output), None


def _rows_at(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, heads, L, W) and (B,) -> (B, heads, 1, W)."""
    return tensor.gather(2, positions.view(-1, 1, 1, 1).expand(-1, tensor.shape[1], 1, tensor.shape[3]))


for _name, _attend in (("sdpa", sdpa_attention_forward), (NATIVE, native_attention)):
    AttentionInterface.register(POOLED[_name], functools.partial(pooled_attention, _attend))
