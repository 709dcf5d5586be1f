"""The scan's precision: autocast is for matrix products with weights; here every tensor's precision is already decided."""

import functools

import torch

PRECISIONS = torch.float32, torch.bfloat16  # what the native kernels read and write


def wide(tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 if it or another tensor is: a state in bfloat16 forgets what a token adds to it."""
    return tensor.double() if torch.float64 in {tensor.dtype, *(other.dtype for other in others)} else tensor.float()


def autocasts(device: str) -> bool:
    """Whether autocast is on; some devices, such as meta, have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(function):
    """Run `function`, which takes a tensor among its arguments, with autocast off on that tensor's device."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next(t.device.type for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        if not autocasts(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped
