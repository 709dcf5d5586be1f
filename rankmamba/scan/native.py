"""The native CPU kernels: C++ without Python or torch in it, loaded with ctypes, called with pointers to torch's memory.

Importing this module loads the library and raises ImportError where it was not built. No compiler is needed at run time.
"""

import ctypes
import math
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from . import portable

_SMALL = 1 << 18  # (token, channel, state) triples, about 60 microseconds: less is not worth another thread


class _Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64), ("bfloat16", c_int64)]


def _structure(name, **kinds):
    """A C struct from one string of member names per kind, in the order given."""
    fields = [(member, kind) for members, kind in kinds.values() for member in members.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# As in native/kernels.h.
_Scan = _structure(
    "_Scan",
    sizes=("batch length inner states", c_int64),
    rows=("u delta B C z", _Rows),
    plain=("A2 D delta_bias initial", c_void_p),
    out=("y", _Rows),
    states=("final checkpoints", c_void_p),
    groups=("groups", c_int64),
    gradients=("dy du ddelta dz", _Rows),
    sums=("dfinal dinitial dA dD ddelta_bias dB dC", c_void_p),
)


def _load():
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        raise ImportError("no compiled library beside rankmamba/scan/native.py")
    library = ctypes.CDLL(str(found[0]))
    library.rankmamba_build.restype = ctypes.c_char_p
    # torch's own pool of threads, where it has one that can be shared: two pools would fight for the cores.
    gomp = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    library.rankmamba_use_gomp(ctypes.cast(gomp, c_void_p) if gomp else None)
    return library


_library = _load()
_BLOCK, _TILE = _library.rankmamba_block(), _library.rankmamba_tile()


def description() -> str:
    """Say which build of the kernels this processor runs."""
    return f"compiled kernels, {_library.rankmamba_build().decode()} build"


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.selective_scan`."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0 or A.numel() == 0:
        return portable.selective_scan(*tensors, return_final_state)
    if _tracked(tensors):
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
    keep = {"u": _activation(u), "delta": _activation(delta), "B": _activation(B), "C": _activation(C), "z": _activation(z)}
    keep["A2"] = (A.detach().float() * math.log2(math.e)).t().contiguous()
    keep |= {"D": _plain(D), "delta_bias": _plain(delta_bias), "initial": _plain(initial_state)}
    arguments = _Scan(*sizes)
    for name in ("u", "delta", "B", "C", "z"):
        setattr(arguments, name, _rows(keep[name]))
    for name in ("A2", "D", "delta_bias", "initial"):
        setattr(arguments, name, _pointer(keep[name]))
    return arguments, keep, sizes


def _scan_forward(*tensors, keep, want_final):
    arguments, alive, (batch, length, inner, n) = _scan_arguments(*tensors)
    y = torch.empty(batch, length, inner, dtype=alive["u"].dtype)
    final_state = torch.empty(batch, inner, n) if want_final else None
    blocks, tiles = -(-inner // _BLOCK), -(-length // _TILE)
    checkpoints = torch.empty(batch, blocks, tiles, n, _BLOCK) if keep else None
    arguments.y, arguments.final, arguments.checkpoints = _rows(y), _pointer(final_state), _pointer(checkpoints)
    _library.rankmamba_scan_forward(ctypes.byref(arguments), _threads(batch * length * inner * n))
    return y.to(tensors[0].dtype), final_state, checkpoints


def _scan_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints, dy, dfinal):
    arguments, alive, (batch, length, inner, n) = _scan_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state)
    threads = _threads(batch * length * inner * n)
    blocks = -(-inner // _BLOCK)
    groups = 1 if batch % threads == 0 else min(blocks, -(-4 * threads // batch))
    dy = torch.zeros_like(alive["u"]) if dy is None else _activation(dy)
    dfinal = _plain(dfinal)
    du, ddelta, dz = (None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (alive["u"], alive["delta"], alive["z"]))
    dinitial, dA = torch.empty(batch, inner, n), torch.empty(batch, n, inner)
    dD, dbias = torch.empty(batch, inner), torch.empty(batch, inner)
    dB, dC = torch.empty(groups, batch, length, n), torch.empty(groups, batch, length, n)
    arguments.checkpoints, arguments.groups = _pointer(checkpoints), groups
    arguments.dy, arguments.du, arguments.ddelta, arguments.dz = (_rows(t) for t in (dy, du, ddelta, dz))
    for name, tensor in {
        "dfinal": dfinal, "dinitial": dinitial, "dA": dA, "dD": dD, "ddelta_bias": dbias, "dB": dB, "dC": dC,
    }.items():  # fmt: skip
        setattr(arguments, name, _pointer(tensor))
    _library.rankmamba_scan_backward(ctypes.byref(arguments), threads)
    gradients = (du, ddelta, dA.sum(0).t(), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0), dinitial)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [None if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)]


def causal_conv1d(x, weight, bias=None, initial_state=None, return_final_state=False, activation=None):
    """See `rankmamba.scan.causal_conv1d`."""
    return portable.causal_conv1d(x, weight, bias, initial_state, return_final_state, activation)


def ssd_scan(x, delta, A, B, C, D=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.ssd_scan`."""
    return portable.ssd_scan(x, delta, A, B, C, D, initial_state, return_final_state)


def _tracked(tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _threads(work):
    return max(1, min(torch.get_num_threads(), work // _SMALL))


def _activation(tensor):
    """float32 or bfloat16, a token's channels side by side; the rows may lie anywhere."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _plain(tensor):
    return None if tensor is None else tensor.detach().float().contiguous()


def _rows(tensor):
    if tensor is None:
        return _Rows()
    return _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.dtype == torch.bfloat16)


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()
