"""Files that are whole or absent: write under a temporary name, then rename."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on any error it is removed.

    The temporary path does not exist yet: create a file or a folder there. A file replaces an earlier one atomically;
    a folder replaces an earlier one in two renames, so a reader sees the old one, nothing, or the new one, never a mixture.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = workspace / path.name
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        if path.is_dir():
            os.rename(path, workspace / "replaced")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, wholly or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, reading it in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
