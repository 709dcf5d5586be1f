"""The native CPU kernels: C++ that uses neither Python nor torch. Where they were not built, importing this raises ImportError."""

from .add_norm import add_norm
from .attention import attention
from .gelu import gelu
from .library import description
from .mamba import causal_conv1d, selective_scan
from .mamba2 import ssd_scan
from .mamba2_inner import mamba2_inner
from .norm import rms_norm

__all__ = [
    "add_norm",
    "attention",
    "causal_conv1d",
    "description",
    "gelu",
    "mamba2_inner",
    "rms_norm",
    "selective_scan",
    "ssd_scan",
]
