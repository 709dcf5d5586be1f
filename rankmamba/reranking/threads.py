"""Batches side by side on the threads of a CPU, one per thread: one batch on all threads would wait at every small operation.

Measured on two cores: this makes `Reranker.predict` 1.1 to 1.3 times as fast, and as much again because batches may be larger.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context

import numpy as np
import torch

from ..inputs import token_batches
from ..precision import autocast

COST_OF_A_THREAD, COST_ON_A_GPU = 128, 8192  # tokens, see `batch_cost`
MOST_AT_ONCE = 4  # more would wait for Python's lock; each then computes on several threads
# Held while workers begin: for that moment, torch gives new threads the workers' few threads, and one that scored with them would
# leave them to all later ones.
_BEGINNING = threading.Lock()


def at_once(device: torch.device) -> int:
    """How many batches a device computes side by side."""
    if device.type != "cpu":
        return 1
    with _BEGINNING:
        return min(torch.get_num_threads(), MOST_AT_ONCE)


def batch_cost(device: torch.device, count: int = 1) -> int:
    """The fixed cost of a batch, in tokens that could be computed in that time, where `count` batches run side by side.

    On a CPU: small operations, which more threads do not speed up. On a GPU: launching kernels; a guess from how its speed grows with
    the batch (LOG.md).
    """
    return COST_OF_A_THREAD * torch.get_num_threads() // count if device.type == "cpu" else COST_ON_A_GPU


def even_batches(lengths: np.ndarray, batch_tokens: int, count: int, cost: int) -> list[np.ndarray]:
    """Cut sequences into batches (`inputs.token_batches`), `count` of which together have at most `batch_tokens` tokens; those of the
    last round are smaller and of equal size, so that all threads finish together."""
    most = max(1, batch_tokens // count)
    batches = token_batches(lengths, most, cost)
    whole = len(batches) // count * count
    if whole < len(batches):
        rest = np.concatenate(batches[whole:])
        share = min(most, math.ceil(lengths[rest].sum() / count))
        batches[whole:] = [rest[part] for part in token_batches(lengths[rest], share, cost)]
    return batches


def side_by_side(
    compute: Callable, items: Sequence, count: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[int, object]]:
    """Yield (place, compute(items[place])) as they finish, `count` at a time, each on its share of torch's threads, without
    gradients and in autocast to `dtype`. There are at least `count` items. Once the generator is closed nothing more is computed."""
    if count == 1:
        yield from enumerate(map(compute, items))
        return
    threads, begun = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:  # all of these settings are per thread
        torch.set_grad_enabled(False)
        torch.set_num_threads(threads // count)
        autocast(device, dtype).__enter__()  # ends with the thread; converted weights are shared by all
        begun.wait()

    pool = ThreadPoolExecutor(count, initializer=begin)
    try:
        with _BEGINNING:
            try:
                # threads do not inherit the caller's context, which `scan.forced` is in
                places = {pool.submit(copy_context().run, compute, item): place for place, item in enumerate(items)}
                begun.wait()
            except BaseException:  # no thread could be started, or Ctrl-C: those that wait would wait for ever
                begun.abort()
                raise
            finally:
                torch.set_num_threads(threads)  # for threads started later, not only after this call
        for future in as_completed(places):
            yield places[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        with _BEGINNING:
            torch.set_num_threads(threads)  # after Ctrl-C, workers may have begun since
