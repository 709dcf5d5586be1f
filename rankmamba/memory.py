"""Out of memory: tell it from other errors, and free what can be freed before a smaller attempt."""

import ctypes
from contextlib import suppress

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

# CUDA's, where a library or Triton asks for the memory
CUDA = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "[CUDA]: out of memory")
# oneDNN's messages when there is no memory for the code that it generates
ONEDNN = ("could not create a primitive", "could not create a memory")


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error is a failed allocation, on a GPU or in main memory: what accelerate takes for one, and libraries' own."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or isinstance(error, RuntimeError) and (str(error) in ONEDNN or any(said in str(error) for said in CUDA))


def free_memory() -> None:
    """Drop dead objects and return cached device memory; call it outside the `except` block, which keeps tensors alive."""
    clear_device_cache(garbage_collection=True)
    return_freed()


def return_freed() -> None:
    """Return freed memory to the system: glibc keeps it, where oneDNN cannot use it and a measurement does not see it reused."""
    with suppress(OSError, AttributeError, TypeError):  # another C library; on Windows CDLL(None) fails
        ctypes.CDLL(None).malloc_trim(0)
