"""Runs of a sweep on a cluster, through submitit.

Why submitit: the clusters this is for run Slurm, the records are on a disk that all machines share anyway, and it is a small
package without daemons. Ray would bring a cluster of its own, which nothing here needs.
"""

import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ..errors import InputError

TRIES = 3  # how often a job that dies with its machine is submitted


class Job:
    """A study on the cluster, which can be polled and ended as a process can; one that dies without an answer is submitted again."""

    def __init__(self, executor, arguments: list[str], log: Path):
        self.submit = lambda: executor.submit(study, arguments, str(log))
        self.log, self.job, self.tries = log, self.submit(), 1

    def poll(self) -> int | None:
        """Return None while it runs, then its exit code."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not self.job.done():
            return None
        try:
            return self.job.result()
        except FailedJobError as error:  # the job itself raised an error
            reason = (str(error).strip() or "it failed without a word").splitlines()[-1]
        except UncompletedJobError:
            reason = f"job {self.job.job_id} died"
            if self.tries < TRIES:
                print(f"{self.log.parent.name}: {reason}, submitted again", file=sys.stderr, flush=True)
                self.job, self.tries = self.submit(), self.tries + 1
                return None
        with open(self.log, "a", encoding="utf-8") as said:
            print(f"error: {reason}", file=said)
        return 1

    def terminate(self) -> None:
        self.job.cancel()


def starter(settings: dict, folder: Path) -> Callable[[list[str], Path], Job]:
    """Return a function that submits a study, given its arguments and its log.

    settings: of submitit's AutoExecutor, such as timeout_min, cpus_per_task or slurm_partition; cluster="local" stays on this machine.
    folder: for submitit's own files.

    Raises:
        InputError: submitit is not installed, or does not know a setting, or there is no Slurm here.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("expected the package submitit, found none; run `pip install 'rankmamba[cluster]'`") from error
    settings = {"name": "rankmamba", "timeout_min": 24 * 60} | settings  # submitit's own limit is five minutes
    cluster = settings.pop("cluster", "slurm")
    if cluster == "slurm" and not shutil.which("sbatch"):
        remedy = "start it on a machine of the cluster, say cluster=local, or leave --submitit out"
        raise InputError(f"expected Slurm, found no sbatch here; {remedy}")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**settings)
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"expected settings of submitit's AutoExecutor, got {settings}: {error}") from error
    return lambda arguments, log: Job(executor, arguments, log)


def study(arguments: list[str], log: str) -> int:
    """What a job runs: one study, its output in the file `log`; returns its exit code."""
    from ..study import main

    with open(log, "w", encoding="utf-8", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
        return main(arguments)
