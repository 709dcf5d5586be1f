"""A soak, by hand: random operations of a study for a given time under memory and disk pressure; nothing may break, grow or change.

    python tests/soak.py [--minutes 120] [--seed 0] [--memory 256]

Trains a little and stops, goes on, reranks, evaluates, builds states, sweeps; some operations run in a fork that is killed with
SIGKILL, some on a disk with hardly any room. The results lie on a small disk of their own (tmpfs, where this user may mount one).
After every operation all records must be readable and, whatever happened on the way, those of a finished step must be the same as
the first time; the memory of this process must not grow.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import conftest  # noqa: F401  the environment of every test, before torch is imported
import torch
from tqdm.std import tqdm

from rankmamba.errors import InputError
from rankmamba.experiment import Experiment
from rankmamba.reporting.tables import final_table, format_table
from rankmamba.reranker import Reranker
from rankmamba.results import fingerprint, read_records
from rankmamba.states import DocumentStates
from rankmamba.train import TrainConfig

SYSTEMS = ("tiny-mamba", "tiny-mamba2", "tiny-neox", "tiny-bert")
ROOM = 96 << 20  # bytes of the disk
GROWTH = 32 << 20  # bytes that the memory may grow by after the warm-up
WARM_UP, WINDOW = 40, 200  # operations: that do not count, and that a mean of the memory is taken over; one of them says little


class Soak:
    """One study that is worked on at random; `first` remembers the fingerprint of every step when it was first finished."""

    def __init__(self, folder: Path, generator: random.Random):
        self.folder, self.random, self.first = folder, generator, {}
        self.counts: Counter[str] = Counter()

    def experiment(self, seed: int) -> Experiment:
        return Experiment(self.folder / "study", "rankmamba/tiny", "tiny", seed=seed)

    def some(self) -> tuple[str, Experiment]:
        return self.random.choice(SYSTEMS), self.experiment(self.random.randrange(2))

    def config(self, system: str, experiment: Experiment) -> TrainConfig:
        settings = {"max_steps": 12, "group_size": 4, "batch_size": 2, "max_length": 64, "max_query_length": 16}
        return TrainConfig(system, learning_rate=1e-3, seed=experiment.seed, **settings)

    # every operation is a step that may be killed, and that the same call finishes

    def first_stage(self) -> None:
        _, experiment = self.some()
        experiment.first_stage("bm25", 0.9, 0.4)

    def train(self) -> None:
        system, experiment = self.some()
        stop, last = threading.Event(), self.random.choice([1, 3, 6, 1000])
        experiment.train(self.config(system, experiment), on_step=lambda row: row["step"] >= last and stop.set(), stop=stop)

    def rerank(self) -> None:
        system, experiment = self.some()
        experiment.first_stage("bm25", 0.9, 0.4)
        experiment.train(self.config(system, experiment))
        experiment.rerank(system, "bm25", top_k=10, show_progress=False)

    def evaluate(self) -> None:
        system, experiment = self.some()
        experiment.first_stage("bm25", 0.9, 0.4)
        experiment.evaluate("bm25")
        experiment.train(self.config(system, experiment))
        experiment.rerank(system, "bm25", top_k=10, show_progress=False)
        experiment.evaluate(system)
        experiment.evaluate(system, mixed_with="bm25")

    def states(self) -> None:
        system, experiment = self.random.choice(SYSTEMS[:3]), self.experiment(0)
        experiment.train(self.config(system, experiment))
        # in bfloat16 scores from states are close to those in full, not the same
        reranker = Reranker.from_pretrained(experiment.model_path(system), dtype=torch.float32)
        test, dtype = experiment.split("test"), self.random.choice(["float32", "int8"])
        folder = self.folder / "states" / f"{system}-{dtype}"
        states = DocumentStates.build(reranker, test, folder, dtype)
        query = next(iter(test.queries.values()))
        assert len(states.rank(query, list(test.documents))) == len(test.documents)  # every state is as it was written
        if dtype == "float32":
            doc_ids = list(test.documents)[:10]
            full = reranker.predict([(query, test.documents[doc_id]) for doc_id in doc_ids])
            found = {row["doc_id"]: row["score"] for row in states.rank(query, doc_ids)}
            assert max(abs(found[doc_id] - score) for doc_id, score in zip(doc_ids, full, strict=True)) < 1e-4
        if self.random.random() < 0.3:
            shutil.rmtree(folder)

    def forget(self) -> None:
        """Delete a model or a run: it must come again as it was."""
        system, experiment = self.some()
        if self.random.random() < 0.5:
            shutil.rmtree(experiment.model_path(system), ignore_errors=True)
        else:
            experiment.run_path(system, "test").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Two studies from one file, in processes of their own."""
        (self.folder / "sweep.yaml").write_text("n_test: [4, 6]\n")
        command = [
            sys.executable,
            "-m",
            "rankmamba.study",
            "--scale",
            "tiny",
            "--only",
            "01",
            "-f",
            str(self.folder / "sweep.yaml"),
        ]
        process = subprocess.run([*command, "--results", str(self.folder / "sweep")], capture_output=True, text=True)
        if process.returncode:
            said = process.stderr.strip().splitlines()[-1]
            raise InputError(f"expected the sweep to end well, got {process.returncode}: {said}")

    def killed(self, operation: Callable[[], None]) -> None:
        """Run an operation in a fork and kill it after a random time."""
        process = os.fork()
        if process == 0:
            tqdm.set_lock(threading.RLock())  # its own is shared by forks, and one that is killed would keep it for all
            with contextlib.suppress(BaseException):
                operation()
            os._exit(0)
        time.sleep(self.random.expovariate(2))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

    @contextlib.contextmanager
    def disk_pressure(self):
        """Leave between nothing and 2 MB of room on the disk."""
        ballast = self.folder / "ballast"
        size = max(0, shutil.disk_usage(self.folder).free - self.random.randrange(2 << 20))
        with contextlib.suppress(OSError), open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size) if size else None
        try:
            yield
        finally:
            ballast.unlink()

    def step(self, pressure: bool) -> str:
        """Do one operation in one of the ways, then check everything; says which."""
        operation = self.random.choices(
            [self.first_stage, self.train, self.rerank, self.evaluate, self.states, self.forget, self.sweep],
            [1, 6, 4, 4, 4, 2, 0.3],
        )[0]
        way = self.random.choices(["plainly", "killed", "on a full disk"], [6, 2, 2 if pressure else 0])[0]
        if way == "killed" and operation != self.sweep:
            self.killed(operation)
        elif way == "on a full disk":
            with self.disk_pressure(), contextlib.suppress(InputError):
                operation()
        else:
            operation()
        self.check()
        self.counts[f"{operation.__name__} {way}"] += 1
        return f"{operation.__name__} {way}"

    def check(self) -> None:
        """Assert what must always hold of the records and files."""
        folder = self.folder / "study"
        records = read_records(folder) if folder.is_dir() else []
        for record in records:
            if record["result"].get("partial"):
                continue
            key = (record["kind"], record["system"], record["seed"])
            assert self.first.setdefault(key, fingerprint(record)) == fingerprint(record), f"{key} is another than the first time"
            assert all(value >= 0 for value in record["timing"].values()), record["timing"]
        if any(record["kind"] == "evaluate" and record["system"] == "bm25" for record in records):
            assert "nan" not in format_table(final_table(records))
        for record in records:
            if record["kind"] == "rerank":
                experiment = self.experiment(record["seed"])
                for part in ("dev", "test"):
                    if experiment.run_path(record["system"], part).is_file():
                        experiment.run(record["system"], part)


