"""Mamba's scan and convolution with the native kernels, forward and backward."""

import math

import torch

from .. import portable
from ..gradients import once_differentiable
from ..precision import without_autocast
from .library import BLOCK, TAPS, TILE, Conv, Scan, as_plain, as_rows, call, empty, pointer, rows, tracked, workers


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.selective_scan`."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0 or A.numel() == 0:
        return portable.selective_scan(*tensors, return_final_state)
    if tracked(tensors):
        y, final_state = _SelectiveScan.apply(*tensors)
    else:
        y, final_state, _ = _scan_forward(*tensors, keep=False, want_final=return_final_state)
    return (y, final_state) if return_final_state else y


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        y, final_state, checkpoints = _scan_forward(*tensors, keep=True, want_final=True)
        ctx.save_for_backward(*tensors, checkpoints)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        *tensors, checkpoints = ctx.saved_tensors
        if dy is None and dfinal is None:
            return (None,) * len(tensors)
        return _scan_backward(*tensors, checkpoints, dy, dfinal)


def _workers(u, A):
    return workers(u.numel() * A.shape[1])


def _parts(sequences: int, blocks: int, threads: int) -> int:
    """Return into how many parts the blocks of channels are divided: one part reads B and C once, more keep all threads busy."""
    if sequences % threads == 0:
        return 1
    size = -(-blocks // min(blocks, -(-2 * threads // sequences)))
    return -(-blocks // size)  # none is empty


def _scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Return the C arguments and the tensors they point to."""
    alive = {"u": as_rows(u), "delta": as_rows(delta), "B": as_rows(B), "C": as_rows(C), "z": as_rows(z)}
    arguments = Scan(*u.shape, A.shape[1], groups=_parts(u.shape[0], -(-u.shape[2] // BLOCK), _workers(u, A)))
    for name, tensor in alive.items():
        setattr(arguments, name, rows(tensor))
    plain = {"A2": (A.detach().float() * math.log2(math.e)).t().contiguous()}
    plain |= {"D": as_plain(D), "delta_bias": as_plain(delta_bias), "initial": as_plain(initial_state)}
    for name, tensor in plain.items():
        setattr(arguments, name, pointer(tensor))
    return arguments, alive | plain


def _scan_forward(u, delta, A, B, C, D, z, delta_bias, initial_state, keep, want_final):
    """Return y, the final state and, for the backward pass, the state before each tile of tokens; None where not asked for."""
    arguments, alive = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    (batch, length, inner), n = u.shape, A.shape[1]
    y = empty(*u.shape, dtype=alive["u"].dtype)
    final_state = empty(batch, inner, n) if want_final else None
    checkpoints = empty(batch, -(-inner // BLOCK), -(-length // TILE), n, BLOCK) if keep else None
    arguments.y, arguments.final, arguments.checkpoints = rows(y), pointer(final_state), pointer(checkpoints)
    call("scan_forward", arguments, _workers(u, A))
    return y.to(u.dtype), final_state, checkpoints


@without_autocast
def _scan_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints, dy, dfinal):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    arguments, alive = _scan_arguments(*inputs)
    (batch, length, inner), n = u.shape, A.shape[1]
    groups = arguments.groups
    dy = torch.zeros_like(alive["u"]) if dy is None else as_rows(dy)
    dfinal = as_plain(dfinal)
    du, ddelta, dz = (None if t is None else empty(*t.shape, dtype=t.dtype) for t in (alive["u"], alive["delta"], alive["z"]))
    sums = {"dA": (batch, n, inner), "dD": (batch, inner), "ddelta_bias": (batch, inner)}
    sums |= {"dinitial": (batch, inner, n), "dB": (groups, batch, length, n), "dC": (groups, batch, length, n)}
    sums = {name: empty(*shape) for name, shape in sums.items()}
    arguments.checkpoints, arguments.dfinal = pointer(checkpoints), pointer(dfinal)
    arguments.dy, arguments.du, arguments.ddelta, arguments.dz = (rows(t) for t in (dy, du, ddelta, dz))
    for name, tensor in sums.items():
        setattr(arguments, name, pointer(tensor))
    call("scan_backward", arguments, _workers(u, A))
    dA, dD, dbias, dB, dC = (sums[name].sum(0) for name in ("dA", "dD", "ddelta_bias", "dB", "dC"))
    gradients = (du, ddelta, dA.t(), dB, dC, dD, dz, dbias, sums["dinitial"])
    return tuple(None if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True))


def causal_conv1d(x, weight, bias=None, initial_state=None, return_final_state=False, activation=None):
    """See `rankmamba.scan.causal_conv1d`."""
    tensors, silu = (x, weight, bias, initial_state), activation == "silu"
    if x.numel() == 0 or weight.shape[1] != TAPS:
        return portable.causal_conv1d(*tensors, return_final_state, activation)
    y = _CausalConv1d.apply(*tensors, silu) if tracked(tensors) else _conv_forward(*tensors, silu)
    if not return_final_state:
        return y
    batch, length, inner = x.shape
    kept = weight.shape[1] - 1
    if length >= kept:
        return y, x[:, length - kept :].clone()
    before = x.new_zeros(batch, kept, inner) if initial_state is None else initial_state.to(x.dtype)
    return y, torch.cat([before, x], 1)[:, length:]


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, silu):
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.silu = silu
        return _conv_forward(x, weight, bias, initial_state, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *conv_backward(*ctx.saved_tensors, ctx.silu, dy), None


def conv_arguments(x, weight, bias, initial_state, silu):
    """Return the C arguments and the tensors they point to."""
    alive = x, initial, weight_t, bias_f = as_rows(x), as_plain(initial_state), as_plain(weight.t()), as_plain(bias)
    arguments = Conv(*x.shape, silu)
    arguments.x, arguments.initial = rows(x), rows(initial)
    arguments.weight, arguments.bias = pointer(weight_t), pointer(bias_f)
    return arguments, alive


def conv_workers(arguments):
    return workers(arguments.batch * arguments.length * arguments.inner * TAPS)


def _conv_forward(x, weight, bias, initial_state, silu):
    arguments, alive = conv_arguments(x, weight, bias, initial_state, silu)
    y = empty(*x.shape, dtype=alive[0].dtype)
    arguments.y = rows(y)
    call("conv_forward", arguments, conv_workers(arguments))
    return y.to(x.dtype)


@without_autocast
def conv_backward(x, weight, bias, initial_state, silu, dy, dx=None):
    """Return the gradients of the first four. dx: where that of x is written to, if not to new memory."""
    arguments, alive = conv_arguments(x, weight, bias, initial_state, silu)
    batch, _, inner = x.shape
    dy, dx = as_rows(dy.to(alive[0].dtype)), empty(*x.shape, dtype=alive[0].dtype) if dx is None else dx
    dinitial = None if initial_state is None else empty(batch, TAPS - 1, inner)
    dweight, dbias = empty(batch, TAPS, inner), empty(batch, inner)
    arguments.dy, arguments.dx, arguments.dinitial = rows(dy), rows(dx), rows(dinitial)
    arguments.dweight, arguments.dbias = pointer(dweight), pointer(dbias)
    call("conv_backward", arguments, workers(2 * x.numel() * TAPS))
    gradients = (dx, dweight.sum(0).t(), dbias.sum(0), dinitial)
    inputs = (x, weight, bias, initial_state)
    return tuple(None if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True))
