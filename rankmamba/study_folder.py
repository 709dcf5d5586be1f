"""A study's folder: its records, runs and models, and whether they still belong together."""

import re
from functools import cached_property
from pathlib import Path

import pandas as pd

from .backbones import SYSTEMS
from .collection import Collection, digest_of, load
from .data.runs import read_run, write_run
from .errors import InputError
from .files import sha256, slug
from .reranking.saved import WEIGHTS
from .results import check_collection, environment, find_record, fingerprint, leave_record, read_records, remove_record

PARTS = ("dev", "test")  # what is ranked
# {kind of record: kinds of what is measured on its outcome}
DEPENDENT = {"first_stage": ("evaluate", "states"), "train": ("evaluate", "states", "transfer"), "rerank": ("evaluate",)}


class StudyFolder:
    """What one study of a collection with /train, /dev and /test has made so far.

    n_dev, n_test: how many queries are drawn, the same ones for every system and seed; None takes all. seed: of training.
    """

    def __init__(
        self, folder: str | Path, collection: str, scale: str, seed: int = 0, n_dev: int | None = None, n_test: int | None = None
    ):
        self.folder, self.collection, self.scale, self.seed = Path(folder), collection, scale, seed
        check_collection(self.folder, collection)
        self._sizes = {"train": None, "dev": n_dev, "test": n_test}
        self._splits: dict[str, Collection] = {}

    def split(self, name: str) -> Collection:
        """Return the "train", "dev" or "test" part, with the number of queries that the study uses."""
        if name not in self._splits:
            self._splits[name] = load(f"{self.collection}/{name}").sample(self._sizes[name])
        return self._splits[name]

    def run(self, system: str, part: str) -> pd.DataFrame:
        """Read a run that an earlier step kept.

        Raises:
            InputError: there is none, its length is not what its record says, it is of another number of queries, or the collection was
                edited, the first stage ranked with other settings or the system trained anew since.
        """
        path = self.run_path(system, part)
        if not path.is_file():
            raise InputError(f"expected the run {path}, found none; run 01_data (first stages) or 03_rerank (systems) first")
        run = read_run(path)
        for kind in ("first_stage", "rerank"):
            record = self._last(kind, system, "test")
            if record is None:
                continue
            remedy = "01_data" if kind == "first_stage" else "03_rerank"
            self._check_data(record, path, remedy)
            self._check_size(record, part, path, remedy)
            if kind == "rerank":
                self._check_inputs(record, path)
            if (rows := record["result"]["rows"][part]) != len(run):
                raise InputError(f"expected {rows:,} results, got {len(run):,} ({path}); delete the file and run its step again")
        return run

    def run_path(self, system: str, part: str) -> Path:
        """Where the run of a system on "dev" or "test" is kept; "evaluated": the one that was measured."""
        return self.folder / "runs" / f"{slug(system)}-{part}-seed{self.seed}.run"

    def model_path(self, system: str) -> Path:
        """Where a system's trained model is kept."""
        return self.folder / "models" / f"{slug(system)}-seed{self.seed}"

    def trained(self, system: str) -> dict:
        """The record of a system's training.

        Raises:
            InputError: it was not trained, or the collection was edited since, or its model is gone or was replaced by another.
        """
        record, folder = self._last("train", system, "train"), self.model_path(system)
        if record is None or not self._made(record, folder):
            raise InputError(f"expected the trained model {folder}, found none; run 02_train with {system!r} among its systems")
        self._check_data(record, folder, "02_train")
        return record

    def first_stage_fingerprint(self, first_stage: str) -> str | None:
        """The fingerprint of a first stage's record, which other settings change; None without a record."""
        record = self._last("first_stage", first_stage, "test")
        return None if record is None else fingerprint(record)

    def first_stages(self) -> list[str]:
        """The systems of all first stages kept so far."""
        return [record["system"] for record in read_records(self.folder, "first_stage") if record["seed"] == self.seed]

    def _keep_runs(self, kind: str, system: str, runs: dict[str, pd.DataFrame]) -> dict[str, int]:
        """Write the run of each part; returns how many rows each has. kind: of the record that will describe them."""
        if (before := self._last(kind, system, "test")) is not None:
            remove_record(self.folder, before)  # never a record beside the runs of another, nor one of them beside another's
            self._forget(kind, system)
        for part in runs:
            self.run_path(system, part).unlink(missing_ok=True)
        for part, run in runs.items():
            write_run(self.run_path(system, part), run, system)
        return {part: len(run) for part, run in runs.items()}

    def _found_ranking(self, kind: str, system: str, config: dict) -> dict | None:
        """The record of a ranking that was done with the same settings and whose runs are there."""
        there = all(self.run_path(system, part).is_file() for part in PARTS)
        return self._found(kind, system, "test", config) if there else None

    @staticmethod
    def _made(record: dict, folder: Path) -> bool:
        """Whether a training's record is of the model in `folder`, not of one that another, killed training has since replaced."""
        made = record["result"].get("weights")  # records made before 2026-11-28 lack it
        return (folder / WEIGHTS).is_file() and made in (None, sha256(folder / WEIGHTS))

    def _config(self, **settings) -> dict:
        return {"n_dev": self._sizes["dev"], "n_test": self._sizes["test"], **settings}

    def _last(self, kind: str, system: str, part: str) -> dict | None:
        """The record of a step, whatever its settings were."""
        return find_record(self.folder, kind, system=system, collection=f"{self.collection}/{part}", seed=self.seed)

    def _found(self, kind: str, system: str, part: str, config: dict) -> dict | None:
        """The record of a step that was done with the same settings."""
        record = self._last(kind, system, part)
        return record if record is not None and record["config"] == config | self._data else None

    @cached_property
    def _data(self) -> dict:
        """The digest of a user's own collection folder, for the records' config: an edit changes it. Nothing for an id of ir_datasets."""
        return digest_of(f"{self.collection}/{part}" for part in ("train", *PARTS))

    def _check_inputs(self, reranked: dict, path: Path) -> None:
        """Check that a reranking was made from the first stage and the training as they are now."""
        system, config = reranked["system"], reranked["config"]
        training = self._last("train", system, "train")
        now = {"ranked": self.first_stage_fingerprint(config["first_stage"])}
        now |= {"trained": None if training is None else fingerprint(training)}
        # what has no record cannot be compared; records of before 2026-11-29 lack "ranked"
        if any(config.get(name, made) != made for name, made in now.items() if made is not None):
            raise InputError(
                f"expected {path} made by {system} from the candidates of {config['first_stage']} as they are now, got one "
                "of before; run 03_rerank again"
            )

    def _check_size(self, record: dict, part: str, path: Path, remedy: str) -> None:
        wanted, ranked = self._sizes[part], record["config"][f"n_{part}"]
        if wanted == ranked:
            return
        count = len(load(f"{self.collection}/{part}").judged())
        wanted, ranked = (count if size is None else min(size, count) for size in (wanted, ranked))
        if wanted != ranked:
            raise InputError(f"expected {path} of {wanted:,} {part} queries, got one of {ranked:,}; run {remedy} again")

    def _check_data(self, record: dict, path: Path, remedy: str) -> None:
        if record["config"].get("files") != self._data.get("files"):
            raise InputError(
                f"expected {path} made from {self.collection} as it is now, got one of before an edit; run {remedy} again"
            )

    def _forget(self, kind: str, system: str) -> None:
        """Remove what was measured on the outcome of a step that is replaced: tables would have it beside the new outcome."""
        of_system = re.compile(rf"(.* \+ )?{re.escape(system)}( \+ .*|, .*)?")  # mixed with a first stage, or read in some way
        for dependent in DEPENDENT.get(kind, ()):
            for record in read_records(self.folder, dependent):
                concerned = of_system.fullmatch(record["system"]) or record["config"].get("first_stage") == system
                if record["seed"] == self.seed and concerned:
                    remove_record(self.folder, record)

    def _leave(self, kind, system, part, config, result, timing, ran: dict | None = None, note: str = "") -> dict:
        note = SYSTEMS[system].note if system in SYSTEMS else note
        made = self.folder, kind, system, f"{self.collection}/{part}", self.scale, self.seed
        return leave_record(*made, config | self._data, result, timing, environment() | (ran or {}), note)
