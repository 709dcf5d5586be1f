"""How far a training has come, and when it saves and stops."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments

from .checkpoints import PROGRESS


class Stopped(Exception):
    """Asked to stop before a step was done: it is abandoned, the steps before it are kept."""


class Progress(TrainerCallback):
    """How far a training has come: its curve and its seconds, restarts included; reports steps, decides when to save and to stop.

    Seconds are from a monotonic clock: a wall clock that jumps changes nothing.
    """

    # Saving a large model to a slow disk takes minutes: saving may take at most this share of the time.
    SHARE = 0.05

    def __init__(self, on_step: Callable[[dict], None] | None, stop: threading.Event | None, every_s: float, every_steps: int):
        self.on_step, self.stop, self.every_s, self.every_steps = on_step, stop, every_s, every_steps
        self.curve: list[dict] = []
        self.stopped, self.interrupted, self.trainer = False, False, None
        self._started, self._saved, self._pause = time.perf_counter(), time.perf_counter(), every_s

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def load(self, path: Path) -> None:
        """Resume from the progress that a checkpoint holds."""
        progress = json.loads((path / PROGRESS).read_bytes())
        self.curve = progress["curve"]
        self._started = time.perf_counter() - progress["seconds"]

    def saved(self, took: float) -> None:
        """A checkpoint has been written, in `took` seconds."""
        self._saved, self._pause = time.perf_counter(), max(self.every_s, took / self.SHARE)

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Treat Ctrl-C like `stop`, where model and optimizer are consistent and can be kept, then raise KeyboardInterrupt.

        A second Ctrl-C interrupts at once. Only the main thread receives it; a handler that others have set stays.
        """
        usual = signal.default_int_handler
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
            yield
            return

        def interrupt(*_) -> None:
            signal.signal(signal.SIGINT, usual)
            self.interrupted = True

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)
        if self.interrupted:
            raise KeyboardInterrupt

    def _asked_to_stop(self) -> bool:
        return self.interrupted or self.stop is not None and self.stop.is_set()

    def heed_stop(self, args: TrainingArguments) -> None:
        """Abandon the step if asked to stop. A step takes seconds on a CPU; elsewhere, and with other processes, it is finished."""
        if self._asked_to_stop() and args.device.type == "cpu" and args.world_size == 1:
            self.stopped = True
            raise Stopped

    def on_step_end(self, args, state, control, **kwargs):
        loss, accuracy, tokens = self.trainer.measured
        row = {"step": state.global_step, "loss": loss, "accuracy": accuracy}
        row["tokens"] = tokens + (self.curve[-1]["tokens"] if self.curve else 0)
        row["seconds"] = self.seconds
        self.curve.append(row)
        if self.on_step is not None and state.is_world_process_zero:
            self.on_step(row | {"of": state.max_steps})
        due = time.perf_counter() - self._saved > self._pause or (self.every_steps and state.global_step % self.every_steps == 0)
        # one process decides for all
        stop, due, interrupted = self.trainer.agree(self._asked_to_stop(), due, self.interrupted)
        if stop:
            control.should_training_stop = self.stopped = True
        if interrupted:
            self.interrupted = True
        control.should_save = bool(stop or due)
