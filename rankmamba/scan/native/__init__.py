"""The native CPU kernels: C++ that uses neither Python nor torch. Where they were not built, importing this raises ImportError."""

from .attention import attention
from .library import description
from .mamba import causal_conv1d, selective_scan
from .mamba2 import ssd_scan
from .mamba2_inner import mamba2_inner
from .norm import rms_norm
from .pointwise import add_norm, gelu_

__all__ = [
    "add_norm",
    "attention",
    "causal_conv1d",
    "description",
    "gelu_",
    "mamba2_inner",
    "rms_norm",
    "selective_scan",
    "ssd_scan",
]