def memory(what: str = "VmRSS") -> int:
    """Bytes of memory of this process."""
    return int(re.search(rf"^{what}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


@contextlib.contextmanager
def small_disk():
    """A folder on a small disk, and whether it is one."""
    folder = Path(tempfile.mkdtemp(prefix="rankmamba-soak-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    small = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder, small
    finally:
        if small:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def ballast(mebibytes: int) -> subprocess.Popen:
    """Start a process that takes and gives back memory."""
    program = (
        f"import random, time\nwhile True:\n    b = bytearray(random.randrange(1, {max(2, mebibytes)} << 20)); time.sleep(1)"
    )
    return subprocess.Popen([sys.executable, "-c", program])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=256, help="MiB that another process takes and gives back meanwhile")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no threads but its own
    started, taken = time.monotonic(), []
    other = ballast(options.memory)
    try:
        with small_disk() as (folder, small):
            soak, number = Soak(folder, random.Random(options.seed)), 0
            print("disk pressure: " + ("yes" if small else "no, this user may not mount a tmpfs"))
            while time.monotonic() - started < 60 * options.minutes:
                what, number = soak.step(small), number + 1
                taken.append(memory())
                if number % 20 == 0:
                    clock = f"{(time.monotonic() - started) / 60:.1f} min"
                    print(f"{clock}: {number} operations, {memory() / 2**20:.0f} MiB, last {what}", flush=True)
            print(f"{number} operations in {options.minutes:g} min: {dict(sorted(soak.counts.items()))}")
            if number > WARM_UP:
                first, last = (statistics.mean(part) / 2**20 for part in (taken[WARM_UP : WARM_UP + WINDOW], taken[-WINDOW:]))
                print(f"memory: {first:.0f} MiB over {WINDOW} operations after {WARM_UP}, {last:.0f} MiB over the last {WINDOW}")
                assert last - first <= GROWTH / 2**20, f"the memory grew by {last - first:.0f} MiB"
    finally:
        other.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
