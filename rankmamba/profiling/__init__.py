"""What a system costs: time and peak memory of training and of inference, with random weights, on a CPU or a GPU.

Inference scores B pairs of L tokens. Training is one step on B pairs in LCE groups: forward, backward, AdamW. Speed does not depend
on the weights, so published backbones are run by their shapes (`shapes`) and nothing is fetched.
"""

import contextlib
import gc
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .. import backbones
from ..errors import InputError
from ..memory import free_memory, out_of_memory, return_freed
from ..precision import autocast
from ..reranker import Reranker
from ..systems import MINILM, SCRATCH, SYSTEMS
from ..training.losses import lce_loss
from . import shapes
from .flops import forward_flops

MODES = ("training", "inference")
CANDIDATES = 100  # documents per query, for its latency


def build(system: str, length: int, layers: int | None = None, device=None, dtype: torch.dtype | None = None) -> Reranker:
    """Make a system with random weights that reads `length` tokens, with as many positions as that needs.

    system: a name in the table of systems, or "pythia-160m (eager)" to choose its attention (by transformers' names). Systems that bring
    their weights, in a package or a folder, keep them, and their positions. layers: of a backbone in `shapes`; default all.

    Raises:
        InputError: there is no such system, it cannot read that many tokens, or that attention does not run here.
    """
    name, _, attention = system.removesuffix(")").partition(" (")
    spec = SYSTEMS.get(name + SCRATCH) or backbones.find(name)
    depth, limits = shapes.depth_of(name), {"max_length": length, "max_query_length": min(50, length // 2)}
    if depth is not None or callable(spec.source):
        config = spec.source() if depth is None else shapes.configuration(name, layers or depth)
        if hasattr(config, "max_position_embeddings"):
            config.max_position_embeddings = max(length, config.max_position_embeddings)
        parts = backbones.build(replace(spec, source=lambda: config, tokenizer=spec.tokenizer or MINILM), **limits)
    else:
        parts = backbones.load(name, **limits)
    reranker = Reranker(*parts, device, dtype)
    if attention:
        try:
            reranker.model.backbone.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise InputError(f"expected an attention that runs here, got {system}: {str(error).splitlines()[0]}") from error
        if "flash" in attention and reranker.dtype == torch.float32:
            raise InputError(f"expected an attention that runs here, got {system}: it takes no float32, and {reranker.precision}")
        reranker.attention = f"{attention}: asked for"
    return reranker


class Subject:
    """A system that is ready to be measured, at any length up to `length`.

    Small CPUs take minutes for one step of a published backbone. On a CPU, unless full_depth is asked for, it therefore runs at two
    depths a < b of its d layers, and a quantity of the whole is t_a + (d - a) (t_b - t_a) / (b - a): its layers are alike, and both
    depths contain everything else.
    """

    def __init__(self, system: str, length: int, full_depth: bool = False, device=None, dtype: torch.dtype | None = None):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.system, self.layers, self.depths = system, shapes.depth_of(system), None
        if self.layers is not None and not full_depth and device.type == "cpu":
            self.depths = (self.layers // 12, self.layers // 4)
        self.rerankers = [build(system, length, layers, device, dtype) for layers in self.depths or [None]]
        self.parameters = round(self.whole([reranker.model.parameters_outside_embeddings() for reranker in self.rerankers]))

    @property
    def first(self) -> Reranker:
        return self.rerankers[0]

    def whole(self, values: Sequence[float]) -> float:
        """The full system's quantity, from those of the networks that ran."""
        if self.depths is None:
            return values[0]
        return values[0] + (self.layers - self.depths[0]) * (values[1] - values[0]) / (self.depths[1] - self.depths[0])

    def flops(self, length: int) -> int:
        """The full system's operations for scoring one pair."""
        return round(self.whole([forward_flops(reranker.model, length) for reranker in self.rerankers]))

    @property
    def environment(self) -> dict:
        """What decides the speed besides the machine: number format, kernels."""
        return self.first.setup | {"dtype": str(self.first.dtype).removeprefix("torch.")}


def measure(system: str, length: int, batch: int = 1, stop: threading.Event | None = None, **settings) -> dict:
    """Measure one system alone; see `measure_together` for the settings and for what comes back."""
    return measure_together([Subject(system, length)], length, batch, stop=stop, **settings)[system]


def measure_together(
    subjects: Sequence[Subject],
    length: int,
    batch: int,
    group_size: int = 8,
    repeats: int = 5,
    seconds: float = 2.0,
    modes: Sequence[str] = MODES,
    stop: threading.Event | None = None,
) -> dict[str, dict]:
    """Measure systems in turns, A B A B, after a first pass of each whose memory is measured and a turn that is not timed: measuring
    memory gives what is free back to the system, and the pass after it pays for that.

    length, batch: tokens per pair, pairs. group_size: pairs of an LCE group, at most the batch. seconds: no further turn begins after
    this many per system, but there are at least two turns, or three where a system's speed is extrapolated from two depths, which
    magnifies small errors. On a CPU a first scoring that takes more than three times as long counts at once, without a warm-up; a first
    step of training never does, since it allocates the optimizer's memory. stop: set it from another thread to end after the pass that
    is running.

    Returns {system: {"parameters" (outside the embeddings), "layers" and the "depths" that ran, "flops": {mode: operations of the
    pass}, "peak_gflops" (of one large matrix product, now), "out_of_memory": modes, and for each mode that ran what `_summary`
    returns}}; what was stopped before its first turn is left out.

    Raises:
        InputError: the batch does not consist of whole groups.
    """
    group_size, stop = min(group_size, batch), stop or threading.Event()
    if batch % group_size:
        raise InputError(f"expected a batch of whole groups, got {batch} pairs in groups of {group_size}; change one of them")
    found, peak = {}, gemm_gflops(subjects[0].first.device, subjects[0].first.dtype)
    for subject in subjects:
        forward = batch * subject.flops(length)
        found[subject.system] = {
            "parameters": subject.parameters,
            "layers": subject.layers,
            "depths": subject.depths,
            "flops": {"training": 3 * forward, "inference": forward},
            "peak_gflops": peak,
            "out_of_memory": [],
        }
    first = subjects[0].first
    for mode in modes:
        # scoring converts the weights once for all its batches (Reranker._score), a step of training has to do it again
        with autocast(first.device, first.dtype) if mode == "inference" else contextlib.nullcontext():
            runs = {s: [_pass(mode, reranker, length, batch, group_size) for reranker in s.rerankers] for s in subjects}
            memory, times, failed = _first_passes(mode, runs, group_size, seconds, stop)
            _take_turns(runs, times, repeats, seconds, stop)
        for subject in failed:
            found[subject.system]["out_of_memory"].append(mode)
        for subject in (subject for subject in memory if times[subject]):
            result = found[subject.system]
            result[mode] = _summary(times[subject], memory[subject], batch, length, result["flops"][mode] / 1e9 / peak)
    return found


def _first_passes(
    mode: str, runs: dict[Subject, list[Callable]], group_size: int, seconds: float, stop: threading.Event
) -> tuple[dict[Subject, float | None], dict[Subject, list[float]], list[Subject]]:
    """Run each system once; return the memory in MiB of those that ran, their seconds if they count, and which ran out of memory.

    runs: the passes of each system's networks; those of a system that did not run are dropped.
    """
    memory, times, failed = {}, {}, []
    for subject in list(runs):
        try:
            if not stop.is_set():
                # what is allocated once is not part of a pass; converted weights are, so they are not cached here
                with torch.autocast(subject.first.device.type, enabled=False, cache_enabled=False):
                    _pass(mode, subject.first, 8, group_size, group_size)()
                first, memory[subject] = _first(subject, runs[subject])
                # a GPU's first pass builds its kernels
                counts = mode == "inference" and subject.depths is None
                warm = counts and subject.first.device.type == "cpu" and sum(first) > 3 * seconds
                times[subject] = [subject.whole(first)] if warm else []
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failed.append(subject)
        if subject not in memory:
            del runs[subject]
            subject.first.model.zero_grad()
            free_memory()
    return memory, times, failed


def _take_turns(
    runs: dict[Subject, list[Callable]], times: dict[Subject, list[float]], repeats: int, seconds: float, stop: threading.Event
) -> None:
    """Run the systems that have no times yet in turns, and add each turn's seconds but the first one's to their times."""
    waiting = [subject for subject, taken in times.items() if not taken]
    if not waiting:
        return

    def turn() -> dict[Subject, float]:
        taken = {}
        for subject in waiting:
            if not stop.is_set():
                taken[subject] = subject.whole([timed(run, subject.first.device) for run in runs[subject]])
        return taken

    turn()
    started = clock(waiting[0].first.device)
    least = 3 if any(subject.depths for subject in waiting) else 2
    for place in range(repeats):
        if place >= least and clock(waiting[0].first.device) - started > seconds * len(waiting):
            break
        for subject, taken in turn().items():
            times[subject].append(taken)


def _summary(times: list[float], peak_mib: float | None, batch: int, length: int, best_seconds: float) -> dict:
    """The numbers of one mode: seconds of each pass, tokens/s (median and quartiles), pairs/s, ms a query, MiB, share of the peak.

    best_seconds: what the pass would take at the speed of a large matrix product.
    """
    low, median, high = np.percentile(times, [25, 50, 75]).tolist()
    return {
        "seconds": times,
        "tokens_per_s": batch * length / median,
        "low": batch * length / high,
        "high": batch * length / low,
        "pairs_per_s": batch / median,
        "latency_ms": 1000 * CANDIDATES * median / batch,
        "peak_mib": peak_mib,
        "share": best_seconds / median,
    }


def _pass(mode: str, reranker: Reranker, length: int, batch: int, group_size: int) -> Callable[[], None]:
    """One scoring, or one step of training, of random tokens as a call without arguments."""
    model = reranker.model
    ids = torch.randint(0, model.config.backbone_config.vocab_size, (batch, length), device=reranker.device)
    if mode == "inference":

        def run():
            with torch.no_grad(), autocast(reranker.device, reranker.dtype):
                model.eval()(ids)

        return run
    # a step of size 0: the same arithmetic, and every step has the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step():
        with autocast(reranker.device, reranker.dtype):
            scores = model.train()(ids).logits.view(-1, group_size)
        lce_loss(scores).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this process where it has one CPU thread, so that other work on the machine does not count; else wall time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, the device's work included."""
    started = clock(device)
    run()
    return clock(device) - started


def gemm_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Billions of operations per second in one large matrix product, the best of a second and of at least five: what this machine can
    do. Among fewer there may be none that other work on the machine did not slow."""
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (1024, 768, 3072)
    a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
    seconds = []
    while len(seconds) < 5 or sum(seconds) < 1:
        seconds.append(timed(lambda: a @ b, device))
    return 2 * rows * inner * columns / min(seconds) / 1e9


def _first(subject: Subject, passes: Sequence[Callable[[], None]]) -> tuple[list[float], float | None]:
    """Run each network's first pass; return their seconds, and the peak memory of the full system in MiB, weights included.

    The memory is None where it cannot be measured.
    """
    seconds, added = [], []
    for run in passes:
        added.append(added_mib(lambda run=run: seconds.append(timed(run, subject.first.device)), subject.first.device))
    models = [reranker.model for reranker in subject.rerankers]
    weights = [sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**20 for model in models]
    known = None not in added
    return seconds, subject.whole([sum(parts) for parts in zip(added, weights, strict=True)]) if known else None


def added_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The peak memory of a call beyond what was held before it, in MiB.

    On a CPU: Linux's peak of this process's resident memory, reset before the call; None on other systems.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        run()
        return None
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[1])
