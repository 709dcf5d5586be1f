"""Files that are whole or absent: write under a temporary name, then rename. A disk that refuses is one error with a remedy."""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

REMEDIES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EACCES: "choose a name in a folder that you may write",
    errno.EPERM: "choose a name in a folder that you may write",
    errno.EBUSY: "choose the name of a folder in it: a disk is mounted there, and a folder is replaced as a whole",
    errno.ENOTDIR: "choose a folder that is not a file",
    errno.EEXIST: "choose a folder that is not a file",
}


_workspaces: set[Path] = set()  # those of this process that are in use


@contextmanager
def refusals(path: str | Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written (full, read-only, forbidden) into an `InputError` that names it."""
    try:
        yield
    except Exception as error:
        in_text = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors and tokenizers report it
        number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if number not in REMEDIES:
            raise
        raise InputError(
            f"expected to write {path}, got: {os.strerror(number)}; {REMEDIES[number]} and start again, "
            "what was finished before is kept"
        ) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on any error it is removed.

    The temporary path does not exist yet: create a file or a folder there. A file replaces an earlier one atomically;
    a folder replaces an earlier one in two renames, so a reader sees the old one, nothing, or the new one, never a mixture.
    Of a link, what it leads to is replaced.

    Raises:
        InputError: the disk is full or may not be written, or a file would replace a folder.
    """
    path = Path(os.path.realpath(path))  # also, "." has no name
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        workspace = _workspace(path)
        temporary = workspace / path.name
        try:
            yield temporary
            for file in (temporary, *temporary.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.is_dir() and not temporary.is_dir():
                raise InputError(f"expected the name of a file to write, got the folder {path}; name a file in it")
            if path.is_dir() == temporary.is_dir() and path.exists():
                with suppress(OSError):  # what is private stays so, where the disk knows of it
                    temporary.chmod(stat.S_IMODE(path.stat().st_mode) | (0o700 if path.is_dir() else 0))
            if path.is_dir():
                os.rename(path, _replaced(workspace, path))
            os.replace(temporary, path)
        finally:
            _give_back(workspace, path)
            shutil.rmtree(workspace, ignore_errors=True)
            _workspaces.discard(workspace)


def _workspace(path: Path) -> Path:
    """Make a new folder beside `path`, and remove those that killed processes on this machine left there."""
    mine = f".{path.name}.{platform.node()}-"
    for left_over in path.parent.glob(f"{glob.escape(mine)}*"):
        process = left_over.name.removeprefix(mine).partition("-")[0]
        # a container that is started again has its predecessor's name and process ids
        lost = left_over not in _workspaces if process == str(os.getpid()) else process.isdigit() and not _runs(int(process))
        if lost:
            _give_back(left_over, path)
            shutil.rmtree(left_over, ignore_errors=True)
    workspace = path.parent / f"{mine}{os.getpid()}-{secrets.token_hex(4)}"
    _workspaces.add(workspace)  # before it is there, so that no other thread takes it for a lost one
    workspace.mkdir(mode=0o700)
    return workspace


def _replaced(workspace: Path, path: Path) -> Path:
    """Where the folder that was `path` waits until the new one is in its place."""
    return workspace / f"{path.name}.replaced"


def _give_back(workspace: Path, path: Path) -> None:
    """Put the folder that was `path` back if the new one did not take its place."""
    replaced = _replaced(workspace, path)
    if replaced.is_dir() and not path.exists():
        os.rename(replaced, path)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # on Windows signal 0 is Ctrl-C, not a question
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs, as another user
    return True


def check_room(folder: Path, size: float, purpose: str, remedy: str) -> None:
    """Refuse to begin work that the disk of `folder`, which need not exist yet, has no room for; size: bytes.

    Raises:
        InputError: fewer bytes are free.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise InputError(f"expected {size / 1e6:,.1f} MB of free disk {purpose}, got {free / 1e6:,.1f} MB in {there}; {remedy}")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, wholly or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def alone(path: str | Path, waiting: str) -> Iterator[None]:
    """Hold the lock file `path`; while another process holds it, print `waiting` and wait. The lock goes when its process ends."""
    import filelock  # importing it takes a tenth of a second

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0.1)
    except filelock.Timeout:
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def slug(name: str) -> str:
    """Make a name safe as part of a file name: a system may be a path, which would lead to another folder."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-")


def json_sha256(value: object) -> str:
    """Return the SHA-256 of a value as JSON, whatever the order of its keys, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, reading it in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
