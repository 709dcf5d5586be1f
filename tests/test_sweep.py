"""Sweeps: read strictly, each run once, nothing lost when something dies, here and on a cluster of two workers.

The runs are real ones (`python -m rankmamba.study`, kernels and all) in a checkout whose one notebook is a small one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest

from rankmamba.batch import sweep
from rankmamba.errors import InputError
from rankmamba.results import leave_record, read_records
from rankmamba.study import leave_record as leave_study

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = """\
collection: str = "c"  # a name
results: str = "results"  # a folder
scale: str = "quick"  # a scale
seed: int = 0  # a number
rate: float = 0.5  # a number
names: list = ["a"]  # words
interactive: bool = True  # False in batch
"""
WORK = """\
import time
from pathlib import Path
from rankmamba.results import new_record, write_record
sweep = Path(results).parent
with open(sweep / f"began-{seed}", "a") as log:
    log.write("x")
while (sweep / f"hold-{seed}").exists():
    time.sleep(0.05)
if seed == 13:
    raise RuntimeError("unlucky")
value = {"measures": {"RR@100": {"mean": rate + seed, "low": 0.0, "high": 1.0}}, "per_query": {"RR@100": {"q": rate}}}
write_record(results, new_record("evaluate", "a", f"{collection}/test", scale, seed, {"rate": rate}, value))
"""
REPORT = """\
from rankmamba.results import read_records
print("seeds reported:", *sorted(record["seed"] for record in read_records(results) if record["kind"] == "evaluate"))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with our package, a notebook of few lines and a report of two."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "rankmamba", folder / "rankmamba", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notebooks" / "scales").mkdir(parents=True)
    (folder / "notebooks" / "scales" / "quick.yaml").write_text("parameters: {rate: 0.25}\nminutes: {01_work: 0.1}\n")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    reported = "".join(line for line in PARAMETERS.splitlines(keepends=True) if line.startswith(("results", "scale")))
    for name, parameters, code in (("01_work", PARAMETERS, WORK), ("07_report", reported, REPORT)):
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "notebooks" / f"{name}.ipynb")
    return folder


@pytest.fixture
def start(checkout, tmp_path):
    """Start a sweep as a person would, in a process group of its own; nothing of it outlives the test."""
    started = []

    def start(text, *arguments):
        (tmp_path / "s.yaml").write_text(text)
        command = [sys.executable, "-m", "rankmamba.study", "-f", "s.yaml", "--only", "01", "--results", "out", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **streams))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for below in psutil.Process(process.pid).children(recursive=True):
                below.kill()
            process.kill()


