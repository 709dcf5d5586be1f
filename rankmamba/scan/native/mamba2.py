"""Mamba-2's scan on the native kernels (arXiv 2405.21060, section 6)."""

import math
from ctypes import addressof

import torch

from .. import portable
from ..gradients import once_differentiable
from ..precision import without_autocast
from .library import SsdBackward, SsdForward, as_plain, as_rows, call, empty, in_memory, pointer, rows, tracked, workers
from .mamba import conv_workers
from .norm import norm_workers


def _chunk(length: int, n: int) -> int:
    """Tokens of a chunk. Longer chunks mean more work on pairs of tokens, shorter ones more work on states between them; a short
    sequence is one chunk."""
    return length if length <= max(64, min(2 * n, 256)) else 64


def ssd_scan(x, delta, A, B, C, D=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.ssd_scan`."""
    tensors = (x, delta, A, B, C, D, initial_state)
    if x.numel() == 0 or B.numel() == 0:
        return portable.ssd_scan(*tensors, return_final_state)
    if tracked(tensors):
        y, final_state = _SsdScan.apply(*tensors, return_final_state)
    else:
        y, final_state, _ = ssd_forward(*tensors, return_final_state)
        y = y.to(x.dtype)
    y = y.unflatten(2, x.shape[2:])
    return (y, final_state) if return_final_state else y


class _SsdScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, final_state, before = ssd_forward(*inputs, want_before=True)
        *tensors, _ = inputs
        ctx.save_for_backward(*tensors, before)
        ctx.set_materialize_grads(False)
        return y.to(tensors[0].dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        *tensors, before = ctx.saved_tensors
        if dy is None and dfinal is None:
            return (None,) * 8
        gradients = ssd_backward(*tensors, before, dy, dfinal)
        return *(None if t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)), None


def _common(kernel, x, delta, A, B, C, D, initial_state):
    """Return the arguments that both directions share, and the tensors that they point to, which must stay alive."""
    batch, length, heads, width = x.shape
    groups, n = B.shape[2:]
    x = _rows(x)
    B, C = _rows(B.to(x.dtype)), _rows(C.to(x.dtype))
    delta, A, D, initial_state = map(as_plain, (delta, A, D, initial_state))
    A2 = A * math.log2(math.e)
    dealt = _parts(batch * groups, heads // groups, _workers(x, n))
    arguments = kernel(batch, length, heads, width, groups, n, _chunk(length, n), dealt, rows(x), rows(B), rows(C))
    _point(arguments, delta=delta, A2=A2, D=D, initial=initial_state)
    return arguments, (x, B, C, delta, A, A2, D, initial_state)


def _parts(sequences: int, heads: int, threads: int) -> int:
    """Return into how many parts the heads that share B and C are divided, so that the busiest thread has least to do: each part
    multiplies B and C anew, which takes as long as two heads. None is empty."""
    return min(range(1, heads + 1), key=lambda n: -(-sequences * n // threads) * (-(-heads // n) + 2))


def _point(arguments, **tensors):
    for name, tensor in tensors.items():
        setattr(arguments, name, pointer(tensor))


def _workers(x, n: int) -> int:
    """How many threads a call is worth."""
    return workers(x.numel() * (_chunk(x.shape[1], n) + 2 * n))


def _has_all_heads(arguments):
    """Whether an item of the scan has all channels of a token, so that it can make its inputs and norm its outputs as well."""
    return arguments.groups * arguments.parts == 1


def ssd_forward(x, delta, A, B, C, D, initial_state, want_final, want_before=False, y=None, conv=None, norm=None):
    """Return y (B, L, H P), the final state (B, H, P, N) or None, and the states that the chunks read, (c, B, H, N, P), or None.

    y: where it is written to, if not to new memory. conv, norm: the C arguments of the convolution that makes x, B and C, and of the norm
    of y, to be run as well.
    """
    batch, length, heads, width = x.shape
    arguments, alive = _common(SsdForward, x, delta, A, B, C, D, initial_state)
    reading = -(-length // arguments.chunk) - (initial_state is None)
    y = empty(batch, length, heads * width, dtype=alive[0].dtype) if y is None else y
    final = empty(batch, heads, width, arguments.n) if want_final else None
    before = empty(reading, batch, heads, arguments.n, width, dtype=y.dtype) if want_before else None
    arguments.y = rows(y)
    _point(arguments, final=final, before=before)
    apart = conv is not None and not _has_all_heads(arguments)
    if apart:
        call("conv_forward", conv, conv_workers(conv))
    elif conv is not None:
        arguments.conv, arguments.norm = addressof(conv), addressof(norm)
    call("ssd_forward", arguments, _workers(x, arguments.n))
    if apart:
        call("norm_forward", norm, norm_workers(norm))
    return y, final, before


@without_autocast
def ssd_backward(x, delta, A, B, C, D, initial_state, before, dy, dfinal, dx=None, norm=None):
    """Return the gradients of x, delta, A, B, C, D and the initial state. dy: (B, L, H P). dx: where the first one, (B, L, H P), is
    written to, if not to new memory. norm: the C arguments of the norm that makes dy, to be run as well."""
    arguments, alive = _common(SsdBackward, x, delta, A, B, C, D, initial_state)
    batch, length, heads, width = x.shape
    dy, dfinal = torch.zeros_like(alive[0]) if dy is None else as_rows(dy.to(alive[0].dtype)), as_plain(dfinal)
    dx = empty(*alive[0].shape, dtype=alive[0].dtype) if dx is None else dx
    ddelta = empty(batch, length, heads)
    dA, dD = empty(2, batch, heads)
    dB, dC = empty(2, arguments.parts, *B.shape)
    dinitial = None if initial_state is None else empty(*initial_state.shape)
    arguments.dy, arguments.dx = rows(dy), rows(dx)
    _point(arguments, A=alive[4], before=before, dfinal=dfinal, dinitial=dinitial, ddelta=ddelta, dA=dA, dD=dD, dB=dB, dC=dC)
    if norm is not None and _has_all_heads(arguments):
        arguments.norm = addressof(norm)
    elif norm is not None:
        call("norm_backward", norm, norm_workers(norm))
    call("ssd_backward", arguments, _workers(x, arguments.n))
    return dx.unflatten(2, (heads, width)), ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dinitial


def _rows(x):
    """(B, L, H, P) -> (B, L, H P), a view where the channels of a token are contiguous."""
    x = in_memory(x)
    together = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return as_rows(x.flatten(2) if together else x.contiguous().flatten(2))
