"""The checkpoints of one training: whole or absent, checked before they are used, at most two of them.

The Trainer writes a checkpoint into the folder `partial`; `keep` lists the SHA-256 of its files, syncs them to the disk and renames
the folder, so a process killed meanwhile leaves only a `partial`, which the next one clears.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from ..files import sha256

MANIFEST, PROGRESS = "manifest.json", "progress.json"
_log = logging.getLogger(__name__)


class Checkpoints:
    """<folder>/checkpoint-<step>, the two newest.

    made_with: what determines the training, as JSON; only a checkpoint made with the same is resumed.
    """

    def __init__(self, folder: str | Path, made_with: dict):
        self.folder, self.made_with = Path(folder), json.loads(json.dumps(made_with))
        self.partial = self.folder / "partial"
        self._good: list[Path] = []  # newest first

    @property
    def last(self) -> Path | None:
        """The newest checkpoint that this process wrote or found whole."""
        return self._good[0] if self._good else None

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole and of this training; log which were passed over, and why."""
        for path in self._found():
            problem = self._problem(path)
            if problem is None:
                self._good = [path]
                return path
            _log.warning("expected a checkpoint to continue from, got %s, %s", path, problem)
        return None

    def clear(self) -> None:
        """Prepare for the next checkpoint: remove what an interrupted one left."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def keep(self, step: int, progress: dict) -> None:
        """Make `partial`/checkpoint-<step>, now completely written, the newest checkpoint. progress: JSON that goes with it."""
        written, path = self.partial / f"checkpoint-{step}", self.folder / f"checkpoint-{step}"
        (written / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        files = _files(written)
        manifest = {"made_with": self.made_with, "files": {name: sha256(written / name) for name in files}}
        (written / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*files, MANIFEST):
            with open(written / name, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(path, ignore_errors=True)  # a broken one of the same step
        os.replace(written, path)
        self._good = [path, *self._good[:1]]
        for other in set(self._found()) - set(self._good):
            shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """Remove all checkpoints: the training is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        """All checkpoints, newest first."""
        steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.folder.glob("checkpoint-*")}
        return sorted((path for path in steps if steps[path]), key=lambda path: int(steps[path][1]), reverse=True)

    def _problem(self, path: Path) -> str | None:
        """Say what is wrong with a checkpoint and what happens instead; None if nothing is wrong."""
        older = "; the one before it is used"
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            made_with, files = dict(manifest["made_with"]), dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return f"without a readable {MANIFEST}{older}"
        if made_with != self.made_with:
            names = [name for name in {**made_with, **self.made_with} if made_with.get(name) != self.made_with.get(name)]
            different = ", ".join(f"{name} {made_with.get(name)!r}, now {self.made_with.get(name)!r}" for name in names)
            return f"made with {different}; the training starts anew and its first checkpoint replaces this one"
        there = _files(path)
        for name in sorted({*there, *files} - {MANIFEST}):
            if name not in there:
                return f"which lacks {name}{older}"
            if files.get(name) != sha256(path / name):
                return f"whose {name} is not as it was written{older}"
        return None


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