def finish(process):
    """Wait for a sweep: its exit code, and what it said on stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def hold(folder, *seeds):
    """Let the runs of these seeds wait once they have begun, until `release`."""
    (folder / "out").mkdir()
    for seed in seeds:
        (folder / "out" / f"hold-{seed}").touch()


def release(folder, *seeds):
    for seed in seeds:
        (folder / "out" / f"hold-{seed}").unlink()


def begun(folder):
    """{seed: how often a run with it began} from what the notebooks wrote."""
    return {int(path.name.rpartition("-")[2]): len(path.read_text()) for path in (folder / "out").glob("began-*")}


def records(folder):
    """[(kind, seed)] of every record below a sweep."""
    runs = [path for path in (folder / "out").glob("seed=*") if (path / "records").is_dir()]
    return sorted((record["kind"], record["seed"]) for run in runs for record in read_records(run))


def once(*seeds):
    return sorted((kind, seed) for seed in seeds for kind in ("evaluate", "study"))


def test_a_failed_run_is_reported_with_its_reason_and_the_others_stand_in_the_table(start, tmp_path):
    code, out, err = finish(start("- {rate: 1e-3, seed: 1}\n- {seed: 13}\n", "--jobs", "2"))
    assert code == 1
    assert "error: 1 of 2 runs failed" in err
    assert "seed=13: 01_work.ipynb failed in cell 3: RuntimeError: unlucky" in err
    table = pd.read_csv(tmp_path / "out" / "measures.csv")
    row = {"rate": 0.001, "seed": 1, "collection": "c/test", "system": "a", "RR@100": 1.001}
    assert table.to_dict("records") == [row]
    heading, averaged = (line.split() for line in out.splitlines()[:2])
    assert dict(zip(heading, averaged, strict=True)) == {
        "rate": "0.001",
        "collection": "c/test",
        "system": "a",
        "seeds": "1",
        "RR@100": "1.001",
    }


def test_after_a_sigkill_what_is_finished_is_not_done_again(start, tmp_path):
    text = "[{seed: 1}, {seed: 2}]"
    hold(tmp_path, 2)
    first = start(text)
    wait_for(lambda: 2 in begun(tmp_path))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert records(tmp_path) == once(1)
    release(tmp_path, 2)
    code, _, err = finish(start(text))
    assert code == 0 and "2 runs, 1 of them finished before" in err
    assert records(tmp_path) == once(1, 2) and begun(tmp_path) == {1: 1, 2: 2}
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("records/*")}
    assert finish(start(text))[0] == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("records/*")}


def test_a_polite_kill_of_a_sweep_ends_its_studies_too(tmp_path):
    (tmp_path / "s.yaml").write_text("seed: [1, 2]")
    arguments = ["--scale", "tiny", "-f", str(tmp_path / "s.yaml"), "--jobs", "2", "--results", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "rankmamba.study", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(list((tmp_path / "out").rglob(".lock"))) == 2)
        studies = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130
        assert len(studies) >= 2 and psutil.wait_procs(studies, timeout=60)[1] == []
    finally:
        process.kill()


@pytest.mark.parametrize("loses, code", [(1, 5), (9, -signal.SIGKILL)], ids=["asked again", "killed"])
def test_a_study_that_loses_the_kill_is_asked_again_and_then_ended(loses, code, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 3 if loses == 1 else 0.5)  # on a busy machine two requests might be one
    deaf = f"asked = iter(range({loses})); signal.signal(15, lambda *_: next(asked, None) is None and sys.exit(5)); print(1, flush=True)"
    command = [sys.executable, "-c", f"import signal, sys, time; {deaf}; time.sleep(60); time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.terminate()
    sweep.insist([process])
    assert process.wait(timeout=10) == code


def test_sets_that_differ_in_the_seed_alone_are_reported_together(start, tmp_path):
    text = "- {seed: 1}\n- {seed: 2}\n- {rate: 0.1, seed: 1}\n"
    _, out, _ = finish(start(text, "--jobs", "2"))
    (report,) = (tmp_path / "out").glob("seeds=*/report.html")  # the other rate has one seed
    assert "seeds reported: 1 2\n" in report.read_text() and f"report of several seeds: {report}" in out
    made = report.stat().st_mtime_ns
    finish(start(text))
    assert report.stat().st_mtime_ns == made
    os.utime(next((tmp_path / "out").glob("seed=2*/records/evaluate-*")))
    finish(start(text))
    assert report.stat().st_mtime_ns > made


def test_a_cluster_of_two_workers_of_which_one_is_killed_leaves_every_record_once(start, tmp_path):
    pytest.importorskip("submitit", reason="the cluster extra is not installed")
    hold(tmp_path, 1, 2)
    process = start("seed: [1, 2]", "--submitit", "cluster=local")
    wait_for(lambda: set(begun(tmp_path)) == {1, 2})

    def working():
        below = psutil.Process(process.pid).children(recursive=True)
        return [p for p in below if "ipykernel_launcher" in " ".join(p.cmdline())]

    kernels = wait_for(lambda: len(working()) == 2 and working())
    kernels[0].parent().kill()
    release(tmp_path, 1, 2)
    code, _, err = finish(process)
    assert code == 0, err
    assert err.count("died, submitted again") == 1
    assert records(tmp_path) == once(1, 2)
    assert sorted(begun(tmp_path).values()) == [1, 2]


def test_jobs_share_the_threads_of_the_machine(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, env, **streams: seen.append(env["OMP_NUM_THREADS"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    for jobs in (1, 4, 8):
        sweep.start_here(jobs)([], tmp_path / "log")
    assert seen == ["6", "1", "1"]
    for nothing in ("", "abc"):  # as good as unset
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        sweep.start_here(1)([], tmp_path / "log")
        assert int(seen[-1]) >= 1


FITS = {"seed": ("int", 0), "rate": ("float", 0.5), "names": ("list", [])}


@pytest.mark.parametrize(
    "text, sets",
    [
        ("seed: [0, 1]\nrate: [1e-3, 2]", [{"seed": s, "rate": r} for s in (0, 1) for r in (1e-3, 2)]),
        ("names: [[a], [no, 010, '1']]", [{"names": ["a"]}, {"names": ["no", "010", "1"]}]),
        ("- {seed: 1}\n- {rate: 2.5, seed: 1}", [{"seed": 1}, {"rate": 2.5, "seed": 1}]),
    ],
)
def test_a_grid_runs_every_combination_and_a_list_its_sets(text, sets, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    assert sweep.read_sweep(tmp_path / "s.yaml", FITS) == sets


@pytest.mark.parametrize(
    "text, says, line",
    [
        ("seed: [1]\nsede: [2]", "sede", 2),
        ("seed:\n- 1\n- one", "a value of type int for seed, got 'one'", 3),
        ("seed: [true]", "a value of type int for seed, got True", 1),
        ("- {seed: 1}\n- {seed: 1.5}", "a value of type int for seed, got 1.5", 2),
        ("names: [a, b]", "a value of type list for names, got 'a'", 1),
        ("seed: 1", "another form", 1),
        ("- seed", "another form", 1),
        ("seed: [1]\nseed: [2]", "'seed', which comes twice", 2),
        ("- {seed: 1}\n- {seed: 2}\n- {seed: 1}", "twice", 3),
        ("seed: [1\nrate: [", "expected YAML", 2),
        ("seed: &a [1]\nrate: *a", "the reference *a", 2),
        ("seed: [!!python/object:os.system 1]", "expected YAML", 1),
        ("1: [2]", "is not text", 1),
    ],
)
def test_a_wrong_sweep_is_refused_with_its_line(text, says, line, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        sweep.read_sweep(path, FITS)
    assert says in str(error.value) and f"{path}:{line}" in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[{}]", "seed: []", "[" * 5000, "seed: [" + "9" * 5000 + "]", "\x00", "a: \xff"]
)
def test_an_empty_or_hostile_sweep_is_one_clear_error(text, tmp_path):
    (tmp_path / "s.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="s.yaml"):
        sweep.read_sweep(tmp_path / "s.yaml", FITS)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["-f", "missing.yaml"], "missing.yaml"),
        (["-f", "s.yaml", "--jobs", "0"], "--jobs of at least 1"),
        (["-f", "s.yaml", "-p", "seed=3"], "either as -p or in s.yaml"),
        (["-f", "s.yaml", "-p", "sed=3"], "sed"),
        (["-f", "s.yaml", "--submitit", "cluster=local", "memory=3"], "memory"),
        (["-f", "s.yaml", "--submitit", "slurm_partition=gpu"], "expected Slurm, found no sbatch here"),
    ],
)
def test_a_wrong_argument_of_a_sweep_is_named_and_nothing_starts(arguments, says, tmp_path, monkeypatch, capsys):
    from rankmamba import study

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)  # a machine without Slurm
    Path("s.yaml").write_text("seed: [1, 2]")
    assert study.main(["--scale", "tiny", "--results", "out", *arguments]) == 1
    assert says in capsys.readouterr().err and not list(Path("out").glob("*=*"))


def test_jobs_without_a_sweep_is_an_error(capsys):
    from rankmamba import study

    with pytest.raises(SystemExit):
        study.main(["--jobs", "2"])
    assert "-f" in capsys.readouterr().err


def test_a_run_is_finished_only_with_the_same_parameters(tmp_path):
    (tmp_path / "s.yaml").write_text("seed: [1]")
    (run,) = sweep.plan(tmp_path / "s.yaml", "tiny", None, {}, tmp_path / "out")
    assert not sweep.finished(run)
    leave_study(run.folder, "tiny", None, run.config["parameters"], 1.0)
    assert sweep.finished(run) and sweep.measures([run]).empty
    path = next((run.folder / "records").iterdir())
    record = json.loads(path.read_text())
    record["config"]["parameters"]["batch_size"] = 64
    path.write_text(json.dumps(record))
    assert not sweep.finished(run)


def test_new_weights_in_a_folder_that_is_a_system_make_a_run_unfinished(tmp_path):
    (tmp_path / "mine").mkdir()
    weights = tmp_path / "mine" / "model.safetensors"
    weights.write_bytes(b"old")
    (tmp_path / "s.yaml").write_text(f"- {{systems: [{tmp_path / 'mine'}]}}")

    def run():
        return sweep.plan(tmp_path / "s.yaml", "tiny", None, {}, tmp_path / "out")[0]

    leave_study(run().folder, "tiny", None, run().config["parameters"], 1.0)
    assert sweep.finished(run())
    weights.write_bytes(b"new")
    assert not sweep.finished(run())


def test_the_measures_of_a_sweep_have_a_row_a_finished_run_and_system_and_its_seeds_are_averaged(tmp_path):
    (tmp_path / "s.yaml").write_text("batch_size: [4, 8]\nseed: [1, 2]\ntop_k: [5]")
    runs = sweep.plan(tmp_path / "s.yaml", "tiny", None, {}, tmp_path / "out")
    means = {}
    for number, run in enumerate(runs):
        seed, batch_size = run.given["seed"], run.given["batch_size"]
        for system in ("bm25", "nano-x"):
            means[system, batch_size, seed] = mean = 0.1 * number + 0.05 * (system == "bm25")
            result = {"measures": {"RR@10": {"mean": mean, "low": 0, "high": 1}}, "per_query": {"RR@10": {}}}
            leave_record(run.folder, "evaluate", system, "set/test", "tiny", seed, {}, result)
        if number < 3:  # the last one was killed before its end
            leave_study(run.folder, "tiny", None, run.config["parameters"], 1.0)
    table = sweep.measures(runs)
    assert list(table.columns) == ["batch_size", "seed", "collection", "system", "RR@10"] and len(table) == 6
    for row in table.to_dict("records"):
        assert row["RR@10"] == means[row["system"], int(row["batch_size"]), int(row["seed"])]
    averaged = sweep.over_seeds(table).set_index(["batch_size", "system"])
    assert list(averaged.columns) == ["collection", "seeds", "RR@10"]
    assert averaged["seeds"].to_dict() == {(size, name): n for size, n in (("4", 2), ("8", 1)) for name in ("bm25", "nano-x")}
    for (size, system), mean in averaged["RR@10"].items():
        seeds = (1, 2) if size == "4" else (1,)
        assert mean == pytest.approx(sum(means[system, int(size), seed] for seed in seeds) / len(seeds))
    alone = table.drop(columns="seed")
    assert sweep.over_seeds(alone) is alone
