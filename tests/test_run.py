"""run.py: what it installs and when, what it hands on, and its sentences where it cannot. A small script stands in for Python."""

import ast
import http.server
import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
THIS_PYTHON = sys.executable
PYTEST = "-m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder"
FAKE_PYTHON = """#!/bin/sh
cd {folder}
echo "$@" >> calls
case "$*" in
    "-c import pip") ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip "*) if [ -e pip_fails ]; then cat pip_fails; exit 1; fi ;;
    "-m rankmamba.study sleep") echo started; exec sleep 60 ;;
    *) echo "$OMP_WAIT_POLICY ${{PATH%%:*}} $GLIBC_TUNABLES ${{PYTHONDONTWRITEBYTECODE-kept}}" > seen; exit 7 ;;
esac
"""
PROJECT = ["--no-deps torch", "--require-hashes --requirement requirements.txt", "--no-build-isolation --editable ."]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for Python is a shell script")


def loaded(folder):
    """run.py of a folder, as a module."""
    spec = importlib.util.spec_from_file_location("run_of_checkout", folder / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    return run


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, its run.py imported as `.run`, a stand-in as its Python. `.calls()`: what that was asked to do."""
    for name in ("run.py", "pyproject.toml", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "fake_python"
    python.write_text(FAKE_PYTHON.format(folder=tmp_path))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    run = loaded(tmp_path)
    monkeypatch.setattr(run.sys, "executable", str(python))
    monkeypatch.setattr(run, "cpu_index", lambda: [])
    monkeypatch.setattr(run, "has_chromium", lambda: False)

    def calls():
        lines = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        (tmp_path / "calls").unlink(missing_ok=True)
        return [line.split("--constraint constraints.txt ")[-1] for line in lines if line != "-c import pip"]

    return SimpleNamespace(run=run, folder=tmp_path, calls=calls, python=python)


def installed(checkout, *extras):
    """Make `checkout` one in which everything is installed."""
    for extra in extras or [None]:
        checkout.run.install(extra)
    checkout.calls()


def test_a_first_start_installs_torch_then_what_has_hashes_then_the_project_and_the_extra_and_a_second_one_nothing(
    checkout, capsys
):
    assert checkout.run.main(["test", "-k", "one thing"]) == 7
    assert checkout.calls() == [
        f"-m venv {checkout.folder}/.venv",
        *PROJECT,
        "rankmamba[test]",
        f"{PYTEST} -k one thing",
    ]
    assert "[5/5] installing what test needs" in capsys.readouterr().out
    assert checkout.run.main(["test"]) == 7
    assert checkout.calls() == [PYTEST]


def test_the_command_gets_its_arguments_a_passive_openmp_large_pages_kept_bytecode_and_the_venv_first_on_its_path(
    checkout, monkeypatch
):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for name in checkout.run.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    installed(checkout)
    assert checkout.run.main(["study", "--scale", "tiny", "-p", "seed=1"]) == 7
    assert checkout.calls() == ["-m rankmamba.study --scale tiny -p seed=1"]
    assert (checkout.folder / "seen").read_text().split() == [
        "passive",
        f"{checkout.folder}/.venv/bin",
        checkout.run.SETTINGS["GLIBC_TUNABLES"],
        "kept",
    ]


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "requirements.txt", "constraints.txt", "setup.py", "rankmamba/scan/native/kernels.cpp"]
)
def test_a_changed_requirement_or_native_source_installs_again_and_keeps_the_extras(checkout, name):
    installed(checkout, "lab")
    path = checkout.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        handle.write("\n")
    checkout.run.install(None)
    assert checkout.calls() == [*PROJECT, "rankmamba[lab]"]


def test_another_command_adds_its_extra_only(checkout):
    installed(checkout, "test")
    checkout.run.install("lab")
    assert checkout.calls() == ["rankmamba[lab,test]"]
    checkout.run.install("test")
    assert checkout.calls() == []


def test_where_there_is_a_browser_the_tests_bring_what_drives_it(checkout, monkeypatch):
    installed(checkout, "test")
    monkeypatch.setattr(checkout.run, "has_chromium", lambda: True)
    assert checkout.run.main(["test"]) == 7
    assert checkout.calls() == ["rankmamba[e2e,test]", PYTEST]


@pytest.mark.parametrize("damage", ["killed while installing", "no Python in it any more", "half a stamp"])
def test_a_half_made_venv_is_made_again(checkout, damage):
    installed(checkout)
    (checkout.run.VENV / "relic").touch()
    if damage == "no Python in it any more":
        checkout.run.PYTHON.unlink()
    else:
        checkout.run.STAMP.write_text('{"unfinished": true}' if damage == "killed while installing" else '{"fing')
    checkout.run.install(None)
    assert checkout.calls()[0].startswith("-m venv")
    assert not (checkout.run.VENV / "relic").exists()


def test_a_venv_without_pip_that_is_not_ours_is_left_alone(checkout, capsys):
    checkout.run.PYTHON.parent.mkdir(parents=True)
    checkout.run.PYTHON.write_text("#!/bin/sh\nexit 1\n")
    checkout.run.PYTHON.chmod(0o755)
    assert sentence_of(checkout, "study", capsys).endswith("has no working pip: rename or delete it, then start again.")
    assert checkout.run.PYTHON.exists()


@pytest.mark.parametrize(
    "break_it, said",
    [
        (lambda folder: (folder / ".venv").write_text(""), "is no folder and leads to none"),
        (lambda folder: (folder / ".venv").symlink_to(folder / "unmounted" / "venv"), "is no folder and leads to none"),
        (lambda folder: made_with(folder, "3.10.12"), "is of Python 3.10, which rankmamba does not run on"),
    ],
    ids=["a file", "a link to a disk that is not mounted", "another Python's"],
)
def test_a_venv_that_cannot_be_used_is_one_sentence_before_anything_is_installed_and_doctor_has_it_too(
    break_it, said, checkout, capsys
):
    break_it(checkout.folder)
    run = loaded(checkout.folder)  # where the link leads is found out at the start
    with pytest.raises(SystemExit):
        run.main(["study"])
    assert f"{said}: rename or delete it" in capsys.readouterr().err and checkout.calls() == []
    run.doctor()
    assert said in capsys.readouterr().out


def made_with(folder, version):
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(folder / "fake_python", folder / ".venv" / "bin" / "python")
    (folder / ".venv" / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")


def test_a_folder_that_may_not_be_written_is_said(checkout, monkeypatch, capsys):
    monkeypatch.setattr(checkout.run.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(SystemExit):
        checkout.run.main(["study"])
    assert "you may not write in" in capsys.readouterr().err and checkout.calls() == []


def test_a_folder_whose_name_is_no_text_has_a_fingerprint(checkout, monkeypatch):
    monkeypatch.setattr(checkout.run, "ROOT", Path(os.fsdecode(b"/caf\xe9")))
    assert len(checkout.run.fingerprint()) == 64


def test_two_starts_at_once_do_not_install_at_once(checkout):
    fcntl = pytest.importorskip("fcntl")
    installed(checkout)
    with open(checkout.folder / "pyproject.toml") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen([THIS_PYTHON, "run.py", "lab"], cwd=checkout.folder, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "waiting for another run.py that is installing here ...\n"
        assert checkout.calls() == []
    assert second.communicate(timeout=20)[0].startswith("[1/1] installing what lab needs")
    assert second.returncode == 7


def sentence_of(checkout, command, capsys):
    """Return the one line that a failing `command` leaves on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        checkout.run.main([command])
    assert ended.value.code not in (0, None)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_run_py_can_be_parsed_by_pythons_that_it_refuses():
    ast.parse((ROOT / "run.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 2), (3, 15, 0)])
def test_an_unsupported_python_is_told_which_one_to_use(checkout, monkeypatch, capsys, version):
    monkeypatch.setattr(checkout.run.sys, "version_info", version)
    monkeypatch.setattr(checkout.run, "works", lambda *command: command[0] == "python3.12")
    assert sentence_of(checkout, "study", capsys).endswith("this machine has python3.12, start run.py with that.")
    monkeypatch.setattr(checkout.run, "works", lambda *command: False)
    assert sentence_of(checkout, "study", capsys).endswith("install one and start run.py with it.")


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_the_package_to_install(checkout, monkeypatch, capsys, module):
    monkeypatch.setattr(checkout.run.importlib.util, "find_spec", lambda name: None if name == module else object())
    package = f"python3.{sys.version_info.minor}-venv"
    assert f"lacks its module {module}: run `sudo apt-get install {package}`" in sentence_of(checkout, "study", capsys)


def test_too_little_disk_is_said_before_anything_is_installed(checkout, monkeypatch, capsys):
    monkeypatch.setattr(checkout.run, "has_nvidia", lambda: False)
    monkeypatch.setattr(checkout.run.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.25e9))
    assert "needs about 3 GB" in (line := sentence_of(checkout, "study", capsys)) and "has 1.2 GB free" in line
    assert checkout.calls() == []


def test_without_a_network_pip_s_own_words_become_one_sentence_and_nothing_is_lost(checkout, capsys):
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | unreachable
    said = subprocess.run([THIS_PYTHON, "-m", "pip", "install", "not-installed"], env=environment, capture_output=True, text=True)
    installed(checkout)
    (checkout.folder / "pip_fails").write_text(said.stdout + said.stderr)
    assert sentence_of(checkout, "lab", capsys).startswith("run.py: pip cannot reach its package registry: check the network")
    assert checkout.calls() == ["rankmamba[lab]"]
    assert checkout.run.main(["study"]) == 7 and checkout.calls() == ["-m rankmamba.study"]


def test_a_full_disk_in_the_middle_is_one_sentence_and_the_next_start_begins_anew(checkout, capsys):
    said = "Installing collected packages: torch\nERROR: Could not install packages: [Errno 28] No space left on device\n"
    (checkout.folder / "pip_fails").write_text(said)
    assert sentence_of(checkout, "study", capsys).startswith("run.py: the disk is full: make room")
    assert json.loads(checkout.run.STAMP.read_text()) == {"unfinished": True}


def test_any_other_failure_names_pip_s_error_and_its_log(checkout, capsys):
    (checkout.folder / "pip_fails").write_text("ERROR: No matching distribution found for torch==2.13.0\nnote: more\n")
    line = sentence_of(checkout, "study", capsys)
    assert "ERROR: No matching distribution found for torch==2.13.0; all of what it said is in" in line
    assert line.endswith(f"{checkout.run.LOG}.")


def test_an_unknown_command_names_the_known_ones(checkout, capsys):
    assert sentence_of(checkout, "studdy", capsys) == "run.py: expected study, lab, test or doctor, got 'studdy'."


def test_ctrl_c_ends_the_command_and_run_py_at_once_with_130(checkout):
    installed(checkout)
    running = subprocess.Popen(
        [THIS_PYTHON, "run.py", "study", "sleep"],
        cwd=checkout.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background it is ignored
    )
    assert running.stdout.readline() == "started\n"
    time.sleep(0.3)  # until run.py waits and the command sleeps
    start = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 130 and said.strip() == "run.py: stopped." and time.monotonic() - start < 2


def test_the_index_of_cpu_builds_is_used_only_where_it_answers_and_no_gpu_is_there(checkout, monkeypatch):
    spec = importlib.util.spec_from_file_location("run_untouched", ROOT / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run.sys, "platform", "linux")
    with http.server.HTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(run, "CPU_INDEX", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(run, "has_nvidia", lambda: False)
        assert run.cpu_index() == ["--extra-index-url", run.CPU_INDEX]
        monkeypatch.setattr(run, "has_nvidia", lambda: True)
        assert run.cpu_index() == []
        server.shutdown()
    monkeypatch.setattr(run, "has_nvidia", lambda: False)
    assert run.cpu_index() == []


def test_doctor_installs_nothing_and_says_what_it_finds_without_an_installation(checkout, capsys):
    assert checkout.run.main(["doctor"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(said) == {"Python", "CPU", "GPU", "compiler", "disk", ".venv"}
    assert said[".venv"].endswith("`python3 run.py study`") and checkout.calls() == []
