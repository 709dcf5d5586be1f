"""The compiled library: loaded with ctypes, called with pointers to torch's memory; no compiler is needed at run time.

Importing this module raises ImportError where the library was not built, or was built for other arguments than this package passes.
"""

import ctypes
import mmap
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch

from ...errors import InputError
from ..precision import PRECISIONS

_SMALL = 1 << 18  # multiplications, some 60 microseconds: less is not worth another thread


class Rows(ctypes.Structure):
    """A tensor (B, L, channels) of float32 or bfloat16, as kernels.h has it; strides in numbers."""

    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64), ("bfloat16", c_int64)]


def _structure(name, *fields):
    """A C struct from (member names, kind) pairs, in kernels.h's order."""
    members = [(member, kind) for names, kind in fields for member in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


Scan = _structure(
    "Scan",
    ("batch length inner states", c_int64),
    ("u delta B C z", Rows),
    ("A2 D delta_bias initial", c_void_p),
    ("y", Rows),
    ("final checkpoints", c_void_p),
    ("groups", c_int64),
    ("dy du ddelta dz", Rows),
    ("dfinal dinitial dA dD ddelta_bias dB dC", c_void_p),
)
Conv = _structure(
    "Conv",
    ("batch length inner silu", c_int64),
    ("x y initial", Rows),
    ("weight bias", c_void_p),
    ("dy dx dinitial", Rows),
    ("dweight dbias", c_void_p),
)
SsdForward = _structure(
    "SsdForward",
    ("batch length heads width groups n chunk parts", c_int64),
    ("x B C y", Rows),
    ("delta A2 D initial final before conv norm", c_void_p),
)
SsdBackward = _structure(
    "SsdBackward",
    ("batch length heads width groups n chunk parts", c_int64),
    ("x B C dy dx", Rows),
    ("delta A A2 D initial before dfinal dinitial ddelta dA dD dB dC norm", c_void_p),
)
Norm = _structure(
    "Norm",
    ("batch length inner groups", c_int64),
    ("epsilon", c_float),
    ("y z out", Rows),
    ("weight", c_void_p),
    ("dout dy dz", Rows),
    ("dweight", c_void_p),
)
Rotation = _structure("Rotation", ("cos sin", c_void_p), ("pairs batch_stride", c_int64))
Attention = _structure(
    "Attention",
    ("batch heads width queries keys shared causal", c_int64),
    ("scale", c_float),
    ("q k v out", Rows),
    ("q_head k_head v_head", c_int64),
    ("hidden bias", c_void_p),
    ("q_rotation k_rotation", Rotation),
    ("dout dq dk dv", Rows),
    ("dout_head", c_int64),
)
Gelu = _structure("Gelu", ("rows inner", c_int64), ("x y", Rows), ("bias", c_void_p), ("dy dx", Rows), ("dbias", c_void_p))
AddNorm = _structure(
    "AddNorm", ("rows inner", c_int64), ("epsilon", c_float), ("x residual out", Rows), ("bias weight shift", c_void_p)
)
_KERNELS = {
    "scan_forward": Scan,
    "scan_backward": Scan,
    "conv_forward": Conv,
    "conv_backward": Conv,
    "ssd_forward": SsdForward,
    "ssd_backward": SsdBackward,
    "norm_forward": Norm,
    "norm_backward": Norm,
    "attention": Attention,
    "attention_backward": Attention,
    "gelu_forward": Gelu,
    "gelu_backward": Gelu,
    "add_norm": AddNorm,
}


def _load():
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        raise ImportError(f"no compiled library in {Path(__file__).parent}")
    library = ctypes.CDLL(str(found[0]))
    try:
        sizes = {name: getattr(library, f"rankmamba_{name}_size")() for name in _KERNELS}
    except AttributeError:
        sizes = {}
    if sizes != {name: ctypes.sizeof(arguments) for name, arguments in _KERNELS.items()}:
        raise ImportError(f"{found[0]} was built from other sources than this package's; install it again")
    library.rankmamba_build.restype = ctypes.c_char_p
    # Use torch's own thread pool where it can be shared: two pools would compete for the cores.
    gomp = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    library.rankmamba_use_gomp(ctypes.cast(gomp, c_void_p) if gomp else None)
    return library


_library = _load()
_HUGE_PAGE = 2 << 20  # bytes
_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
if _madvise:
    _madvise.argtypes = (c_void_p, ctypes.c_size_t, ctypes.c_int)
BLOCK, TILE, ITEM_ROWS = _library.rankmamba_block(), _library.rankmamba_tile(), _library.rankmamba_item_rows()
TAPS = _library.rankmamba_taps()


def description() -> str:
    """Return which build of the kernels this processor runs."""
    return f"compiled kernels, {_library.rankmamba_build().decode()} build"


def call(kernel: str, arguments: ctypes.Structure, threads: int) -> None:
    """Run a kernel; every tensor that `arguments` points to must be alive."""
    getattr(_library, f"rankmamba_{kernel}")(ctypes.byref(arguments), threads)


def workers(work: int) -> int:
    """Return how many threads this many multiplications are worth, at most torch's setting."""
    return max(1, min(torch.get_num_threads(), work // _SMALL))


def tracked(tensors) -> bool:
    """Return whether a gradient will be needed, or a forward-mode one, which an autograd.Function refuses."""
    forward = torch.autograd.forward_ad._current_level >= 0
    return forward or torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor for a kernel to write to, whatever torch's default dtype and device.

    Large tensors ask for huge pages (Linux): allocating them in small pages takes the system as long as the scan takes.
    """
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.nbytes >= _HUGE_PAGE and _madvise:
        first, end = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
        _madvise(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return tensor


def in_memory(tensor):
    """Return a tensor whose memory holds its values: torch negates some lazily, and some zero tensors have no memory.

    Raises:
        InputError: its memory was freed.
    """
    tensor = tensor.detach().resolve_neg()
    if tensor._is_zerotensor():
        return tensor.clone()
    if tensor.numel() and not tensor.untyped_storage().nbytes():  # a part of it may have an address all the same
        raise InputError(f"expected a tensor with memory, got {tuple(tensor.shape)} whose storage was freed")
    return tensor


def as_rows(tensor):
    """Return float32 or bfloat16 with a token's channels contiguous; the rows may be anywhere."""
    if tensor is None:
        return None
    tensor = in_memory(tensor)
    if tensor.dtype not in PRECISIONS:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_plain(tensor):
    """Return contiguous float32."""
    return None if tensor is None else in_memory(tensor).float().contiguous()


def rows(tensor) -> Rows:
    """Describe a tensor (B, L, channels), its channels contiguous, to a kernel; None: absent."""
    if tensor is None:
        return Rows()
    return Rows(pointer(tensor), tensor.stride(0), tensor.stride(1), tensor.dtype == torch.bfloat16)


def pointer(tensor):
    """Return the address of a tensor's memory; None: absent."""
    return None if tensor is None else tensor.data_ptr()
