#!/usr/bin/env python3
"""rankmamba from one command: makes .venv, installs what is needed into it, runs.

    python3 run.py study [--scale quick ...]   run the notebooks; a table and a report at the end (see: study --help)
    python3 run.py lab [...]                   open JupyterLab on the notebooks
    python3 run.py test [...]                  run the tests (arguments go to pytest)
    python3 run.py doctor                      what this machine has, what is missing and what to do about it

Standard library only, and readable for Python 3.6: an old Python gets a sentence, not a traceback.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, two installations at once do not wait for each other
    fcntl = None

ROOT = Path(__file__).resolve().parent
VENV = (ROOT / ".venv").resolve()  # it may be a link to a larger disk
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "rankmamba.json"  # what is installed, or {"unfinished": true}
LOG = VENV / "rankmamba.log"  # what the last step of an installation said

INSTALLED = ("pyproject.toml", "requirements.txt", "constraints.txt", "setup.py")  # the files that say what is installed
PYTHONS = ((3, 11), (3, 14))  # the oldest and the newest Python that constraints.txt has versions for
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# For what is started here, unless the caller has set them. OpenMP's waiting threads would take the cores from other work. glibc
# would give the memory of every large tensor back to the system, which makes new pages for the next one: a fifth of a step of training.
SETTINGS = {
    "OMP_WAIT_POLICY": "passive",
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}" for name in ("mmap_max=0", f"trim_threshold={2**40}", f"top_pad={2**26}", "hugetlb=1")
    ),
}
EXTRA = {"study": None, "lab": "lab", "test": "test"}
MODULE = {
    "study": ["rankmamba.study"],
    "lab": ["jupyterlab", f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/notebooks"],
    "test": ["pytest", "-q", "--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder"],
}


def main(arguments):
    """Run one command; return its exit code."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    if command == "doctor":
        return doctor()
    if command not in MODULE:
        stop(f"expected study, lab, test or doctor, got {command!r}", code=2)
    if python_problem():
        stop(python_problem())
    install("e2e" if command == "test" and has_chromium() else EXTRA[command])
    return run(["-m", *MODULE[command], *rest])


def stop(sentence, code=1):
    """End with one sentence that says what is wrong and what to do."""
    print(f"run.py: {sentence}.", file=sys.stderr)
    sys.exit(code)


def python_problem():
    """Return why this Python cannot make the environment and what to do, or None."""
    oldest, newest = PYTHONS
    if not oldest <= sys.version_info[:2] <= newest:
        names = [f"python3.{minor}" for minor in range(newest[1], oldest[1] - 1, -1)]
        other = next((name for name in names if works(name, "-V")), None)
        return f"rankmamba needs Python 3.{oldest[1]} to 3.{newest[1]}, this is Python {platform.python_version()}: " + (
            f"this machine has {other}, start run.py with that" if other else "install one and start run.py with it"
        )
    missing = next((name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None), None)
    if missing:
        return (
            f"this Python lacks its module {missing}: run `sudo apt-get install python3.{sys.version_info[1]}-venv` "
            "(where there is no apt-get: install Python again, completely), then start again"
        )
    return None


def venv_problem():
    """Return why .venv cannot be made or brought up to date and what to do, or None."""
    remedy = "rename or delete it, then start again"
    if not os.access(str(ROOT / "pyproject.toml"), os.W_OK):
        return f"you may not write in {ROOT}: copy this folder to one of your own, then start again"
    if not VENV.parent.is_dir() or VENV.is_file():
        return f"{ROOT / '.venv'} is no folder and leads to none: {remedy}"
    if PYTHON.exists() and not read_stamp() and not venv_works():
        return f"{VENV} was made by something else and has no working pip: {remedy}"
    settings = VENV / "pyvenv.cfg"
    said = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
    version = re.search(r"^version\w* *= *(\d+)\.(\d+)", said, re.MULTILINE)
    if version and not PYTHONS[0] <= tuple(map(int, version.groups())) <= PYTHONS[1]:
        return f"{VENV} is of Python {version[1]}.{version[2]}, which rankmamba does not run on: {remedy}"
    return None


def disk_problem(needed_gb):
    """Return that the disk has less than `needed_gb` free and what to do, or None."""
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb >= needed_gb:
        return None
    return (
        f"the installation needs about {needed_gb:g} GB, the disk of {ROOT} has {free_gb:.1f} GB free: "
        "make room or move this folder to a larger disk, then start again"
    )


