"""Many studies from one file of parameter sets: `python -m rankmamba.study -f sweep.yaml [--jobs 2 | --submitit ...]`.

The file is a grid, {name: [value, ...]}, of which every combination runs, or a list of sets, [{name: value}, ...]. Each set is a
study of its own in a folder of its own. What is finished has a record, so the same command resumes where it stopped. Sets that differ in
the seed alone are reported together at the end.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.sources import say
from ..errors import InputError
from ..files import replacing, slug, write_text
from ..study import REPORT, clock, record_config
from ..study import run as run_study
from .cluster import starter
from .parameters import ROOT, check, known, notebooks, parse_yaml, settle, yaml_text

if TYPE_CHECKING:
    import pandas as pd

PATIENCE = 10  # seconds in which a study that was asked to end does so


@dataclass(frozen=True)
class Run:
    """One set of parameters: what the file gives, the configuration that results, its folder, the arguments of `rankmamba.study`."""

    given: dict
    config: dict
    folder: Path
    arguments: list[str]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def __str__(self) -> str:
        return ", ".join(f"{name}={_text(value)}" for name, value in self.given.items())


def read_sweep(path: str | Path, fits: dict[str, tuple]) -> list[dict]:
    """Read the parameter sets of a sweep file. fits: what they may name (`parameters.known`).

    Raises:
        InputError: the file cannot be read, is neither a grid nor a list of sets, holds a set twice, or names an unknown
            parameter or a value of another type; with the line.
    """
    root, loader = parse_yaml(yaml_text(Path(path)), path)

    def where(node) -> str:
        return f"{path}:{node.start_mark.line + 1}"

    def checked(name, node):
        value = loader.construct_object(node, deep=True)
        check(name.value, value, fits, where(node))
        return name.value, value

    if root.id == "sequence" and all(node.id == "mapping" for node in root.value):
        sets = [(dict(checked(*pair) for pair in node.value), where(node)) for node in root.value]
    elif root.id == "mapping" and all(node.id == "sequence" for _, node in root.value):
        axes = [[checked(name, node) for node in values.value] for name, values in root.value]
        sets = [(dict(combination), where(root)) for combination in itertools.product(*axes)] if axes else []
    else:
        wrong = next((node for _, node in root.value if node.id != "sequence"), root) if root.id == "mapping" else root
        raise InputError(f"expected {{name: [value, ...]}} or [{{name: value}}, ...], got another form ({where(wrong)})")
    if not sets or not all(given for given, _ in sets):
        raise InputError(f"expected at least one parameter in every set, got none ({path})")
    seen = set()
    for given, line in sets:
        if _text(given) in seen:
            raise InputError(f"expected different sets of parameters, got {_text(given)} twice ({line})")
        seen.add(_text(given))
    return [given for given, _ in sets]


def plan(path: Path, scale: str, only: str | None, overrides: dict, folder: Path) -> list[Run]:
    """Return the runs of a sweep, each in a folder named after what the file gives it and a hash of everything that it is given.

    Raises:
        InputError: as in `read_sweep` and `parameters.settle`; or the overrides name a parameter that the file varies.
    """
    settle(scale, only, overrides)
    runs = []
    for given in read_sweep(path, known(notebooks(only))):
        both = sorted(set(given) & set(overrides))
        if both:
            raise InputError(f"expected {both[0]} either as -p or in {path}, got both")
        values = given | overrides
        place = folder / _name(given, [only, values])
        arguments = ["--yes", "--scale", scale, "--results", str(place), *(["--only", only] if only else [])]
        for name, value in values.items():
            arguments += ["-p", f"{name}={_text(value)}"]
        config = record_config(only, settle(scale, only, values))
        runs.append(Run(given, config, place, arguments))
    return runs


def finished(run: Run) -> bool:
    """Whether a run has left its record, made with the same notebooks and parameters."""
    from ..results import find_record

    return find_record(run.folder, "study", config=run.config) is not None


def start_here(jobs: int) -> Callable[[list[str], Path], subprocess.Popen]:
    """Return a function that starts a study, given its arguments and its log, as a local process with its share of the threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))  # further numbers are for nested regions
    threads = int(asked[1]) if asked else cores
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // jobs))}

    def start(arguments: list[str], log: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "rankmamba.study", *arguments]
        with open(log, "w", encoding="utf-8") as said:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)

    return start


