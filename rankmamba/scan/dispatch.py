"""Which implementation runs: decided by the tensor's device, its precision and what can be imported here."""

import contextlib
import contextvars
import functools
import logging
from dataclasses import dataclass
from types import ModuleType

import torch

from . import portable

_log = logging.getLogger(__name__)
# torch.fx's modes, in which tensors have no memory or operations are recorded
RECORDERS = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
_forced = contextvars.ContextVar("rankmamba.scan", default=None)


@dataclass(frozen=True)
class Kernel:
    """What computes the scan. name: "cuda", "native" or "portable". reason: why this one, and what to do for a faster one."""

    name: str
    reason: str


def kernel(device: torch.device | str = "cpu") -> Kernel:
    """Return what runs for float32 and bfloat16 tensors on `device`; float64 always runs on the portable one."""
    return _choose(torch.device(device).type)[0]


@contextlib.contextmanager
def forced(kernel: str | object):
    """Use the kernel of that name, or any object with its four functions, inside the `with` block: to compare, to count. With
    "portable" the Transformers' kernels stand aside, too: everything can be differentiated as often as PyTorch's operations can.

    Raises:
        ImportError: it cannot run here.
    """
    kernels = {"portable": lambda: portable, "native": _native, "cuda": _cuda}
    module = kernels[kernel]() if isinstance(kernel, str) else kernel
    token = _forced.set(module)
    try:
        yield
    finally:
        _forced.reset(token)


def traced() -> bool:
    """Whether torch.compile, torch.jit, torch.fx or torch.func is recording what runs: none of them can see into the kernels."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: torch.compile could not trace the lines below
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in RECORDERS)


def plain() -> bool:
    """Whether PyTorch's own operations compute everything: they are recorded, or the portable kernel is `forced`."""
    return traced() or _forced.get() is portable  # torch.compile could not trace the latter


def implementation(tensor: torch.Tensor) -> ModuleType:
    """Return the module whose functions take `tensor`."""
    if tensor.dtype == torch.float64 or tensor.numel() == 0 or traced():
        return portable  # the kernels take no float64, and those of CUDA no empty tensors
    return _forced.get() or _choose(tensor.device.type)[1]


@functools.cache
def _choose(device: str) -> tuple[Kernel, ModuleType]:
    if device == "cuda":
        try:
            return Kernel("cuda", "mamba-ssm and causal-conv1d import"), _cuda()
        except Exception as error:  # an extension built for another torch fails in many ways
            remedy = "pip install --no-build-isolation '.[gpu]' beside the torch that is in use"
            chosen = Kernel("portable", f"mamba-ssm or causal-conv1d does not import ({_first_line(error)}); {remedy}")
    elif device == "cpu":
        try:
            native = _native()
            return Kernel("native", native.description()), native
        except (ImportError, OSError) as error:
            remedy = "install a C++ compiler (Debian: apt-get install g++), then pip install --no-build-isolation --editable ."
            chosen = Kernel("portable", f"the native kernel is not there ({_first_line(error)}); {remedy}")
    else:
        return Kernel("portable", f"there is no kernel for {device}"), portable
    _log.warning("the scan runs in plain PyTorch, several times slower: %s", chosen.reason)
    return chosen, portable


def _cuda() -> ModuleType:
    from . import cuda

    return cuda


def _native() -> ModuleType:
    from . import native

    return native


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
