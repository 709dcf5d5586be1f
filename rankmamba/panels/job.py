"""Work in a background thread: watched, stoppable, never silent about errors."""

import threading
import time
import traceback
from collections.abc import Callable

REFRESH_SECONDS = 0.2
RATE_SECONDS = 10  # how far back the rate looks: work that a resumed run finds done passes at once, and models differ in speed


class Job:
    """One piece of work in a thread of its own.

    work(job) does it: it calls `job.report` now and then, ends soon after `job.stop` is set, and touches no widget. watch(job) is
    called a few times a second while it runs and once when it has ended. after: a job that must end first.

    done, total: how far the job is, in units of its work. result: what `work` returned. error: the exception that ended it.
    """

    def __init__(self, work: Callable[["Job"], object], watch: Callable[["Job"], None], after: "Job | None" = None):
        self.stop, self.ended = threading.Event(), threading.Event()
        self.done = self.total = 0
        self.result, self.error, self.traceback = None, None, ""
        self._work, self._watch, self._after = work, watch, after
        self._begun = self._last = time.monotonic()
        self._marks: list[tuple[float, int]] = []  # (when, how much was done); the first is the last from before RATE_SECONDS
        self._watcher = threading.Thread(target=self._observe, name="rankmamba watch", daemon=True)

    def start(self) -> "Job":
        """Begin. Working and watching have a thread each, so a long step and a slow drawing do not hold each other up."""
        threading.Thread(target=self._run, name="rankmamba job", daemon=True).start()
        self._watcher.start()
        return self

    def report(self, done: int, total: int) -> None:
        """Report how far the work is."""
        now, marks = time.monotonic(), self._marks
        if not marks or now - marks[-1][0] > REFRESH_SECONDS:
            marks = [*marks, (now, done)]
        recent = next(place for place, (then, _) in enumerate(marks) if now - then < RATE_SECONDS)
        self._marks = marks[max(0, recent - 1) :]
        self.done, self.total = done, total

    def fail(self, error: BaseException) -> None:
        """Keep the exception being handled as the job's error, and ask the work to stop."""
        self.error, self.traceback = error, traceback.format_exc()
        self.stop.set()

    def cancel(self) -> None:
        """Ask the work to stop and wait until it and the watcher have ended."""
        self.stop.set()
        self.ended.wait()
        if threading.current_thread() is not self._watcher:
            self._watcher.join()

    @property
    def state(self) -> str:
        """running, stopping, stopped, failed or finished."""
        if not self.ended.is_set():
            return "stopping" if self.stop.is_set() else "running"
        return "failed" if self.error else "stopped" if self.stop.is_set() else "finished"

    @property
    def elapsed(self) -> float:
        """Seconds since the work began, up to its end."""
        return (self._last if self.ended.is_set() else time.monotonic()) - self._begun

    @property
    def remaining(self) -> float | None:
        """Seconds that are left at the recent rate; None while it is unknown."""
        then, before = next(iter(self._marks), (0, self.done))
        steps = self.done - before
        if steps <= 0 or self.ended.is_set():
            return None
        return (time.monotonic() - then) / steps * (self.total - self.done)

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._after.ended.wait()
                self._after = None
            self._begun = time.monotonic()
            if not self.stop.is_set():
                self.result = self._work(self)
        except BaseException as error:  # in a thread, an exception not kept here would vanish silently
            self.fail(error)
        finally:
            self._last = time.monotonic()
            self.ended.set()

    def _observe(self) -> None:
        while not self.ended.wait(REFRESH_SECONDS):
            self._watch(self)
        self._watch(self)
