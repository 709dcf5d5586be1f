"""The compiled library: loaded with ctypes, called with pointers to torch's memory; no compiler is needed at run time.

Importing this module raises ImportError where the library was not built.
"""

import ctypes
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch

_SMALL = 1 << 18  # multiplications (with an exponential each) that take some 60 microseconds: less is not worth another thread


class Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64), ("bfloat16", c_int64)]


def _structure(name, **kinds):
    """A C struct from one string of member names per kind, in the order given."""
    fields = [(member, kind) for members, kind in kinds.values() for member in members.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# As in kernels.h.
Scan = _structure(
    "Scan",
    sizes=("batch length inner states", c_int64),
    rows=("u delta B C z", Rows),
    plain=("A2 D delta_bias initial", c_void_p),
    out=("y", Rows),
    states=("final checkpoints", c_void_p),
    groups=("groups", c_int64),
    gradients=("dy du ddelta dz", Rows),
    sums=("dfinal dinitial dA dD ddelta_bias dB dC", c_void_p),
)
Conv = _structure(
    "Conv",
    sizes=("batch length inner taps silu", c_int64),
    rows=("x y initial", Rows),
    plain=("weight bias", c_void_p),
    gradients=("dy dx dinitial", Rows),
    sums=("dweight dbias", c_void_p),
)
Ssd = _structure(
    "Ssd",
    sizes=("batch length heads width groups chunk chunks carried_from dxw_until", c_int64),
    rows=("x y carried", Rows),
    plain=("scores log_high log_low delta D", c_void_p),
    gradients=("dy dxw dx", Rows),
    sums=("dscores da ddelta dD", c_void_p),
)
Weigh = _structure(
    "Weigh",
    sizes=("batch length heads width chunk chunks start", c_int64),
    rows=("x out", Rows),
    plain=("factor", c_void_p),
    stride=("factor_batch_stride", c_int64),
)


def _load():
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        raise ImportError(f"no compiled library in {Path(__file__).parent}")
    library = ctypes.CDLL(str(found[0]))
    library.rankmamba_build.restype = ctypes.c_char_p
    # torch's own pool of threads, where it has one that can be shared: two pools would fight for the cores.
    gomp = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    library.rankmamba_use_gomp(ctypes.cast(gomp, c_void_p) if gomp else None)
    return library


library = _load()
BLOCK, TILE = library.rankmamba_block(), library.rankmamba_tile()


def description() -> str:
    """Say which build of the kernels this processor runs."""
    return f"compiled kernels, {library.rankmamba_build().decode()} build"


def tracked(tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def threads(work):
    return max(1, min(torch.get_num_threads(), work // _SMALL))


def as_rows(tensor):
    """float32 or bfloat16, a token's channels side by side; the rows may lie anywhere."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def plain(tensor):
    return None if tensor is None else tensor.detach().float().contiguous()


def rows(tensor):
    if tensor is None:
        return Rows()
    return Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.dtype == torch.bfloat16)


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()
