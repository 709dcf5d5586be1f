"""The number formats of stored document states: a state's tensors to bytes and back."""

import numpy as np
import torch

from ..errors import InputError

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BITS = {"int8": 8, "int4": 4}
DTYPES = (*FLOATS, *BITS)
GROUP = 32  # numbers that share a scale
ALIGN = 64  # bytes; a record begins at a multiple of it
Parts = list[torch.Tensor]  # the tensors of one document's state, in a fixed order
Profile = list[tuple[torch.Tensor, torch.Tensor]]  # for each part: the mean of each number over documents, and its unit


def check_format(dtype: str) -> None:
    """Check the name of a number format.

    Raises:
        InputError: there is no such format.
    """
    if dtype not in DTYPES:
        raise InputError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")


def record_bytes(dtype: str, numbers: int) -> int:
    """Return the bytes that a state of this many numbers takes."""
    size = numbers * FLOATS[dtype].itemsize if dtype in FLOATS else -(-numbers // GROUP) * (GROUP * BITS[dtype] // 8 + 2)
    return -(-size // ALIGN) * ALIGN


def ids_bytes(tokens: int) -> int:
    """Return the bytes that a document's token ids take after its state, where queries are marked by them."""
    return -(-4 * tokens // ALIGN) * ALIGN


def encode(dtype: str, parts: Parts, profile: Profile | None = None, ids: np.ndarray | None = None) -> np.ndarray:
    """Write one document's parts (float32) as a record, uint8 (record_bytes,), and after it the token ids, if given (ids_bytes,).

    int8, int4: every number becomes its distance from the mean at its place, in the unit of its place (both in `profile`); then
    every 32 consecutive ones share a scale (float16).

    Raises:
        InputError: a number is not finite, or too large for float16.
    """
    if dtype in FLOATS:
        stored = torch.cat([part.reshape(-1) for part in parts]).to(FLOATS[dtype])
        if not stored.isfinite().all():
            raise InputError(f"expected states that {dtype} can hold, got numbers beyond its range; use bfloat16 or float32")
        encoded = stored.view(torch.uint8)
    else:
        flat = torch.cat([((part - mean) / unit).reshape(-1) for part, (mean, unit) in zip(parts, profile, strict=True)])
        if not flat.isfinite().all():
            raise InputError("expected finite states, got infinite ones or NaN; check the model's weights")
        groups = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
        limit = 2 ** (BITS[dtype] - 1) - 1
        scales = (groups.abs().amax(1) / limit).half()
        whole = (groups / scales.float().clamp(min=1e-7)[:, None]).round_().clamp_(-limit, limit).to(torch.int8)
        if dtype == "int4":
            low, high = (whole + 8).view(torch.uint8).view(-1, 2, GROUP // 2).unbind(1)
            whole = low | high << 4
        encoded = torch.cat([scales.view(torch.uint8), whole.reshape(-1).view(torch.uint8)])
    record = _aligned(encoded.numpy())
    return record if ids is None else np.append(record, _aligned(ids.astype("<i4").view(np.uint8)))


def _aligned(data: np.ndarray) -> np.ndarray:
    """Fill bytes up with zeros to a multiple of `ALIGN`."""
    return np.pad(data, (0, -len(data) % ALIGN))


def decode(dtype: str, record: np.ndarray, parts: Parts, profile: Profile | None = None) -> None:
    """Read a record into one document's parts, which may be strided and of any float type."""
    numbers = sum(part.numel() for part in parts)
    raw = torch.from_numpy(record)
    if dtype in FLOATS:
        flat = raw[: numbers * FLOATS[dtype].itemsize].view(FLOATS[dtype])
    else:
        groups = -(-numbers // GROUP)
        scales = raw[: 2 * groups].view(torch.float16).float()
        packed = raw[2 * groups : groups * (2 + GROUP * BITS[dtype] // 8)]
        if dtype == "int4":
            low, high = (packed & 15).view(-1, 1, GROUP // 2), (packed >> 4).view(-1, 1, GROUP // 2)
            whole = torch.cat([low, high], 1).view(groups, GROUP).float().sub_(8)
        else:
            whole = packed.view(torch.int8).view(groups, GROUP).float()
        flat = whole.mul_(scales[:, None]).view(-1)
    start = 0
    for place, part in enumerate(parts):
        values = flat[start : start + part.numel()].view(part.shape)
        if dtype in BITS:
            mean, unit = profile[place]
            values = torch.addcmul(mean, values, unit)
        part.copy_(values)
        start += part.numel()
