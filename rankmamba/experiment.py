"""The steps of a study, one system at a time: do it, keep what it made, leave its record.

A step that was done before with the same settings is found in the records, so an interrupted study resumes where it stopped.
"""

import copy
import dataclasses
import filecmp
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.std import tqdm

from .backbones import find, load_tokenizer
from .candidates import BM25, candidates_of
from .collection import UNIONS, check_run, load
from .data.runs import write_run
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
    fingerprint,
    read_records,
)
from .study_folder import PARTS, StudyFolder
from .train import TrainConfig, train


class Experiment(StudyFolder):
    """One study, step by step, in one folder; its arguments are those of `StudyFolder`."""

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
            check_run(run, self.split(part))
        rows = self._keep_runs("first_stage", system, runs)
        result = {"documents": len(self.split("test").documents), "rows": rows}
        note = f"the candidates that come with {self.collection}, ranked by its authors"
        return self._leave("first_stage", system, "test", config, result, {}, note=note)

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
        result, before = trained.result() | {"weights": sha256(folder / WEIGHTS)}, self._last("train", config.system, "train")
        if before is not None and before["result"].get("weights") != result["weights"]:
            self._forget("train", config.system)
        return self._leave("train", config.system, "train", settings, result, trained.timing(), trained.setup)

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
        run = run.assign(score=-run["rank"].astype(float))  # places as scores: other tools would break ties otherwise
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
        relevant = relevant[relevant["doc_id"].isin(texts)]  # of some collections, judged documents are no longer there
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

    def _check_documents(self) -> None:
        """Check that dev and test of a user's own collection have the same documents, which are indexed once."""
        dev, test = (Path(f"{self.collection}/{part}") / "documents.jsonl" for part in PARTS)
        if dev.is_file() and test.is_file() and not filecmp.cmp(dev, test, shallow=False):
            raise InputError(
                f"expected the same documents in {dev} and {test}, got others; put all documents in each (or links to one file), or bring "
                "candidates.run and take first_stage=given"
            )


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
