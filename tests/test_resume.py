"""Training that is killed, interrupted or runs into faults loses nothing: started again it ends bitwise as if nothing had happened."""

import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forks import fork

from rankmamba import experiment, reranker
from rankmamba.collection import Collection, load
from rankmamba.data.runs import sort_run
from rankmamba.errors import InputError
from rankmamba.experiment import Experiment
from rankmamba.files import sha256
from rankmamba.model import RerankerModel
from rankmamba.reranker import Reranker
from rankmamba.results import fingerprint, read_records
from rankmamba.train import TrainConfig, train
from rankmamba.training import trainer
from rankmamba.training.checkpoints import Checkpoints
from rankmamba.training.progress import Stopped
from rankmamba.training.trainer import LCETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(batch_size=2, group_size=4, max_length=64, max_query_length=16, learning_rate=5e-3, epochs=100)
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
KILLS = 20


def begin(work, operation: int | None = None) -> int:
    """Run `work` in a fork of this process, which has everything imported; kill it just before the file operation of this number."""
    count = iter(range(1, sys.maxsize))

    def on_operation(event: str, arguments) -> None:
        if event in OPERATIONS and "checkpoints" in str(arguments[0]) and next(count) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    return fork(work, on_operation)


def end(process: int) -> int:
    """Wait for a fork: 0, 130 after an interrupt, or -9 when it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, 130, -signal.SIGKILL), "it failed; what it said is above"
    return status


def cpu_seconds(process: int) -> float:
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run(work) -> None:
    assert end(begin(work)) == 0


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Every training collects garbage; without what was there before, or each fork would copy it to look through it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def collection():
    return load("rankmamba/tiny/train")


def small(system: str, **changes) -> TrainConfig:
    return TrainConfig(system, **{**TINY, "max_steps": 8, **changes})


def outcome(result) -> tuple:
    """What must not depend on how a training came to its end."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in result.reranker.model.state_dict().items()}
    return result.result(), weights


