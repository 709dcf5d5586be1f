"""The notebooks, found by glob: committed clean, thin, and executed from first to last at scale tiny."""

import os
import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from rankmamba import study
from rankmamba.reporting.tables import final_table
from rankmamba.results import fingerprint, read_records

NOTEBOOKS = study.notebooks()
ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # notebooks talk to their kernels over the loopback device
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
assert [name for _, name in socket.if_nameindex()] == ["lo"]
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
WITHOUT_NETWORK = ("unshare", "--net", sys.executable, "-c", ALONE)
CAN_DO_WITHOUT = sys.platform == "linux" and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    return study.run("tiny", folder=tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """The study once more, from nothing, and where the system permits it on a machine without a network."""
    folder = tmp_path_factory.mktemp("again")
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= {"HF_HOME": str(folder / "hub"), "IR_DATASETS_HOME": str(folder / "data")}
    command = [*(WITHOUT_NETWORK if CAN_DO_WITHOUT else (sys.executable,)), "-m", "rankmamba.study"]
    arguments = ["--scale", "tiny", "--only", "01,02,03,04,06", "--results", str(folder / "results")]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "results"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_clean_and_stays_thin(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert notebook.metadata.kernelspec.name == "python3"
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    assert "papermill" not in notebook.metadata
    assert len(notebook.cells) <= 25 and len(lines) <= 120
    assert not [line for line in lines if line.lstrip().startswith(("def ", "class "))]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_type_and_a_comment(path):
    for name, parameter in papermill.inspect_notebook(path).items():
        assert parameter["inferred_type_name"] != "None" and parameter["help"], name


@pytest.mark.parametrize("scale", sorted(path.stem for path in (study.NOTEBOOKS / "scales").glob("*.yaml")))
def test_a_scale_names_only_parameters_that_notebooks_have_and_times_each_notebook(scale):
    settings = study.read_scale(scale)
    study.settle(scale)
    not_run = {"05_profile", "06_state_cache"} if scale == "pretrain" else set()
    assert set(settings["minutes"]) == {path.stem for path in NOTEBOOKS} - not_run


def test_the_defaults_in_the_notebooks_are_the_scale_quick():
    quick = study.read_scale("quick")["parameters"]
    for path in NOTEBOOKS:
        for name, parameter in papermill.inspect_notebook(path).items():
            if name in quick:
                assert eval(parameter["default"]) == quick[name], f"{path.stem}: {name}"


def test_every_notebook_runs_at_scale_tiny(executed):
    assert sorted(path.name for path in (executed / "notebooks").glob("*.ipynb")) == [path.name for path in NOTEBOOKS]
    for path in (executed / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]


def test_the_records_hold_every_system_alone_and_mixed(executed):
    table = final_table(read_records(executed))
    systems = study.read_scale("tiny")["parameters"]["systems"]
    assert {"bm25", "bm25-tuned", *systems, *(f"{name} + bm25" for name in systems)} <= set(table["system"])
    assert table["RR@100"].between(0, 1).all()


def test_the_report_is_one_file_that_loads_nothing_from_elsewhere(executed):
    html = (executed / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in html and "nan" not in re.sub(r"<[^>]*>", " ", html).lower().split()
    assert not re.findall(r"<script|<(?:link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+", html)
    assert "No description" not in html and "default-src 'none'" in html  # nor runs what a stranger's records bring


@pytest.mark.skipif(not CAN_DO_WITHOUT, reason="cutting the network off needs Linux and root: unshare --net")
def test_an_installed_study_needs_no_network(executed, again):
    for kind in ("train", "rerank", "evaluate", "states"):
        assert {r["system"] for r in read_records(again, kind)} == {r["system"] for r in read_records(executed, kind)} != set()


def test_the_same_seed_gives_the_same_records(executed, again):
    others = {"profile", "study"}  # of 05, and which notebooks ran
    first, second = (
        sorted((r["kind"], r["system"], fingerprint(r)) for r in read_records(folder) if r["kind"] not in others)
        for folder in (executed, again)
    )
    assert first == second and {"first_stage", "train", "rerank", "evaluate", "transfer", "states"} <= {
        kind for kind, *_ in first
    }


def test_a_second_run_finds_what_was_done_and_changes_no_record(executed):
    def records():
        return {
            path.name: path.read_bytes() for path in (executed / "records").glob("*.json") if not path.name.startswith("study-")
        }

    before = records()
    study.run("tiny", only="02", folder=executed)
    assert records() == before and any(name.startswith("train-") for name in before)