def has_nvidia():
    """Whether an NVIDIA driver is installed."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def has_chromium():
    """Whether there is a browser that the tests can drive."""
    return any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))


def install(extra):
    """Bring .venv up to date with this folder; at once when it is."""
    if up_to_date(extra):
        return
    if venv_problem():
        stop(venv_problem())
    with open(str(ROOT / "pyproject.toml"), "r+") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("waiting for another run.py that is installing here ...", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        if not up_to_date(extra):
            update(extra)


def update(extra):
    """Carry out the missing steps. If one is interrupted, the next start begins again with an empty .venv."""
    begun, wanted, stamp, steps = time.monotonic(), fingerprint(), read_stamp(), []
    if not venv_works() or "unfinished" in stamp:
        stamp = {}
        shutil.rmtree(str(VENV), ignore_errors=True)
        VENV.mkdir()
        steps.append(("making .venv", [sys.executable, "-m", "venv", VENV]))
    problem = disk_problem(0.5 if stamp else 9 if has_nvidia() else 3)
    if problem:
        stop(problem)
    if stamp.get("fingerprint") != wanted:
        # PyTorch is not in requirements.txt: which of its builds is right depends on the machine, and so does the hash.
        steps.append(("installing PyTorch", [*pip("--no-deps", "torch"), *cpu_index()]))
        steps.append(("installing what rankmamba needs", pip("--require-hashes", "--requirement", "requirements.txt")))
        # Without build isolation the optional native extension is built with the setuptools of requirements.txt. What comes in
        # here besides is what a CUDA build of torch pins itself.
        steps.append(("installing rankmamba", pip("--no-build-isolation", "--editable", ".")))
    extras = sorted({*stamp.get("extras", []), extra} - {None})
    if extras:
        steps.append((f"installing what {' and '.join(extras)} needs", pip(f"rankmamba[{','.join(extras)}]")))
    STAMP.write_text('{"unfinished": true}')
    for number, (what, command) in enumerate(steps, 1):
        failure = step(f"[{number}/{len(steps)}] {what}", command)
        if failure:
            if "Installing collected packages" not in LOG.read_text(errors="replace"):
                STAMP.write_text(json.dumps(stamp))  # nothing was changed yet
            stop(failure)
    STAMP.write_text(json.dumps({"fingerprint": wanted, "extras": extras}))
    print(f"installed into {VENV} in {time.monotonic() - begun:.0f} s", flush=True)


def fingerprint():
    """Return a hash of everything that decides what is installed, the place included: a moved .venv does not work."""
    digest = hashlib.sha256(os.fsencode(str(ROOT)))
    native = sorted(path for path in ROOT.glob("rankmamba/scan/**/*") if path.suffix in (".cpp", ".h"))
    for path in [*(ROOT / name for name in INSTALLED), *native]:
        if path.exists():
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def up_to_date(extra):
    """Whether .venv holds what this folder asks for."""
    stamp = read_stamp()
    return stamp.get("fingerprint") == fingerprint() and extra in [None, *stamp["extras"]] and venv_works()


def read_stamp():
    """Return what an earlier start has noted in .venv, {} if nothing."""
    try:
        return json.loads(STAMP.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        return {"unfinished": True}


def venv_works():
    """Whether the Python of .venv starts and has pip: not so after an interruption, or when the Python under it has gone."""
    return works(PYTHON, "-c", "import pip")


def works(*command):
    """Whether a program can be started and ends well."""
    try:
        return subprocess.call([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def pip(*arguments):
    """Return the command that installs something in its tested version."""
    quiet = ["--no-input", "--no-compile", "--disable-pip-version-check"]  # compiling unused modules takes a third of the time
    return [PYTHON, "-m", "pip", "install", *quiet, "--constraint", "constraints.txt", *arguments]


def cpu_index():
    """Return pip's arguments for PyTorch's CPU builds where PyPI's would bring 2.7 GB of CUDA along.

    Only if that index answers: one that does not costs pip 7 s and more with every package.
    """
    if sys.platform != "linux" or has_nvidia():
        return []
    answers = []

    def ask():
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=2) as answer:
            answers.append(answer.status)

    asking = threading.Thread(target=ask, daemon=True)  # a thread: the timeout does not cover looking up the host's name
    asking.start()
    asking.join(2.5)
    if answers:
        return ["--extra-index-url", CPU_INDEX]
    print("PyTorch's index of CPU builds does not answer: unless pip knows another, it takes the CUDA build (2.7 GB)", flush=True)
    return []


def step(title, command):
    """Run one step of the installation, showing how it goes on; return None, or the sentence that says why it failed."""
    begun, show = time.monotonic(), sys.stdout.isatty()
    print(f"{title} ... ", end="", flush=True)
    with open(LOG, "wb") as log, child(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            if show:
                said = LOG.read_text(errors="replace").strip().split("\n")[-1].strip()
                line = f"{title} ... {time.monotonic() - begun:.0f} s  {said}"
                print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
    print((f"\r\033[K{title} ... " if show else "") + f"{time.monotonic() - begun:.0f} s", flush=True)
    return failure_of(LOG.read_text(errors="replace")) if process.returncode else None


def failure_of(said):
    """Return the sentence for what a failed step has said."""
    if "No space left on device" in said:
        return "the disk is full: make room (pip also fills its cache and the folder for temporary files), then start again"
    if any(sign in said for sign in ("connection broken by", "Max retries exceeded", "ReadTimeoutError", "Connection refused")):
        remedy = "check the network (for a proxy set HTTPS_PROXY, for a mirror PIP_INDEX_URL), then start again"
        return f"pip cannot reach its package registry: {remedy}"
    lines = [line.strip().rstrip(".") for line in said.splitlines() if line.strip()] or ["it said nothing"]
    reason = next((line for line in reversed(lines) if line.lower().startswith("error:")), lines[-1])
    return f"the installation failed: {reason}; all of what it said is in {LOG}"


@contextlib.contextmanager
def child(command, **streams):
    """Start a process in this folder with .venv first on its path; an interruption ends it, too."""
    path = os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", os.defpath)])
    environment = {**SETTINGS, **os.environ, "PATH": path, "VIRTUAL_ENV": str(VENV), "PIP_USER": "0"}
    # pip leaves modules uncompiled: unless the first import keeps what it compiles, every notebook compiles all of it again
    for name in ("PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONOPTIMIZE"):  # the last would take the docstrings that --help prints
        environment.pop(name, None)
    process = subprocess.Popen([str(part) for part in command], cwd=str(ROOT), env=environment, **streams)
    try:
        yield process
    except KeyboardInterrupt:  # Ctrl-C has reached the child as well: it gets a moment to end by itself
        for end in (process.terminate, process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
            end()
        raise


def run(arguments):
    """Run the Python of .venv and return its exit code, as a shell counts it."""
    with child([PYTHON, *arguments]) as process:
        code = process.wait()
    return code if code >= 0 else 128 - code


def doctor():
    """Print what can be seen with nothing installed, then what rankmamba.doctor sees."""
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    findings = {
        "Python": f"{platform.python_version()} at {sys.executable}: {python_problem() or 'supported'}",
        "CPU": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, {cpu_units()}",
        "GPU": "NVIDIA driver found" if has_nvidia() else "no NVIDIA driver found: everything runs on the CPU",
        "compiler": next(filter(None, map(shutil.which, compilers)), None)
        or "none found: Mamba runs on the portable scan, not the native one (Debian, Ubuntu: sudo apt-get install g++)",
        "disk": disk_problem(3) or f"{shutil.disk_usage(ROOT).free / 1e9:.1f} GB free at {ROOT}",
        ".venv": "up to date"
        if up_to_date(None)
        else venv_problem() or "made or brought up to date by `python3 run.py study`",
    }
    for name, finding in findings.items():
        print(f"{name:<24}{finding}", flush=True)
    return run(["-m", "rankmamba.doctor"]) if venv_works() else 0


def cpu_units():
    """Return which vector and matrix units of the CPU matter here, from Linux's own list."""
    with contextlib.suppress(OSError):
        has = Path("/proc/cpuinfo").read_text().split()
        units = [("AVX2", "avx2"), ("AVX-512", "avx512f"), ("AVX512-BF16", "avx512_bf16"), ("AMX-BF16", "amx_bf16")]
        return "; ".join(f"{name} {'yes' if flag in has else 'no'}" for name, flag in units)
    return "vector units not listed by this system"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends the children like Ctrl-C
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nrun.py: stopped.", file=sys.stderr)
        sys.exit(130)
