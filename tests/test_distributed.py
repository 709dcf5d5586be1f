"""One, two and four processes: the same groups, curve, weights and run."""

import json
import os
import threading
from pathlib import Path

import accelerate.state
import numpy as np
import pytest
import torch
from accelerate import DistributedType, PartialState
from forks import fork
from torch.distributed import TCPStore

from rankmamba.collection import load
from rankmamba.data.runs import write_run
from rankmamba.errors import InputError
from rankmamba.reranker import Reranker
from rankmamba.results import read_records
from rankmamba.train import TrainConfig, main, train
from rankmamba.training.distil import teacher_scores
from rankmamba.training.groups import TrainingGroups

# In a fork a second thread of OpenMP waits for ever for those that its parent had.
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = """
system: {system}
collection: rankmamba/tiny/train
folder: {folder}
epochs: 10
max_steps: 6
batch_size: 4
group_size: 4
max_length: 64
max_query_length: 16
learning_rate: 1e-3
bf16: false
"""


def on_processes(count: int, work) -> None:
    """Run `work` in `count` forks of this process that know of one another as torchrun's processes do.

    As there, the store in which they meet is older than they: nobody else gets its port, and nobody waits for it. They set off together:
    while the store's thread answers one, it may hold locks that a fork made then would inherit and wait for.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start, gate = os.pipe()

    def ranked(rank: int):
        def joined() -> None:
            os.close(gate)
            os.read(start, 1)  # ends when nobody holds the gate any more
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": store.host, "MASTER_PORT": store.port}
            os.environ.update({name: str(value) for name, value in where.items()}, OMP_NUM_THREADS="1")
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            PartialState._reset_state()
            work()

        return joined

    processes = [fork(ranked(rank)) for rank in range(count)]
    os.close(gate)
    statuses = [os.waitpid(process, 0)[1] for process in processes]
    os.close(start)
    assert not any(statuses), "it failed; what it said is above"


@pytest.fixture(scope="module")
def tiny():
    return load("rankmamba/tiny/test")


def trained_on(processes: int, system: str, folder: Path, tiny) -> tuple[dict, np.ndarray]:
    """Train with the command line: (record, scores of a run)."""
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.format(system=system, folder=folder / "model"))

    def work() -> None:
        assert main(["--config", str(folder / "config.yaml")]) == 0

    on_processes(processes, work)
    (record,) = read_records(folder / "model", "train")
    assert not (folder / "checkpoints" / "model").exists()
    reranker = Reranker.from_pretrained(folder / "model", dtype=torch.float32)
    return record, reranker.rerank(tiny.candidates, tiny, top_k=5).sort_values(["query_id", "doc_id"])["score"].to_numpy()


@pytest.mark.parametrize("system", ["tiny-bert", "tiny-mamba"])
def test_the_number_of_processes_changes_neither_curve_nor_scores(system, tiny, tmp_path):
    one, scores = trained_on(1, system, tmp_path / "1", tiny)
    assert len(one["result"]["curve"]) == 6
    for processes in (2, 4):
        record, others = trained_on(processes, system, tmp_path / str(processes), tiny)
        assert record["environment"]["processes"] == processes
        assert [(row["step"], row["tokens"]) for row in record["result"]["curve"]] == [
            (row["step"], row["tokens"]) for row in one["result"]["curve"]
        ]
        for measure in ("loss", "accuracy"):
            theirs, ours = ([row[measure] for row in each["result"]["curve"]] for each in (record, one))
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
        # not the weights: AdamW's first steps are as long where a gradient is nothing but rounding
        np.testing.assert_allclose(others, scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("system", ["tiny-bert", "tiny-mamba2"])
def test_a_run_reranked_by_many_processes_is_the_run_of_one(system, tiny, tmp_path):
    torch.manual_seed(0)
    reranker = Reranker.from_pretrained(system, dtype=torch.float32, max_length=64, max_query_length=16)

    def work() -> None:
        rank = PartialState(cpu=True).process_index
        torch.set_num_threads(1 + rank % 2)  # nodes need not be alike
        run = reranker.rerank(tiny.candidates, tiny, top_k=10, batch_tokens=256)
        write_run(tmp_path / f"{rank}.run", run, system)

    expected = reranker.rerank(tiny.candidates, tiny, top_k=10, batch_tokens=256)
    write_run(tmp_path / "one.run", expected, system)
    for processes in (2, 4):
        on_processes(processes, work)
        for rank in range(processes):
            assert (tmp_path / f"{rank}.run").read_bytes() == (tmp_path / "one.run").read_bytes()


def test_a_teachers_scores_are_the_same_on_any_number_of_processes_which_share_the_work(tmp_path):
    torch.manual_seed(0)
    Reranker.from_pretrained("tiny-neox", max_length=64, max_query_length=16).save_pretrained(tmp_path / "teacher")
    train_part = load("rankmamba/tiny/train")
    inputs = Reranker.from_pretrained("tiny-neox", max_length=64, max_query_length=16).inputs
    groups = TrainingGroups(train_part, train_part.candidates, inputs, 4, 0, count=7)

    def work() -> None:
        state, sizes, predict = PartialState(cpu=True), [], Reranker.predict
        Reranker.predict = lambda self, pairs, **options: sizes.append(len(pairs)) or predict(self, pairs, **options)
        place = tmp_path / str(state.num_processes)
        scores = teacher_scores(str(tmp_path / "teacher"), groups, train_part, place)
        np.save(tmp_path / f"{state.num_processes}-{state.process_index}.npy", scores)
        assert sizes == [len(groups) * 4 // state.num_processes]
        assert np.array_equal(teacher_scores(str(tmp_path / "teacher"), groups, train_part, place), scores) and len(sizes) == 1

    for processes in (1, 2):
        on_processes(processes, work)
    one, *two = (np.load(tmp_path / f"{name}.npy") for name in ("1-0", "2-0", "2-1"))
    assert one.shape == (7, 4) and np.array_equal(*two)
    np.testing.assert_allclose(two[0], one, rtol=0, atol=2e-3)  # batches of other shapes, in bfloat16 where there is some


def test_the_configuration_decides_the_precision_whatever_the_launcher_was_told(tiny, tmp_path, monkeypatch):
    one, _ = trained_on(1, "tiny-mamba", tmp_path / "plain", tiny)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    told, _ = trained_on(1, "tiny-mamba", tmp_path / "told", tiny)
    assert told["result"] == one["result"]


class GpusAreCpus(type):
    """accelerate shards over GPUs and their like alone; with this in place of its list of devices, over CPU processes too."""

    def __getattr__(cls, name):
        return DistributedType.MULTI_CPU if name == "MULTI_GPU" else getattr(DistributedType, name)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.mark.parametrize("bf16, rounding, wrap", [(False, 1e-5, "NO_WRAP"), (True, 1e-2, "TRANSFORMER_BASED_WRAP")])
def test_weights_that_are_sharded_learn_the_same_and_go_on_from_a_checkpoint(bf16, rounding, wrap, tmp_path, monkeypatch):
    config = TrainConfig(
        "tiny-mamba",
        epochs=10,
        max_steps=4,
        batch_size=4,
        group_size=4,
        max_length=64,
        max_query_length=16,
        learning_rate=1e-3,
        bf16=bf16,
    )
    collection = load("rankmamba/tiny/train")

    def work(name: str, stop_at: int) -> None:
        stop = threading.Event()
        result = train(config, collection, tmp_path / name, on_step=lambda row: row["step"] == stop_at and stop.set(), stop=stop)
        if PartialState().is_main_process:
            (tmp_path / f"{name}.json").write_text(json.dumps(result.result()))

    on_processes(1, lambda: work("one", 0))
    monkeypatch.setattr(accelerate.state, "DistributedType", GpusAreCpus("DistributedType", (), {}))
    for name, value in (FSDP | {"FSDP_AUTO_WRAP_POLICY": wrap}).items():
        monkeypatch.setenv(name, value)
    on_processes(2, lambda: work("sharded", 2))
    assert (tmp_path / "checkpoints" / "sharded" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()
    with monkeypatch.context() as unsharded, pytest.raises(InputError, match="a training without FSDP, got one with it"):
        unsharded.delenv("ACCELERATE_USE_FSDP")
        PartialState._reset_state()
        train(config, collection, tmp_path / "sharded")

    def refused() -> None:
        with pytest.raises(InputError, match="expected no activation checkpointing by FSDP"):
            work("refused", 0)

    with monkeypatch.context() as checkpointing:
        checkpointing.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
        on_processes(2, refused)
    on_processes(2, lambda: work("sharded", 0))
    one, sharded = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "sharded"))
    assert {name: one[name] for name in one if name != "curve"} == {name: sharded[name] for name in sharded if name != "curve"}
    losses = [[row["loss"] for row in each["curve"]] for each in (one, sharded)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=rounding)
    pair = [("what do bees make", "honey and wax")]
    scores = [Reranker.from_pretrained(tmp_path / name, dtype=torch.float32).predict(pair) for name in ("one", "sharded")]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=10 * rounding)


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused():
    with pytest.raises(InputError, match="3 processes can share evenly, got 4"):
        TrainConfig("tiny-bert", batch_size=4).check(processes=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ("batch_size: four", "expected int as 'batch_size', got 'four'"),
        ("seed: true", "expected int as 'seed', got True"),
        ("learning_rat: 1", "got 'learning_rat'"),
        ("loss: distil", "expected a teacher for loss 'distil'"),
        ("loss: distil\nteacher: minilm-l6", "expected the folder of a trained reranker as teacher, got 'minilm-l6'"),
        ("- a list", "got"),
    ],
)
def test_a_configuration_that_does_not_fit_is_said(change, message, tmp_path, capsys):
    name = change.partition(":")[0]
    lines = [
        line for line in CONFIG.format(system="tiny-bert", folder=tmp_path / "model").splitlines() if not line.startswith(name)
    ]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([*lines, change]))
    assert main(["--config", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
