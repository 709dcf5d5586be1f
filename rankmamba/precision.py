"""The number format that a device computes in, and why."""

import torch

from .errors import InputError

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}


def autocast_dtype(device: torch.device | str, asked: torch.dtype | str | None = None) -> tuple[torch.dtype, str]:
    """Return (dtype for autocast, the reason): the one asked for, else bfloat16 where the device has matrix units for it.

    Weights, states, the head and the scores stay float32 either way. asked: a dtype or its name, such as "float32".

    Raises:
        InputError: it is not one of `NAMES`.
    """
    device = torch.device(device)
    if asked is not None:
        asked = getattr(torch, asked, asked) if isinstance(asked, str) else asked
        if asked not in list(NAMES):
            raise InputError(
                f"expected a dtype among {', '.join(map(str, NAMES))}, got {asked!r}; leave it out for the device's own"
            )
        return asked, f"{NAMES[asked]}: asked for"
    if device.type == "cuda":
        with torch.cuda.device(device):  # it asks the current one
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if supported:
            return torch.bfloat16, f"bf16: {torch.cuda.get_device_name(device)} has bfloat16 tensor cores"
        return torch.float32, f"fp32: {torch.cuda.get_device_name(device)} has no bfloat16 tensor cores"
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "bf16: this CPU has AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "bf16: this CPU has AVX512-BF16"
        return torch.float32, "fp32: this CPU has neither AMX nor AVX512-BF16, so bfloat16 would be emulated"
    return torch.float32, f"fp32: bfloat16 on {device.type} is untested here"


def autocast(device: torch.device | str, dtype: torch.dtype):
    """A context in which matrix products run in `dtype`; float32 means no autocast at all."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)
