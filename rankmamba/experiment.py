"""The steps of a study, one system at a time: do it, keep what it made, leave its record.

A step that was done before with the same settings is found in the records, so an interrupted study resumes where it stopped.
"""

import copy
import dataclasses
import itertools
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.std import tqdm

from .backbones import SYSTEMS, find, load_tokenizer
from .candidates import BM25, candidates_of
from .collection import UNIONS, Collection, digest_of, load
from .data.runs import read_run, write_run
from .data.sources import say
from .errors import InputError
from .evaluate import BASELINE, PRIMARY, clusters, per_query
from .files import json_sha256, sha256, slug
from .inputs import PairTokenizer
from .interpolation import interpolate, interpolate_tuned, weight_values
from .reporting.tables import measured
from .reranker import Cost, Reranker
from .reranking import resumable
from .reranking.saved import WEIGHTS
from .results import (
    check_collection,
    environment,
    find_record,
    fingerprint,
    leave_record,
    read_records,
    remove_record,
)
from .train import TrainConfig, train

PARTS = ("dev", "test")  # what is ranked
# {kind of record: kinds of what is measured on its outcome}
DEPENDENT = {"first_stage": ("evaluate", "states"), "train": ("evaluate", "states", "transfer"), "rerank": ("evaluate",)}


class Experiment:
    """One study: a collection with /train, /dev and /test, and one folder for its records, runs, models and figures.

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

    def document_lengths(self, system: str) -> np.ndarray:
        """Count the tokens of the first 20,000 documents, uncut, as `system` reads them: int array (documents,)."""
        spec = find(system)
        inputs = PairTokenizer(load_tokenizer(spec), spec.kind, max_length=1 << 20)
        texts = [text for _, text in itertools.islice(self.split("test").documents.pairs(), 20_000)]
        return np.array([len(ids) for ids in inputs.documents(texts)])

    @cached_property
    def negatives(self) -> pd.DataFrame:
        """The run that training draws its negatives from: the candidates that come with the train split, or BM25's."""
        return candidates_of(self.split("train"))

    def first_stage(self, system: str, k1: float, b: float) -> dict:
        """Rank dev and test with BM25 and keep the runs; returns the record."""
        config = self._config(k1=k1, b=b)
        if record := self._found_ranking("first_stage", system, config):
            return record
        self._check_documents()
        started = time.perf_counter()
        index = BM25.build(self.split("test").documents, k1=k1, b=b)
        built = time.perf_counter()
        runs = {part: index.search(self.split(part).queries) for part in PARTS}
        queries = len(self.split("dev").queries) + len(self.split("test").queries)
        timing = {"index_seconds": built - started, "queries_per_s": queries / (time.perf_counter() - built)}
        for part, run in runs.items():
            asked, answered = len(self.split(part).queries), run["query_id"].nunique()
            if answered < asked / 2:
                say(
                    f"BM25 finds no document for {asked - answered:,} of {asked:,} {part} queries: it needs words between spaces or signs; "
                    "rank the documents yourself (candidates.run) and take first_stage=given"
                )
        rows = self._keep_runs("first_stage", system, runs)
        result = {"documents": len(self.split("test").documents), "rows": rows}
        return self._leave("first_stage", system, "test", config, result, timing)

    def given_first_stage(self, system: str) -> dict:
        """Keep the candidates that come with the collection as the first stage; returns the record, with a note that says so."""
        config = self._config(candidates="given")
        if record := self._found_ranking("first_stage", system, config):
            return record
        runs = {part: self.split(part).candidates for part in PARTS}
        for part, run in runs.items():
            if run is None:
                raise InputError(f"expected candidates that come with {self.split(part).name}, got none; rank with BM25 instead")
        rows = self._keep_runs("first_stage", system, runs)
        result = {"documents": len(self.split("test").documents), "rows": rows}
        note = f"the candidates that come with {self.collection}, ranked by its authors"
        return self._leave("first_stage", system, "test", config, result, {}, note=note)

    def first_stage_fingerprint(self, first_stage: str) -> str | None:
        """The fingerprint of a first stage's record, which other settings change; None without a record."""
        record = self._last("first_stage", first_stage, "test")
        return None if record is None else fingerprint(record)

    def first_stages(self) -> list[str]:
        """The systems of all first stages kept so far."""
        return [record["system"] for record in read_records(self.folder, "first_stage") if record["seed"] == self.seed]

    def train(
        self, config: TrainConfig, on_step: Callable[[dict], None] | None = None, stop: threading.Event | None = None
    ) -> dict:
        """Train a system on the train split and keep the model; returns the record. A stopped run is marked partial in it.

        Raises:
            Stopped: it was stopped before the first step was done.
        """
        settings = config.settings()
        record = self._found("train", config.system, "train", settings)
        folder = self.model_path(config.system)
        if record and not record["result"]["partial"] and self._made(record, folder):
            return record
        trained = train(config, self.split("train"), folder, self.negatives, on_step=on_step, stop=stop)
        result = trained.result() | {"weights": sha256(folder / WEIGHTS)}
        return self._leave("train", config.system, "train", settings, result, trained.timing(), trained.setup)

    @staticmethod
    def _made(record: dict, folder: Path) -> bool:
        """Whether a training's record is of the model in `folder`, not of one that another, killed training has since replaced."""
        made = record["result"].get("weights")  # records made before 2026-11-28 lack it
        return (folder / WEIGHTS).is_file() and made in (None, sha256(folder / WEIGHTS))

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

    def trial(
        self, config: TrainConfig, on_step: Callable[[dict], None] | None = None, stop: threading.Event | None = None
    ) -> dict:
        """Train with settings that are being tried out, in a folder of their own below trials/; returns the record.

        It never replaces what the study keeps; a run of the study or a trial with the same settings is found again. There are as many
        passes over the training queries as `max_steps` needs.
        """
        groups = (self.split("train").qrels["relevance"] > 0).sum()
        config = dataclasses.replace(config, epochs=max(config.epochs, math.ceil(config.max_steps * config.batch_size / groups)))
        settings = config.settings()
        for record in self.runs():
            if record["config"] == settings | self._data and not record["result"]["partial"]:
                return record
        trial = copy.copy(self)  # shares the loaded splits
        trial.folder, trial.seed = self.folder / "trials" / json_sha256(settings)[:10], config.seed
        return trial.train(config, on_step, stop)

    def runs(self) -> list[dict]:
        """The records of all training runs on this collection, the study's and the trials', oldest first."""
        folders = [folder for folder in (self.folder, *self.folder.glob("trials/*")) if folder.is_dir()]
        records = [record for folder in folders for record in read_records(folder, "train")]
        here = [record for record in records if record["collection"] == f"{self.collection}/train"]
        return sorted(here, key=lambda record: record["created"])

    def rerank(self, system: str, first_stage: str, top_k: int, show_progress: bool = True, max_passages: int = 1) -> dict:
        """Rerank the first stage's `top_k` of each dev and test query with a trained system and keep the runs; returns the record.

        max_passages: of a document, see `Reranker.rerank`. A reranking that was killed resumes with the queries that are not finished.
        """
        folder, trained = self.model_path(system), fingerprint(self.trained(system))
        config = self._config(first_stage=first_stage, top_k=top_k, max_passages=max_passages, trained=trained)
        config |= {"ranked": self.first_stage_fingerprint(first_stage)}
        journals = {part: self.run_path(system, part).with_suffix(".finished") for part in PARTS}
        record = self._found_ranking("rerank", system, config)
        if record is None:
            reranker, cost, runs = Reranker.from_pretrained(folder), Cost(), {}
            for part, journal in journals.items():
                candidates, split = self.run(first_stage, part), self.split(part)
                runs[part], part_cost = resumable.rerank(
                    reranker, candidates, split, top_k, journal, config, show_progress, max_passages
                )
                cost += part_cost
            rows = self._keep_runs("rerank", system, runs)
            result = {"pairs": cost.pairs, "tokens": cost.tokens, "padded_tokens": cost.padded_tokens, "rows": rows}
            rates = {"pairs_per_s": cost.pairs / cost.seconds, "tokens_per_s": cost.tokens / cost.seconds}
            ran = reranker.setup
            record = self._leave("rerank", system, "test", config, result, {"seconds": cost.seconds} | rates, ran)
        for journal in journals.values():
            journal.unlink(missing_ok=True)
        return record

    def evaluate(self, system: str, mixed_with: str | None = None, measure: str = PRIMARY) -> dict:
        """Measure a system's test run, alone (below its reranked documents the first stage's order) or mixed with a first stage.

        The mixture's weights are chosen on dev and on the other folds of test, by `measure`. What was measured is kept as a run, too
        ("X-evaluated"). Returns the record; its system is "X" or "X + bm25".
        """
        test, run = self.split("test"), self.run(system, "test")
        reranked = self._last("rerank", system, "test")
        config = (
            {} if reranked is None else {"first_stage": reranked["config"]["first_stage"], "top_k": reranked["config"]["top_k"]}
        )
        name, result = system, {}
        if mixed_with is not None:
            name = f"{system} + {mixed_with}"
            dev = self.split("dev")
            values = weight_values(self.run(system, "dev"), self.run(mixed_with, "dev"), dev.qrels, measure)
            run, weights = interpolate_tuned(run, self.run(mixed_with, "test"), test.qrels, values, measure)
            alone = per_query(interpolate(self.run(system, "dev"), self.run(mixed_with, "dev"), 1.0), dev.qrels).mean().to_dict()
            result = {"measure": measure, "weights": weights}
            result["dev"] = {"weight": list(values), "value": values.mean().tolist(), "alone": alone}
        elif reranked is not None:
            run = interpolate(run, self.run(config["first_stage"], "test"), 1.0)
        else:
            run = run.assign(score=-run["rank"].astype(float))  # places as scores: nobody breaks its ties otherwise
        write_run(self.run_path(name, "evaluated"), run, slug(name))
        first_stage = self._last("first_stage", system, "test")
        note = first_stage["note"] if first_stage is not None else ""
        result = measured(per_query(run, test.qrels), clusters(test.qrels)) | result
        return self._leave("evaluate", name, "test", self._config(**config), result, {}, note=note)

    def describe_queries(self) -> dict:
        """Record for each test query how many words its relevant document has (the longest, if several) and its cluster of queries that
        share one (`evaluate.clusters`), and for a union of collections which queries are of which; returns the record."""
        if record := self._found("queries", "relevant documents", "test", self._config()):
            return record
        test = self.split("test")
        relevant = test.qrels[test.qrels["relevance"] > 0]
        texts = test.documents.get_many(set(relevant["doc_id"]))
        words = relevant["doc_id"].map(lambda doc_id: len(texts[doc_id].split()))
        result = {"words": words.groupby(relevant["query_id"]).max().to_dict(), "clusters": clusters(test.qrels)}
        if parts := UNIONS.get(test.name):
            result["parts"] = {part: [query_id for query_id in load(part).queries if query_id in test.queries] for part in parts}
        return self._leave("queries", "relevant documents", "test", self._config(), result, {})

    def weight_tables(self, systems: Sequence[str]) -> dict[str, pd.DataFrame]:
        """{system: table of weight and value on dev, mixed with BM25} from the records of `evaluate`."""
        records = {system: self._last("evaluate", f"{system} + bm25", "test") for system in systems}
        return {
            system: pd.DataFrame({name: record["result"]["dev"][name] for name in ("weight", "value")})
            for system, record in records.items()
            if record is not None
        }

    def side_by_side(self, systems: Sequence[str], top: int = 5) -> tuple[str, pd.DataFrame]:
        """Put the `top` documents of several systems side by side for the test query on which they differ most.

        Returns the query's text and a table, one column per system; relevant documents carry a tick, and every document the place
        that the first system gave it.
        """
        test = self.split("test")
        runs = {system: self.run(system, "test") for system in systems}
        ranks = _first_relevant(runs, test.qrels)
        query_id = (1 / ranks).std(axis=1).sort_values(ascending=False, kind="stable").index[0]
        relevant = test.qrels[test.qrels["relevance"] > 0]
        judged = set(relevant.loc[relevant["query_id"] == query_id, "doc_id"])
        before = runs[systems[0]].query("query_id == @query_id").set_index("doc_id")["rank"]
        columns = {}
        for system, run in runs.items():
            rows = run[(run["query_id"] == query_id) & (run["rank"] <= top)].set_index("rank")["doc_id"]
            texts = test.documents.get_many(rows)
            ticks = rows.isin(judged).map({True: "✓ ", False: ""})
            columns[system] = ticks + rows.map(texts).str[:90] + f"… ({systems[0]}: " + rows.map(before).astype(str) + ")"
        return test.queries[query_id], pd.DataFrame(columns).fillna("")

    def moves(self, systems: Sequence[str]) -> pd.DataFrame:
        """Count the test queries whose first relevant document each system moved up, kept in its place or moved down.

        One row per system; `at rank 1`: the queries for which it now stands first. The first stage's own row comes first. Queries for
        which the first stage found nothing relevant are left out.
        """
        runs = {system: self.run(system, "test") for system in [BASELINE, *systems]}
        ranks = _first_relevant(runs, self.split("test").qrels).dropna(subset=BASELINE)
        ranks = ranks.apply(lambda places: places.fillna(ranks[BASELINE]))  # what was not reranked keeps its place
        moved = ranks.rsub(ranks[BASELINE], axis=0)
        counts = {"moved up": moved > 0, "kept": moved == 0, "moved down": moved < 0, "at rank 1": ranks == 1}
        return pd.DataFrame({name: found.sum() for name, found in counts.items()})

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

    def model_path(self, system: str) -> Path:
        """Where a system's trained model is kept."""
        return self.folder / "models" / f"{slug(system)}-seed{self.seed}"

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

    def _check_documents(self) -> None:
        """Check that the parts of a user's own collection have the same documents, which are indexed once."""
        places = [path for part in PARTS if (path := Path(f"{self.collection}/{part}") / "documents.jsonl").is_file()]
        if len({sha256(path) for path in places}) > 1:
            raise InputError(
                f"expected the same documents in {' and '.join(map(str, places))}, got others; put all documents in each (or links to one "
                "file), or bring candidates.run and take first_stage=given"
            )

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
        before, now = self._last(kind, system, part), json_sha256([config | self._data, result])
        if before is not None and json_sha256([before["config"], before["result"]]) != now:
            self._forget(kind, system)
        return leave_record(*made, config | self._data, result, timing, environment() | (ran or {}), note)


def _first_relevant(runs: dict[str, pd.DataFrame], qrels: pd.DataFrame) -> pd.DataFrame:
    """The rank of each query's first relevant document, one column per run."""
    relevant = qrels.loc[qrels["relevance"] > 0, ["query_id", "doc_id"]]
    found = {system: run.merge(relevant, on=["query_id", "doc_id"]) for system, run in runs.items()}
    return pd.DataFrame({system: rows.groupby("query_id")["rank"].min() for system, rows in found.items()})


@contextmanager
def progress(title: str) -> Iterator[Callable[[dict], None]]:
    """A progress bar over training steps with loss, elapsed and remaining time; yields what `train` calls after each step."""
    with tqdm(desc=title, unit="step", mininterval=1) as bar:

        def on_step(row: dict) -> None:
            bar.total = row["of"]
            bar.set_postfix(loss=f"{row['loss']:.2f}", refresh=False)
            bar.update(row["step"] - bar.n)  # a resumed training does not begin at 0

        yield on_step
