"""Attention on the native kernels, forward and backward."""

import torch
from torch.autograd.function import once_differentiable

from ..precision import without_autocast
from .library import Attention, as_plain, as_rows, call, empty, pointer, rows, tracked, workers


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(query key^T scale + bias) value: (B, L, H, P), in the precision of the values.

    query: float32 or bfloat16 (B, H, L, P). key, value: likewise, (B, H or a divisor of it, K, P). seen: (B, K), false or 0 where a
    key is hidden. causal: the last query sees all keys, each before it one less. A query that sees no key gets zeros. bias: (1, H, L, K);
    gets no gradient.
    """
    hidden = None if seen is None else as_plain(torch.where(seen.bool(), 0.0, -torch.inf))
    if bias is not None:
        bias = as_plain(bias.expand(1, *query.shape[1:3], key.shape[2]))
    run = _Attention.apply if tracked((query, key, value)) else _forward
    return run(query, key, value, hidden, bias, causal, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, hidden, bias, causal, scale):
        ctx.save_for_backward(query, key, value, hidden, bias)
        ctx.options = causal, scale
        return _forward(query, key, value, hidden, bias, causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *_backward(*ctx.saved_tensors, *ctx.options, dout), None, None, None, None


def _arguments(query, key, value, hidden, bias, causal, scale):
    """Return the C arguments and the tensors they point to."""
    (batch, heads, length, width), (_, shared, keys, _) = query.shape, key.shape
    alive = *(as_rows(t) for t in (query, key, value)), hidden, bias
    arguments = Attention(batch, heads, width, length, keys, heads // shared, causal, scale)
    for name, tensor in zip("qkv", alive, strict=False):
        setattr(arguments, name, rows(tensor.transpose(1, 2)))
        setattr(arguments, f"{name}_head", tensor.stride(1))
    arguments.hidden, arguments.bias = pointer(hidden), pointer(bias)
    return arguments, alive


def _products(query, key):
    """Multiplications in one of the matrix products."""
    return query.numel() * key.shape[2]


def _forward(query, key, value, hidden, bias, causal, scale):
    batch, heads, length, width = query.shape
    arguments, alive = _arguments(query, key, value, hidden, bias, causal, scale)
    out = empty(batch, length, heads * width, dtype=alive[2].dtype)
    arguments.out = rows(out)
    call("attention", arguments, workers(2 * _products(query, key)))
    return out.view(batch, length, heads, width)


@without_autocast
def _backward(query, key, value, hidden, bias, causal, scale, dout):
    arguments, alive = _arguments(query, key, value, hidden, bias, causal, scale)
    dout = as_rows(dout)
    gradients = [empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3], dtype=t.dtype) for t in alive[:3]]
    arguments.dout, arguments.dout_head = rows(dout), dout.stride(2)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        setattr(arguments, name, rows(gradient.flatten(2)))
    call("attention_backward", arguments, workers(5 * _products(query, key)))
    return [gradient.transpose(1, 2) for gradient in gradients]
