"""Attention for scoring, on the native kernels."""

import torch

from .library import Attention, as_plain, call, empty, pointer, rows, workers


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(query key^T scale + bias) value, without gradients: (B, L, H, P), in the precision of the values.

    query: float32 or bfloat16 (B, H, L, P). key, value: either, too, (B, H or a divisor of it, K, P). seen: (B, K), false or 0 where nobody looks.
    causal: the last query sees all keys, each before it one less. Every query must see a key. bias: (1, H, L, K).
    """
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, length, width = query.shape
    keys = key.shape[2]
    out = empty(batch, length, heads * width, dtype=value.dtype)
    hidden = None if seen is None else as_plain(torch.where(seen.bool(), 0.0, -torch.inf))
    bias = None if bias is None else as_plain(bias.expand(1, heads, length, keys))
    arguments = Attention(
        batch,
        heads,
        width,
        length,
        keys,
        heads // key.shape[1],
        causal,
        scale,
        *(rows(t.transpose(1, 2)) for t in (query, key, value)),
        rows(out),
        query.stride(1),
        key.stride(1),
        value.stride(1),
        pointer(hidden),
        pointer(bias),
    )
    call("attention", arguments, workers(2 * batch * heads * length * keys * width))
    return out.view(batch, length, heads, width)
