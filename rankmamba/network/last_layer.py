"""The last layer computes only what the head reads.

A reranker uses one token of the last layer's output. Everything in that layer that works token by token (projections of the
queries, the feed-forward network, a mixer's gate and output projection), and the attention or Mamba-2's scan of the other tokens, is
therefore skipped; the scores stay the same, and a sixth of a six-layer encoder's work is saved.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .native_attention import NATIVE, sdpa_mask

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
POOLED = "rankmamba_pooled_sdpa"  # the name by which Hugging Face finds this implementation of attention


class LastLayer:
    """Makes the token-wise parts and the attention (SDPA, also where our kernel serves the other layers) of a backbone's last layer skip
    every token but the pooled one, inside `only(positions)`.

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
            self._pooled_config._attn_implementation = POOLED
            self._attention.pooled_batch = self._batch

    @property
    def pools_attention(self) -> bool:
        """Whether the attention, too, computes only the pooled token: it must be SDPA or ours."""
        return self._attention is not None and self._config._attn_implementation in ("sdpa", NATIVE)

    @contextmanager
    def only(self, positions: torch.Tensor) -> Iterator[None]:
        """positions: int64 (B,), the token of each sequence whose output is needed."""
        if self._attention is not None:
            self._attention.config = self._pooled_config if self.pools_attention else self._config
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
        pooled = (hidden.flatten(0, -2)[rows] for hidden in inputs)
        return tuple(pooled if inputs[0].dim() == 2 else (hidden[:, None] for hidden in pooled))

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
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """SDPA for the token `module.pooled_batch.positions` (B,) of each sequence; at all others the output is 0.

    query: (B, heads, L, head size). key, value: the same with K >= L tokens, where the last L are those of the query.
    attention_mask: None, (B or 1, 1, L, K), or (B, K). Returns (B, L, heads, head size).
    """
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask = sdpa_mask(attention_mask, module.is_causal, query, key)
    if module.pooled_batch.positions is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, length, size = query.shape
    keys = key.shape[2]
    positions = module.pooled_batch.positions.view(-1, 1, 1, 1)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(batch, -1, length, -1)
        attention_mask = attention_mask.gather(2, positions.expand(-1, attention_mask.shape[1], 1, keys))
    elif module.is_causal:
        attention_mask = torch.arange(keys, device=query.device) <= positions + keys - length
    pooled = query.gather(2, positions.expand(-1, heads, 1, size))
    output, _ = sdpa_attention_forward(module, pooled, key, value, attention_mask, **kwargs)
    return output.new_zeros(batch, length, heads, size).scatter(1, positions.expand(-1, 1, heads, size), output), None


AttentionInterface.register(POOLED, pooled_attention)
