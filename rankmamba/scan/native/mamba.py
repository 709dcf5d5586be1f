"""Mamba's scan and convolution with the native kernels, forward and backward."""

import ctypes
import math

import torch
from torch.autograd.function import once_differentiable

from .. import portable
from .library import BLOCK, TILE, Conv, Scan, as_rows, library, plain, pointer, rows, threads, tracked


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
        gradients = _scan_backward(*tensors, checkpoints, dy, dfinal)
        return tuple(
            gradient if needed and tensor is not None else None
            for gradient, needed, tensor in zip(gradients, ctx.needs_input_grad, tensors, strict=True)
        )


def _scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """Return the C arguments, the tensors that must outlive the call, and (B, L, E, N)."""
    sizes = (*u.shape, A.shape[1])
    keep = {"u": as_rows(u), "delta": as_rows(delta), "B": as_rows(B), "C": as_rows(C), "z": as_rows(z)}
    keep["A2"] = (A.detach().float() * math.log2(math.e)).t().contiguous()
    keep |= {"D": plain(D), "delta_bias": plain(delta_bias), "initial": plain(initial_state)}
    arguments = Scan(*sizes)
    for name in ("u", "delta", "B", "C", "z"):
        setattr(arguments, name, rows(keep[name]))
    for name in ("A2", "D", "delta_bias", "initial"):
        setattr(arguments, name, pointer(keep[name]))
    return arguments, keep, sizes


def _scan_forward(*tensors, keep, want_final):
    arguments, alive, (batch, length, inner, n) = _scan_arguments(*tensors)
    y = torch.empty(batch, length, inner, dtype=alive["u"].dtype)
    final_state = torch.empty(batch, inner, n) if want_final else None
    blocks, tiles = -(-inner // BLOCK), -(-length // TILE)
    checkpoints = torch.empty(batch, blocks, tiles, n, BLOCK) if keep else None
    arguments.y, arguments.final, arguments.checkpoints = rows(y), pointer(final_state), pointer(checkpoints)
    library.rankmamba_scan_forward(ctypes.byref(arguments), threads(batch * length * inner * n))
    return y.to(tensors[0].dtype), final_state, checkpoints


def _scan_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints, dy, dfinal):
    arguments, alive, (batch, length, inner, n) = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    workers = threads(batch * length * inner * n)
    blocks = -(-inner // BLOCK)
    groups = 1 if batch % workers == 0 else min(blocks, -(-4 * workers // batch))
    dy = torch.zeros_like(alive["u"]) if dy is None else as_rows(dy)
    dfinal = plain(dfinal)
    du, ddelta, dz = (None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (alive["u"], alive["delta"], alive["z"]))
    dinitial, dA = torch.empty(batch, inner, n), torch.empty(batch, n, inner)
    dD, dbias = torch.empty(batch, inner), torch.empty(batch, inner)
    dB, dC = torch.empty(groups, batch, length, n), torch.empty(groups, batch, length, n)
    arguments.checkpoints, arguments.groups = pointer(checkpoints), groups
    arguments.dy, arguments.du, arguments.ddelta, arguments.dz = (rows(t) for t in (dy, du, ddelta, dz))
    for name, tensor in {
        "dfinal": dfinal, "dinitial": dinitial, "dA": dA, "dD": dD, "ddelta_bias": dbias, "dB": dB, "dC": dC,
    }.items():  # fmt: skip
        setattr(arguments, name, pointer(tensor))
    library.rankmamba_scan_backward(ctypes.byref(arguments), workers)
    gradients = (du, ddelta, dA.sum(0).t(), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0), dinitial)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [None if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)]


def causal_conv1d(x, weight, bias=None, initial_state=None, return_final_state=False, activation=None):
    """See `rankmamba.scan.causal_conv1d`."""
    tensors, silu = (x, weight, bias, initial_state), activation == "silu"
    if x.numel() == 0:
        return portable.causal_conv1d(*tensors, return_final_state, activation)
    y = _CausalConv1d.apply(*tensors, silu) if tracked(tensors) else _conv_forward(*tensors, silu)
    if not return_final_state:
        return y
    batch, length, inner = x.shape
    past = weight.shape[1] - 1
    if length < past:
        before = x.new_zeros(batch, past, inner) if initial_state is None else initial_state.to(x.dtype)
        return y, torch.cat([before, x], 1)[:, length:]
    return y, x[:, length - past :].clone()


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, silu):
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.silu = silu
        return _conv_forward(x, weight, bias, initial_state, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tensors = ctx.saved_tensors
        gradients = _conv_backward(*tensors, ctx.silu, dy)
        return *(None if t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)), None


def _conv_arguments(x, weight, bias, initial_state, silu):
    keep = {"x": as_rows(x), "initial": as_rows(initial_state)}
    keep |= {"weight": weight.detach().float().t().contiguous(), "bias": plain(bias)}
    arguments = Conv(*x.shape, weight.shape[1], silu)
    arguments.x, arguments.initial = rows(keep["x"]), rows(keep["initial"])
    arguments.weight, arguments.bias = pointer(keep["weight"]), pointer(keep["bias"])
    return arguments, keep


def _conv_forward(x, weight, bias, initial_state, silu):
    arguments, alive = _conv_arguments(x, weight, bias, initial_state, silu)
    y = torch.empty(x.shape, dtype=alive["x"].dtype)
    arguments.y = rows(y)
    library.rankmamba_conv_forward(ctypes.byref(arguments), threads(x.numel() * 4))
    return y.to(x.dtype)


def _conv_backward(x, weight, bias, initial_state, silu, dy):
    arguments, alive = _conv_arguments(x, weight, bias, initial_state, silu)
    batch, _, inner = x.shape
    taps = weight.shape[1]
    dy, dx = as_rows(dy), torch.empty(x.shape, dtype=alive["x"].dtype)
    dinitial, dweight, dbias = torch.empty(batch, taps - 1, inner), torch.empty(batch, taps, inner), torch.empty(batch, inner)
    arguments.dy, arguments.dx, arguments.dinitial = rows(dy), rows(dx), rows(dinitial)
    arguments.dweight, arguments.dbias = pointer(dweight), pointer(dbias)
    library.rankmamba_conv_backward(ctypes.byref(arguments), threads(x.numel() * 8))
    return dx, dweight.sum(0).t(), dbias.sum(0), dinitial