@pytest.mark.parametrize("system, seed", [("tiny-bert", 1), ("tiny-mamba", 2)])
def test_killed_at_random_moments_it_ends_with_the_same_weights_curve_and_record(system, seed, tmp_path, monkeypatch):
    config, draw = small(system, max_steps=50), random.Random(seed)
    monkeypatch.setattr(time, "time", lambda: draw.uniform(0, 2e9))  # a wall clock that jumps changes nothing
    run(lambda: Experiment(tmp_path / "undisturbed", "rankmamba/tiny", "tiny").train(config))
    monkeypatch.setattr(experiment, "train", partial(train, checkpoint_steps=2))
    begun, begins = os.pipe()

    def work() -> None:
        def on_step(row: dict) -> None:
            os.write(begins, b"s")

        Experiment(tmp_path / "killed", "rankmamba/tiny", "tiny").train(config, on_step)

    for kills in range(KILLS // 2):
        if kills % 2:
            assert end(begin(work, operation=draw.randint(1, 80))) == -signal.SIGKILL  # in the first checkpoint or the second
        else:
            process = begin(work)
            for _ in range(draw.randint(1, 3)):
                os.read(begun, 1)
            time.sleep(draw.uniform(0, 0.03))
            interrupted, used = kills % 4 == 2, cpu_seconds(process)
            os.kill(process, signal.SIGINT if interrupted else signal.SIGKILL)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert end(process) == (130 if interrupted else -signal.SIGKILL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - used < 2  # s, of its own
        os.set_blocking(begun, False)
        with suppress(BlockingIOError):
            os.read(begun, 1000)
        os.set_blocking(begun, True)
    run(work)
    whole, killed = (tmp_path / name for name in ("undisturbed", "killed"))
    assert sha256(whole / f"models/{system}-seed0/model.safetensors") == sha256(
        killed / f"models/{system}-seed0/model.safetensors"
    )
    (whole_record,), (killed_record,) = (read_records(each, "train") for each in (whole, killed))
    assert fingerprint(whole_record) == fingerprint(killed_record)
    assert not (killed / "models/checkpoints" / f"{system}-seed0").exists()


# -------------------------------------------------------------------------------------------------------- damage and faults


@pytest.fixture(scope="module")
def undisturbed(collection, tmp_path_factory):
    return outcome(train(small("tiny-neox"), collection, tmp_path_factory.mktemp("undisturbed") / "model"))


@pytest.fixture(scope="module")
def stopped(collection, tmp_path_factory):
    """Copy a training that was stopped after four steps, with a checkpoint for every second one: folder -> its checkpoints."""
    original, stop = tmp_path_factory.mktemp("stopped"), threading.Event()
    result = train(
        small("tiny-neox"),
        collection,
        original / "model",
        on_step=lambda row: row["step"] == 4 and stop.set(),
        stop=stop,
        checkpoint_steps=2,
    )
    assert result.stopped and result.steps == 4

    def copy(folder: Path) -> Path:
        shutil.copytree(original, folder, dirs_exist_ok=True)
        return folder / "checkpoints" / "model"

    return copy


def test_a_stopped_training_goes_on_where_it_was(stopped, collection, undisturbed, tmp_path):
    checkpoints, steps = stopped(tmp_path), []
    result = train(small("tiny-neox"), collection, tmp_path / "model", on_step=lambda row: steps.append(row["step"]))
    assert steps == [5, 6, 7, 8] and not result.stopped
    assert outcome(result) == undisturbed
    assert not checkpoints.exists()
    seconds = [row["seconds"] for row in result.curve]
    assert seconds == sorted(seconds) and result.seconds >= seconds[-1]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [1, 5, 8])
def test_ctrl_c_before_any_checkpoint_is_due_loses_no_finished_step(step, collection, undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(
            small("tiny-neox"),
            collection,
            tmp_path / "model",
            on_step=lambda row: row["step"] == step and signal.raise_signal(signal.SIGINT),
        )
    assert not (tmp_path / "model").exists() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    steps = []
    result = train(small("tiny-neox"), collection, tmp_path / "model", on_step=lambda row: steps.append(row["step"]))
    assert steps == [*range(step + 1, 9)] and outcome(result) == undisturbed


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "model.safetensors": flip_a_bit,
    "optimizer.pt": lambda path: os.truncate(path, path.stat().st_size // 2),
    "progress.json": Path.unlink,
    "manifest.json": lambda path: path.write_text("{"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(name, stopped, collection, undisturbed, tmp_path, caplog):
    checkpoints = stopped(tmp_path)
    DAMAGE[name](checkpoints / "checkpoint-4" / name)
    steps = []
    result = train(small("tiny-neox"), collection, tmp_path / "model", on_step=lambda row: steps.append(row["step"]))
    assert f"{checkpoints}/checkpoint-4" in caplog.text and name in caplog.text and "the one before it is used" in caplog.text
    assert steps == [3, 4, 5, 6, 7, 8]
    assert outcome(result) == undisturbed


@pytest.mark.usefixtures("ctrl_c")
def test_a_training_that_is_stopped_before_its_first_step_ends_at_once_and_keeps_nothing(collection, tmp_path):
    stop, begun = threading.Event(), time.monotonic()
    stop.set()
    with pytest.raises(Stopped):
        train(small("tiny-neox", max_steps=1_000_000, epochs=1_000_000), collection, tmp_path / "model", stop=stop)
    assert time.monotonic() - begun < 20

    class DuringTheFirstStep(threading.Event):
        def __init__(self, ask):
            super().__init__()
            self.ask = ask

        def is_set(self):  # Ctrl-C is heeded while steps are made
            return signal.getsignal(signal.SIGINT) is not signal.default_int_handler and self.ask()

    for ask, expected in ((lambda: True, Stopped), (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt)):
        with pytest.raises(expected):
            train(small("tiny-neox"), collection, tmp_path / "model", stop=DuringTheFirstStep(ask))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_checkpoint_of_another_configuration_is_said_and_not_continued(stopped, collection, tmp_path, caplog):
    checkpoints, steps = stopped(tmp_path), []
    other = small("tiny-neox", learning_rate=1e-3, max_steps=4)
    train(other, collection, tmp_path / "model", on_step=lambda row: steps.append(row["step"]))
    assert "learning_rate 0.005, now 0.001" in caplog.text and "the training starts anew" in caplog.text
    assert steps == [1, 2, 3, 4]
    assert not checkpoints.exists()


def test_a_checkpoint_of_other_starting_weights_is_not_continued(stopped, collection, tmp_path, caplog, monkeypatch):
    stopped(tmp_path)
    monkeypatch.setattr("rankmamba.train.weights_digest", lambda model: "of other weights")
    steps = []
    train(small("tiny-neox"), collection, tmp_path / "model", on_step=lambda row: steps.append(row["step"]))
    assert "now 'of other weights'" in caplog.text and steps == [*range(1, 9)]


def test_a_checkpoint_of_texts_that_were_edited_is_not_continued(stopped, collection, tmp_path, caplog):
    stopped(tmp_path)
    documents = {doc_id: f"indeed {text}" for doc_id, text in collection.documents.pairs()}
    edited, steps = Collection("edited", documents, collection.queries, collection.qrels, collection.candidates), []
    train(small("tiny-neox"), edited, tmp_path / "model", on_step=lambda row: steps.append(row["step"]))
    assert "made with data" in caplog.text and steps == [*range(1, 9)]


def test_the_two_newest_checkpoints_are_kept_and_the_tenth_is_newer_than_the_ninth(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"of": 1})
    for step in (8, 9, 10):
        checkpoints.clear()
        (checkpoints.partial / f"checkpoint-{step}").mkdir()
        checkpoints.keep(step, {})
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-10"}
    assert Checkpoints(tmp_path, {"of": 1}).newest() == checkpoints.last == tmp_path / "checkpoint-10"


def test_a_checkpoint_of_another_teacher_is_not_continued(collection, tmp_path, caplog):
    teacher, stop, steps = Reranker.from_pretrained("tiny-neox", max_length=64, max_query_length=16), threading.Event(), []
    config = small("tiny-neox", max_steps=2, loss="distil", teacher=str(tmp_path / "teacher"))
    for on_step in (lambda row: stop.set(), lambda row: steps.append(row["step"])):
        teacher.save_pretrained(config.teacher)
        train(config, collection, tmp_path / "model", on_step=on_step, stop=None if stop.is_set() else stop)
        teacher.model.score.weight.data *= -1
    assert "made with weights_in" in caplog.text and steps == [1, 2]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_training_with_its_step_and_queries_and_keeps_the_checkpoint(
    what, collection, undisturbed, tmp_path, monkeypatch
):
    calls, seen = iter(range(1, 100)), []

    def poisoned(scores, _loss=trainer.lce_loss):
        if next(calls) < 5:
            return _loss(scores)
        return _loss(scores) + (scores.sum() * torch.nan if what == "loss" else (scores.sum() * 0).sqrt())

    def batch(self, indices, _batch=LCETrainer.batch):
        seen.append([self.groups.groups[index].query_id for index in indices])
        return _batch(self, indices)

    with monkeypatch.context() as poison:
        poison.setattr(trainer, "lce_loss", poisoned)
        poison.setattr(LCETrainer, "batch", batch)
        with pytest.raises(FloatingPointError, match=f"finite {what}, got nan at step 5, queries {', '.join(seen[4:])}") as error:
            train(small("tiny-neox"), collection, tmp_path / "model", checkpoint_steps=2)
    assert ", ".join(seen[4]) in str(error.value) and "checkpoint-4" in str(error.value)
    assert not (tmp_path / "model").exists()
    steps = []
    assert (
        outcome(train(small("tiny-neox"), collection, tmp_path / "model", on_step=lambda row: steps.append(row["step"])))
        == undisturbed
    )
    assert steps == [5, 6, 7, 8]


def test_a_disk_that_takes_no_more_is_said_and_the_checkpoint_before_stays(collection, undisturbed, tmp_path):
    def work() -> None:
        def on_step(row: dict) -> None:
            if row["step"] == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

        with pytest.raises(InputError, match="expected to write a checkpoint to .*got.*start again"):
            train(small("tiny-neox"), collection, tmp_path / "model", on_step=on_step, checkpoint_steps=2)

    run(work)
    assert [path.name for path in (tmp_path / "checkpoints" / "model").glob("checkpoint-*")] == ["checkpoint-2"]
    assert outcome(train(small("tiny-neox"), collection, tmp_path / "model")) == undisturbed


def test_a_training_that_the_disk_has_no_room_for_is_refused_before_its_first_step(collection, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(InputError, match=r"expected [\d.]+ MB of free disk for the model .* free some space"):
        train(small("tiny-neox"), collection, tmp_path / "runs" / "model", on_step=lambda row: pytest.fail("a step was taken"))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------------- memory


def long_texts() -> Collection:
    """40 documents of up to 330 words, 8 queries with every document as a candidate."""
    draw, words = random.Random(0), "amber brook cedar delta ember fjord grove harbor".split()
    documents = {f"d{n}": " ".join(draw.choices(words, k=draw.randint(100, 330))) for n in range(40)}
    qrels = pd.DataFrame({"query_id": [f"q{n}" for n in range(8)], "doc_id": [f"d{n}" for n in range(8)], "relevance": 1})
    rows = [(f"q{n}", f"d{m}", 1 / (m + 1)) for n in range(8) for m in range(40)]
    candidates = sort_run(pd.DataFrame(rows, columns=["query_id", "doc_id", "score"]))
    return Collection("long", documents, {f"q{n}": word for n, word in enumerate(words)}, qrels, candidates)


def limit_memory(mib: int) -> None:
    """Let this process have so much more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def with_little_memory(folder: Path) -> None:
    """What the next test runs in a process of its own."""
    torch.set_num_threads(1)
    said, texts = [], long_texts()
    for log in (trainer._log, reranker._log):
        log.addFilter(lambda record: said.append(record.getMessage()))
    config = small("tiny-mamba", max_steps=1, batch_size=8, group_size=8, max_length=512, bf16=False)
    whole = train(config, texts, folder / "whole")
    pairs = [(query, document) for query in texts.queries.values() for _, document in texts.documents.pairs()]
    scores = whole.reranker.predict(pairs, batch_tokens=100_000)
    assert not said
    step = LCETrainer.training_step

    def limited_step(self, *arguments):
        limit_memory(60)
        return step(self, *arguments)

    LCETrainer.training_step = limited_step
    limited = train(config, texts, folder / "limited")
    assert "a step does not fit into memory: from now on it runs in 8 chunks" in said[0]
    assert limited.curve[0]["loss"] == pytest.approx(whole.curve[0]["loss"], abs=1e-6)
    said.clear()
    limit_memory(8)
    np.testing.assert_allclose(limited.reranker.predict(pairs, batch_tokens=100_000), scores, rtol=0, atol=1e-4)
    assert len(said) == 1 and "a batch does not fit into the memory of cpu" in said[0]


def test_what_does_not_fit_into_memory_is_halved_with_the_same_result(tmp_path):
    # memory that is freed goes back to the system, so that the limit means the same at any time
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fails_above(limit: int, error: Exception):
    """A forward pass that fails on more tokens than `limit`."""

    def forward(self, input_ids, *arguments, _forward=RerankerModel.forward, **others):
        if input_ids.numel() > limit:
            raise error
        return _forward(self, input_ids, *arguments, **others)

    return forward


def test_a_gpu_without_memory_is_met_alike_and_one_pair_too_large_is_an_input_error(collection, tmp_path, monkeypatch, caplog):
    scorer = Reranker.from_pretrained("tiny-mamba", max_length=512)
    pairs = [("amber", document) for _, document in long_texts().documents.pairs()]
    expected = scorer.predict(pairs)
    full = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(RerankerModel, "forward", fails_above(600, full))
    np.testing.assert_allclose(scorer.predict(pairs), expected, rtol=0, atol=1e-5)
    assert caplog.text.count("does not fit into the memory of cpu") == 1
    monkeypatch.setattr(RerankerModel, "forward", fails_above(100, full))
    with pytest.raises(InputError, match="expected a pair of 3.. tokens to fit into the memory"):
        scorer.predict(pairs)
    monkeypatch.setattr(RerankerModel, "forward", fails_above(10, full))
    with pytest.raises(InputError, match="expected one pair at a time to fit into memory") as caught:
        train(small("tiny-neox"), collection, tmp_path / "model")
    assert caught.value.__cause__.__traceback__ is None  # its frames hold the step's tensors
    monkeypatch.setattr(RerankerModel, "forward", fails_above(10, RuntimeError("size mismatch")))
    for call in (lambda: scorer.predict(pairs), lambda: train(small("tiny-neox"), collection, tmp_path / "model")):
        with pytest.raises(RuntimeError, match="size mismatch"):
            call()


@pytest.mark.parametrize(
    "said", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "Triton Error [CUDA]: out of memory"]
)
def test_moments_that_do_not_fit_into_memory_are_an_input_error_whichever_library_asked(said, collection, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(InputError, match="AdamW's moments to fit into memory.*use lora_r"):
        train(small("tiny-mamba"), collection, tmp_path / "model")


if __name__ == "__main__":
    with_little_memory(Path(sys.argv[1]))