def carry_out(runs: list[Run], start: Callable, jobs: int) -> dict[str, str]:
    """Start the runs, `jobs` at a time, and wait for them; returns {run: reason} of those that failed."""
    waiting, running, failed, done = list(runs), [], {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                running.append((run, start(run.arguments, run.log), time.monotonic()))
            time.sleep(0.1)
            ended = [(*entry, code) for entry in running if (code := entry[1].poll()) is not None]
            for run, process, began, code in ended:
                running.remove((run, process, began))
                done += 1
                if code or not finished(run):
                    failed[str(run)] = reason(run, code)
                word = "FAILED" if str(run) in failed else "done"
                say(f"[{done}/{len(runs)}] {run}  {word} after {clock(time.monotonic() - began)}")
    finally:  # when interrupted, end the others too
        for _, process, _ in running:
            process.terminate()
        insist([process for _, process, _ in running if isinstance(process, subprocess.Popen)])
    return failed


def insist(processes: list[subprocess.Popen]) -> None:
    """Wait for processes that were asked to end. Python can lose an interrupt, in the middle of an import, say: ask again, then kill."""
    for once_more in (subprocess.Popen.terminate, subprocess.Popen.kill):
        end = time.monotonic() + PATIENCE
        while (left := [process for process in processes if process.poll() is None]) and time.monotonic() < end:
            time.sleep(0.1)
        for process in left:
            once_more(process)


def reason(run: Run, code: int) -> str:
    """Return why a run failed: the error that its log ends with, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; its log: {run.log}"
    said = run.log.read_text(encoding="utf-8", errors="replace").strip()
    last = said.rpartition("error: ")[2].splitlines() or [f"exit code {code}"]
    return f"{last[0]}; its log: {run.log}"


def measures(runs: list[Run]) -> "pd.DataFrame":
    """The measures of the finished runs: the parameters that vary (as text), collection, system, one column per measure."""
    import pandas as pd

    from ..reporting.tables import tidy
    from ..results import read_records

    names = dict.fromkeys(name for run in runs for name in run.given)
    varied = [name for name in names if len({_text(run.config["parameters"][name]) for run in runs}) > 1 and name != "collection"]
    parts = [pd.DataFrame(columns=[*varied, "collection", "system"])]
    for run in filter(finished, runs):
        values = tidy(read_records(run.folder))
        table = values.pivot(index=["collection", "system"], columns="measure", values="value")
        table = table[values["measure"].unique()].reset_index()
        for place, name in enumerate(varied):
            table.insert(place, name, _text(run.config["parameters"][name]).strip('"'))
        parts.append(table)
    return pd.concat(parts[1:] or parts, ignore_index=True)


def over_seeds(table: "pd.DataFrame") -> "pd.DataFrame":
    """The means of `measures` over seeds, and the number of seeds; the table itself where the seed does not vary."""
    if "seed" not in table:
        return table
    names = [name for name in table.columns[: list(table.columns).index("system") + 1] if name != "seed"]
    groups = table.groupby(names, sort=False)
    means = groups.mean(numeric_only=True)
    means.insert(0, "seeds", groups.size())
    return means.reset_index()


def report_seeds(runs: list[Run], scale: str, only: str | None, overrides: dict, folder: Path) -> list[Path]:
    """Report runs that differ in nothing but the seed, as far as they are finished, as one study of several seeds; returns the reports.

    Their records are copied to a folder of their own, where the notebook of the report reads them. A report that is newer than all of
    them stays.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(_text(_without_seed(run.given)), []).append(run)
    reports = []
    for group in alike.values():
        records = [path for run in group if finished(run) for path in (run.folder / "records").iterdir()]
        if len({path.parent for path in records if path.name.startswith("evaluate-")}) < 2:
            continue
        seeds, given = [run.config["parameters"]["seed"] for run in group], _without_seed(group[0].given)
        place = folder / _name({"seeds": seeds} | given, [only, seeds, given | overrides])
        reports.append(place / "report.html")
        if reports[-1].exists() and reports[-1].stat().st_mtime > max(path.stat().st_mtime for path in records):
            continue
        with replacing(place / "records") as copies:
            copies.mkdir()
            for path in records:
                shutil.copy2(path, copies)
        takes = known(notebooks(REPORT[:2]))
        run_study(scale, REPORT[:2], {name: value for name, value in (given | overrides).items() if name in takes}, place)
    return reports


def run_sweep(
    path: Path, scale: str, only: str | None, overrides: dict, folder: Path | None, jobs: int | None, cluster: dict | None
) -> int:
    """Run what is unfinished of a sweep and print its measures; returns 0, or 1 if a run failed.

    folder: default results/<scale>/sweeps/<name of the file>. jobs: how many run at once; default 1 here, all on a cluster.
    cluster: None for this machine, or settings of submitit's AutoExecutor.

    Raises:
        InputError: the sweep's file, a parameter or a setting cannot be used; nothing is started then.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"expected --jobs of at least 1, got {jobs}")
    folder = (folder or ROOT / "results" / scale / "sweeps" / path.stem).resolve()
    runs = plan(path, scale, only, overrides, folder)
    start = start_here(jobs or 1) if cluster is None else starter(cluster, folder / "submitit")
    rest = [run for run in runs if not finished(run)]
    say(f"{len(runs)} runs, {len(runs) - len(rest)} of them finished before: {folder}")
    failed = carry_out(rest, start, jobs or (1 if cluster is None else len(runs)))
    table = measures(runs)
    write_text(folder / "measures.csv", table.to_csv(index=False))
    if len(table):
        print(over_seeds(table).to_string(index=False, float_format="{:.3f}".format))
    print(f"measures: {folder / 'measures.csv'}")
    for report in report_seeds(runs, scale, only, overrides, folder):
        print(f"report of several seeds: {report}")
    if failed:
        say(f"error: {len(failed)} of {len(runs)} runs failed; what they finished is kept, the same command tries them again")
        for run, why in failed.items():
            say(f"  {run}: {why}")
    return 1 if failed else 0


def _without_seed(given: dict) -> dict:
    return {name: value for name, value in given.items() if name != "seed"}


def _name(given: dict, everything: list) -> str:
    """The name of a folder: what is given, legibly, and a hash of everything that decides."""
    name = "_".join(f"{name}={slug(_text(value))}" for name, value in given.items())
    return f"{name[:60]}-{hashlib.sha256(_text(everything).encode()).hexdigest()[:8]}"


def _text(value) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
