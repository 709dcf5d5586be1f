"""Out of memory: tell it from other errors, and give back what can be given back before a smaller try."""

import ctypes
from contextlib import suppress

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

# oneDNN's words when there is no memory for the code that it generates
ONEDNN = ("could not create a primitive", "could not create a memory")


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error is a failed allocation, on a GPU or in main memory; no other RuntimeError counts."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or (isinstance(error, RuntimeError) and str(error) in ONEDNN)


def free_memory() -> None:
    """Drop dead objects and return cached device memory; call it outside the `except` block, which keeps tensors alive."""
    clear_device_cache(garbage_collection=True)
    return_freed()


def return_freed() -> None:
    """Give freed memory back to the system: glibc keeps it, where oneDNN cannot have it and a measurement does not see it used again."""
    with suppress(OSError, AttributeError, TypeError):  # another C library; Windows, where the process has no handle by None
        ctypes.CDLL(None).malloc_trim(0)
