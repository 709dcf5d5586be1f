"""The last layer computes only what the head reads.

A reranker uses one token of the last layer's output. Everything in that layer that works token by token (projections of the
queries, the feed-forward network, a mixer's output projection) is therefore computed for that token alone; the scores stay the
same, and a sixth of a six-layer encoder's work goes away.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# For each type of backbone: its list of layers, and the linear maps in a layer whose output at other tokens is read by nobody.
BERT = ("encoder.layer", ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"))
TOKENWISE = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "gpt_neox": ("layers", ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    "mamba": ("layers", ("mixer.out_proj",)),
    "mamba2": ("layers", ("mixer.out_proj",)),
    "falcon_mamba": ("layers", ("mixer.out_proj",)),
}


class LastLayer:
    """Makes the token-wise maps of a backbone's last layer skip every token but the pooled one, inside `only(positions)`.

    Outside of it, with a backbone that is not in `TOKENWISE`, or while layers are recomputed for gradient checkpointing (when the
    positions of an earlier batch would be wrong), the backbone computes everything.
    """

    def __init__(self, backbone: nn.Module):
        self._positions, self._layer = None, None
        if backbone.config.model_type not in TOKENWISE:
            return
        layers, names = TOKENWISE[backbone.config.model_type]
        self._layer = backbone.get_submodule(layers)[-1]
        for name in names:
            module = self._layer.get_submodule(name)
            module.register_forward_pre_hook(self._take)
            module.register_forward_hook(self._put_back)

    @contextmanager
    def only(self, positions: torch.Tensor) -> Iterator[None]:
        """positions: int64 (B,), the token of each sequence whose output is needed."""
        if not getattr(self._layer, "gradient_checkpointing", False):
            self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _take(self, module: nn.Module, inputs: tuple[torch.Tensor]):
        if self._positions is None:
            return None
        (hidden,) = inputs
        self._length = hidden.shape[1]
        return (hidden[torch.arange(len(hidden), device=hidden.device), self._positions, None],)

    def _put_back(self, module: nn.Module, inputs, output: torch.Tensor):
        if self._positions is None:
            return None
        whole = output.new_zeros(len(output), self._length, output.shape[-1])
        whole[torch.arange(len(output), device=output.device), self._positions] = output[:, 0]
        return whole
