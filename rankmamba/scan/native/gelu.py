"""Bias and GELU on the native kernels."""

import torch

from ..gradients import once_differentiable
from ..precision import without_autocast
from .library import ITEM_ROWS, Gelu, as_plain, as_rows, call, empty, pointer, rows, tracked, workers


def gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """gelu(x + bias); in place of x where no gradient is needed. x: float32 or bfloat16 (T, E), channels contiguous. bias: (E,)."""
    return _Gelu.apply(x, bias) if tracked((x, bias)) else _forward(x, bias, x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return _forward(x, bias, empty(*x.shape, dtype=x.dtype))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dy, dx, dbias = as_rows(dy), empty(*x.shape, dtype=x.dtype), empty(-(-len(x) // ITEM_ROWS), x.shape[1])
        arguments, alive = _arguments(x, bias)
        arguments.dy, arguments.dx, arguments.dbias = rows(dy[None]), rows(dx[None]), pointer(dbias)
        call("gelu_backward", arguments, workers(16 * x.numel()))
        return dx, None if bias is None else dbias.sum(0).to(bias.dtype)


def _arguments(x, bias):
    """Return the C arguments and the tensors they point to."""
    alive = x, as_plain(bias)
    return Gelu(*x.shape, rows(x[None]), bias=pointer(alive[1])), alive


def _forward(x, bias, out):
    arguments, alive = _arguments(x, bias)
    arguments.y = rows(out[None])
    call("gelu_forward", arguments, workers(8 * x.numel()))
    return out
