"""Bias, residual and LayerNorm, for scoring, on the native kernels."""

import torch

from .library import AddNorm, as_plain, as_rows, call, empty, pointer, rows, workers


def add_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """layer_norm(x + bias + residual) * weight + shift, without gradients, in the residual's precision. May overwrite x.

    x, residual: float32 or bfloat16 (T, E), the channels of x contiguous. bias, weight, shift: (E,).
    """
    bias, weight, shift, residual = *(as_plain(t) for t in (bias, weight, shift)), as_rows(residual)
    out = x if x.dtype == residual.dtype else empty(*x.shape, dtype=residual.dtype)
    matrices = (rows(t[None]) for t in (x, residual, out))
    call("add_norm", AddNorm(*x.shape, epsilon, *matrices, *(pointer(t) for t in (bias, weight, shift))), workers(8 * x.numel()))
    return out
