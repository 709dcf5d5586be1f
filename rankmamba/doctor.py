"""What runs here, what does not, and why: `python -m rankmamba.doctor`, the second half of `python3 run.py doctor`."""

import argparse
import importlib.metadata
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("rankmamba.scan.native", "mamba_ssm", "causal_conv1d", "flash_attn")


def import_problem(module: str) -> str | None:
    """Return the last line of the error that importing `module` raises, None if it imports; tried in a separate process."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the import crashed with {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode} without a word"])[-1].strip()


def missing(extra: str = "") -> list[str]:
    """Return the requirements of an extra ("": of the package itself) that are missing or of an unsuitable version."""
    lacking = []
    for requirement in map(Requirement, importlib.metadata.requires("rankmamba") or []):
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always != (extra == "") or not (always or requirement.marker.evaluate({"extra": extra})):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{requirement.name}{requirement.specifier}")
        else:
            if not requirement.specifier.contains(version, prereleases=True):
                lacking.append(f"{requirement.name}{requirement.specifier} (there is {version})")
    return lacking


def licence(name: str) -> str:
    """Return the licence that an installed package states: its SPDX expression, else its classifiers, else its first line of text."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    free_text = (metadata.get("License") or "not stated").strip().splitlines()[0]
    return metadata.get("License-Expression") or ", ".join(c for c in classifiers if c != "OSI Approved") or free_text


def licences() -> list[tuple[str, str]]:
    """Return (name, version and licence) of everything that the default installation needs, as installed here."""
    waiting, found = [Requirement("rankmamba")], {}
    while waiting:
        wanted = waiting.pop()
        found[canonicalize_name(wanted.name)] = f"{importlib.metadata.version(wanted.name):<16}{licence(wanted.name)}"
        for needed in map(Requirement, importlib.metadata.requires(wanted.name) or []):
            applies = any(needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras))
            if applies and canonicalize_name(needed.name) not in found:
                waiting.append(needed)
    return sorted(found.items())


def size_mb(folder: Path) -> int:
    """Return what the files below `folder` take, in MB."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6)


def torch_findings() -> Iterator[tuple[str, str]]:
    """Yield which torch this is, what it computes with, and why."""
    import torch

    from .precision import autocast_dtype
    from .scan import kernel

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    yield "torch", f"{torch.__version__}, {build}"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}"
    yield "memory", f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES')}"
    yield "CPU kernels", f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        yield "GPU", f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    elif torch.version.cuda:
        yield "GPU", "none that this torch can use: check `nvidia-smi` and the driver's version"
    logging.getLogger("rankmamba").setLevel(logging.ERROR)  # a slow scan is reported in a line below, not as a warning
    for device in devices:
        yield f"format, {device}", autocast_dtype(device)[1]
        yield f"scan, {device}", "{0.name}: {0.reason}".format(kernel(device))


def findings() -> Iterator[tuple[str, str]]:
    """Yield (what, finding) line by line; whatever is missing or broken, the later lines still come."""
    problem = import_problem("torch")
    if problem:
        yield "torch", f"does not import: {problem}"
    else:
        yield from torch_findings()
    for module in KERNELS:
        problem = import_problem(module)
        yield module, f"does not import: {problem}" if problem else "imports"
    try:
        for extra in ["", *importlib.metadata.metadata("rankmamba").get_all("Provides-Extra", [])]:
            lacking = missing(extra)
            yield f"extra {extra}" if extra else "requirements", "lacks " + ", ".join(lacking) if lacking else "complete"
    except importlib.metadata.PackageNotFoundError:
        yield "requirements", "rankmamba is not installed here: `python3 run.py study`, or pip install --editable ."
    # not Path.expanduser, which fails for a user without a home
    hub = Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")))
    data = Path(os.path.expanduser(os.environ.get("IR_DATASETS_HOME", "~/.ir_datasets")))
    for what, folder in (("data", data), ("hub cache", hub), ("results", ROOT / "results")):
        yield what, f"{folder}, {size_mb(folder)} MB" if folder.is_dir() else f"{folder}, not there yet"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.doctor", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--licences", action="store_true", help="list the licence of everything that is needed, instead")
    options = parser.parse_args(arguments)
    for what, finding in licences() if options.licences else findings():
        print(f"{what:<23} {finding}", flush=True)


if __name__ == "__main__":
    main()
