"""Training: the LCE loss, the recipe, reproducibility, stopping."""

import re
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rankmamba.candidates import BM25, lce_groups
from rankmamba.collection import Collection, load
from rankmamba.data.formats import write_documents, write_qrels, write_queries
from rankmamba.data.runs import write_run
from rankmamba.errors import InputError
from rankmamba.experiment import Experiment
from rankmamba.network.nano import NANO
from rankmamba.reranker import Reranker
from rankmamba.train import TrainConfig, main, train
from rankmamba.training.distil import teacher_scores
from rankmamba.training.groups import TrainingGroups
from rankmamba.training.losses import accuracy, distil_loss, lce_loss
from rankmamba.training.progress import Progress
from rankmamba.training.trainer import LCETrainer, like_length

TINY = dict(epochs=100, batch_size=2, group_size=4, max_length=64, max_query_length=16, learning_rate=5e-3)


def test_lce_is_minus_log_softmax_of_the_positive_by_hand():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
    by_hand = -np.mean([np.log(np.exp(row[0]) / np.exp(row).sum()) for row in scores.numpy()])
    assert lce_loss(scores).item() == pytest.approx(by_hand, abs=1e-6)


def test_distillation_is_the_kl_divergence_from_the_teacher_by_hand():
    scores, teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0], [5.0, 2.0, 2.0]])
    p, q = (np.exp(each.numpy()) / np.exp(each.numpy()).sum(1, keepdims=True) for each in (teacher, scores))
    assert distil_loss(scores, teacher).item() == pytest.approx((p * np.log(p / q)).sum(1).mean(), abs=1e-6)
    assert distil_loss(teacher + 7, teacher).item() == pytest.approx(0, abs=1e-6)


def test_a_student_comes_to_rank_as_its_teacher_whose_scores_are_computed_once(tmp_path, monkeypatch):
    tiny = load("rankmamba/tiny/train")
    torch.manual_seed(5)
    teacher = Reranker.from_pretrained("tiny-bert", max_length=64, max_query_length=16)
    torch.nn.init.normal_(teacher.model.score.weight, std=1.0)
    teacher.save_pretrained(tmp_path / "teacher")
    scored, stop, losses = [], threading.Event(), []
    predict = Reranker.predict
    monkeypatch.setattr(
        Reranker, "predict", lambda self, pairs, **options: scored.append(pairs) or predict(self, pairs, **options)
    )
    config = TrainConfig("tiny-bert", max_steps=60, loss="distil", teacher=str(tmp_path / "teacher"), **TINY)

    def on_step(row):
        losses.append(row["loss"])
        if row["step"] == 30:
            stop.set()

    train(config, tiny, tmp_path / "student", on_step=on_step, stop=stop)
    train(config, tiny, tmp_path / "student", on_step=on_step)
    assert len(losses) == 60 and len(scored) == 1
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_layers_computed_twice_learn_the_same(tmp_path):
    curves = []
    for twice in (False, True):
        config = TrainConfig("tiny-mamba", max_steps=3, gradient_checkpointing=twice, **{**TINY, "learning_rate": 1e-3})
        curves.append([row["loss"] for row in train(config, load("rankmamba/tiny/train"), tmp_path / str(twice)).curve])
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-3)  # of steps of 0.03: AdamW makes much of rounding


@pytest.mark.parametrize(
    "system, learning_rate", [("tiny-bert", 2e-3), ("tiny-neox", 2e-3), ("tiny-mamba", 1e-2), ("tiny-mamba2", 5e-3)]
)
def test_a_hundred_steps_fit_the_tiny_collection(system, learning_rate, tmp_path):
    config = TrainConfig(system, max_steps=100, seed=1, **{**TINY, "learning_rate": learning_rate})
    result = train(config, load("rankmamba/tiny/train"), tmp_path / "model")
    losses = [row["loss"] for row in result.curve]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
    assert result.steps == len(result.curve) == 100
    assert result.tokens == result.curve[-1]["tokens"] > 0


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_seed_gives_the_same_weights_and_curve(bf16, tmp_path):
    def once(folder, seed):
        config = TrainConfig("tiny-mamba", max_steps=6, seed=seed, bf16=bf16, **TINY)
        result = train(config, load("rankmamba/tiny/train"), tmp_path / folder)
        return [row["loss"] for row in result.curve], result.reranker.model.state_dict()

    (first, weights), (second, same), (third, _) = once("a", 1), once("b", 1), once("c", 2)
    assert first == second != third
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_step_run_in_chunks_of_like_length_has_the_loss_of_one_batch(tmp_path, monkeypatch):
    curves = []
    for chunks in (1, 3, 100):
        monkeypatch.setattr(LCETrainer, "CHUNKS", chunks)
        config = TrainConfig("tiny-neox", max_steps=3, bf16=False, **{**TINY, "learning_rate": 1e-3})
        curves.append([row["loss"] for row in train(config, load("rankmamba/tiny/train"), tmp_path / str(chunks)).curve])
    np.testing.assert_allclose(curves[1:], [curves[0]] * 2, rtol=0, atol=1e-5)


def test_the_rate_rises_and_falls_as_configured_and_a_row_of_the_curve_is_of_its_steps_scores_and_all_tokens_so_far(
    tmp_path, monkeypatch
):
    tiny, rates, decays, scored = load("rankmamba/tiny/train"), [], set(), []

    def compute_loss(self, model, inputs, return_outputs=False, _compute=LCETrainer.compute_loss, **options):
        rates.append(self.optimizer.param_groups[0]["lr"])
        decays.update(group["weight_decay"] for group in self.optimizer.param_groups)
        loss, outputs = _compute(self, model, inputs, return_outputs=True, **options)
        scored.append(outputs["logits"].detach())
        return loss

    monkeypatch.setattr(LCETrainer, "compute_loss", compute_loss)
    config = TrainConfig("tiny-neox", max_steps=6, warmup=0.34, weight_decay=0.25, bf16=False, **TINY)
    result = train(config, tiny, tmp_path / "model")
    assert np.allclose(rates, 5e-3 * np.array([0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4])) and decays == {0.25, 0.0}
    assert [row["loss"] for row in result.curve] == pytest.approx([lce_loss(scores).item() for scores in scored], abs=1e-6)
    assert [row["accuracy"] for row in result.curve] == [accuracy(scores).item() for scores in scored]
    groups = TrainingGroups(tiny, tiny.candidates, result.reranker.inputs, 4, config.seed, 12)
    tokens = np.cumsum([sum(map(len, groups[index])) for index in range(12)])[1::2]
    assert [row["tokens"] for row in result.curve] == tokens.tolist() and result.tokens == tokens[-1]


def test_a_tie_does_not_count_as_a_win_of_the_positive():
    assert accuracy(torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0]])).item() == 0.5


def test_stopping_ends_after_the_step_and_keeps_what_was_learnt(tmp_path):
    stop = threading.Event()
    config = TrainConfig("tiny-bert", max_steps=50, **TINY)
    result = train(
        config, load("rankmamba/tiny/train"), tmp_path / "model", on_step=lambda row: row["step"] == 3 and stop.set(), stop=stop
    )
    assert result.stopped and result.steps == 3
    assert Reranker.from_pretrained(tmp_path / "model").predict([("a", "b")]).shape == (1,)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment, by", [("forward", "stop"), ("backward", "stop"), ("backward", "Ctrl-C")])
def test_stopping_within_a_step_gives_it_up_and_the_same_call_goes_on_as_if_never_stopped(moment, by, tmp_path, monkeypatch):
    collection, config = load("rankmamba/tiny/train"), TrainConfig("tiny-mamba", max_steps=6, **TINY)
    whole = train(config, collection, tmp_path / "whole")
    stop, heeded = threading.Event(), []
    heed_stop = Progress.heed_stop

    def listen(progress, args):
        heeded.append(len(progress.curve))
        # a step looks twice a chunk: first on its way forward, then on its way back
        if heeded.count(3) == (2 if moment == "forward" else LCETrainer.CHUNKS + 2):
            stop.set() if by == "stop" else signal.raise_signal(signal.SIGINT)
        heed_stop(progress, args)

    monkeypatch.setattr(Progress, "heed_stop", listen)
    if by == "stop":
        first = train(config, collection, tmp_path / "model", stop=stop)
        assert first.stopped and first.steps == 3
    else:
        with pytest.raises(KeyboardInterrupt):
            train(config, collection, tmp_path / "model")
    assert heeded[-1] == 3
    monkeypatch.setattr(Progress, "heed_stop", heed_stop)
    second = train(config, collection, tmp_path / "model")
    assert not second.stopped and [row["loss"] for row in second.curve] == [row["loss"] for row in whole.curve]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        train(
            TrainConfig("tiny-mamba", max_steps=60, **{**TINY, "learning_rate": 1e30}),
            load("rankmamba/tiny/train"),
            tmp_path / "model",
        )
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "part, said", [("test", "every query_id to be one of rankmamba/tiny/train, got"), (None, "for 0 of the 8 training queries")]
)
def test_candidates_of_another_split_or_none_at_all_are_refused(part, said, tmp_path, capsys):
    run = load(f"rankmamba/tiny/{part or 'train'}").candidates
    write_run(tmp_path / "first.run", run if part else run[:0], "bm25")
    names = {"system": "tiny-bert", "collection": "rankmamba/tiny/train", "folder": tmp_path / "model"}
    lines = [f"{name}: {value}" for name, value in (names | {"candidates": tmp_path / "first.run"}).items()]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    assert main(["--config", str(tmp_path / "train.yaml")]) == 1
    error = capsys.readouterr().err
    assert said in error and not (tmp_path / "model").exists()
    assert not part or f"{tmp_path / 'first.run'}:1" in error


@pytest.mark.parametrize("system", [f"tiny-{name}" for name in NANO])
def test_weights_of_products_alone_are_decayed_in_every_family(system):
    model = Reranker.from_pretrained(system).model
    decayed = LCETrainer.__new__(LCETrainer).get_decay_parameter_names(model)
    kinds = {name.removesuffix(".weight"): parameter.dim() for name, parameter in model.named_parameters() if name in decayed}
    assert kinds and set(kinds.values()) <= {2, 3}  # no vector; 3: the convolution


def test_training_pads_at_most_a_quarter_and_loses_no_pair():
    lengths = np.random.default_rng(0).gamma(3, 40, 64).astype(int) + 12
    chunks = like_length(lengths, LCETrainer.CHUNKS)
    assert sorted(np.concatenate(chunks)) == list(range(64)) and len(chunks) == LCETrainer.CHUNKS
    assert sum(max(lengths[c]) * len(c) for c in chunks) / sum(lengths) <= 1.25
    assert [len(c) for c in like_length([5, 5], 4)] == [1, 1]


def test_every_epoch_draws_its_own_groups_and_the_digest_sees_another_order_query_or_document():
    tiny = load("rankmamba/tiny/train")
    inputs = Reranker.from_pretrained("tiny-bert", max_length=64, max_query_length=16).inputs
    first, second = (lce_groups(tiny.candidates, tiny.qrels, 4, 1, epoch, doc_ids=list(tiny.documents)) for epoch in (0, 1))
    assert TrainingGroups(tiny, tiny.candidates, inputs, 4, 1, 2 * len(first) - 1).groups == [*first, *second[:-1]]

    def groups(documents=tiny.documents, queries=tiny.queries):
        return TrainingGroups(Collection("x", documents, queries, tiny.qrels), tiny.candidates, inputs, 4, 1, len(first))

    edited = [{key: f"indeed {text}" for key, text in texts} for texts in (tiny.documents.pairs(), tiny.queries.items())]
    turned = groups()
    turned.groups.reverse()
    assert groups().digest() == groups().digest()
    assert len({each.digest() for each in (groups(), groups(documents=edited[0]), groups(queries=edited[1]), turned)}) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"group_size": 1},
        {"max_steps": -3},
        {"learning_rate": -1.0},
        {"warmup": 2.0},
        {"epochs": -1.0},
        {"lora_r": -1},
        {"weight_decay": float("nan")},
    ],
)
def test_a_number_out_of_its_range_is_named_before_anything_is_loaded(wrong, tmp_path):
    (name, value), config = *wrong.items(), TrainConfig("no-such-system", **{**TINY, **wrong})
    with pytest.raises(InputError, match=f"expected {name} (from|of at least) .* got {value}"):
        train(config, load("rankmamba/tiny/train"), tmp_path / "model")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_steps": 2.5},
        {"group_size": 4.0},
        {"batch_size": True},
        {"seed": np.int64(1)},
        {"learning_rate": "1e-3"},
        {"bf16": "yes"},
    ],
)
def test_a_value_of_another_type_is_named_before_anything_is_loaded_or_written(wrong, tmp_path):
    (name, value), config = *wrong.items(), TrainConfig("no-such-system", **{**TINY, **wrong})
    with pytest.raises(InputError, match=rf"expected .* as '{name}', got {re.escape(repr(value))}"):
        train(config, load("rankmamba/tiny/train"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["weights", "limits", "texts"])
def test_a_teacher_that_is_another_or_reads_other_texts_is_asked_anew(other, tmp_path):
    tiny, scores = load("rankmamba/tiny/train"), []
    teacher = Reranker.from_pretrained("tiny-bert", max_length=64, max_query_length=16)
    torch.nn.init.normal_(teacher.model.score.weight, std=1.0)
    for again in (False, True):
        if again and other == "weights":
            teacher.model.score.weight.data *= -1
        elif again and other == "limits":
            teacher.model.config.limits = {"max_length": 20, "max_query_length": 16}
        elif again:
            edited = {doc_id: f"edited {text}" for doc_id, text in tiny.documents.pairs()}
            tiny = Collection(tiny.name, edited, tiny.queries, tiny.qrels, tiny.candidates)
        teacher.save_pretrained(tmp_path / "teacher")
        groups = TrainingGroups(tiny, tiny.candidates, teacher.inputs, 4, 0, count=4)
        scores.append(teacher_scores(str(tmp_path / "teacher"), groups, tiny, tmp_path / "kept"))
    assert not np.allclose(*scores)


def test_a_collection_of_ones_own_that_has_no_candidates_is_trained_on_bm25s(tmp_path):
    for part in ("train", "dev", "test"):
        tiny = load(f"rankmamba/tiny/{part}")
        write_documents(tmp_path / "own" / part / "documents.jsonl", tiny.documents.pairs())
        write_queries(tmp_path / "own" / part / "queries.tsv", tiny.queries)
        write_qrels(tmp_path / "own" / part / "qrels.txt", tiny.qrels)
    experiment = Experiment(tmp_path / "results", str(tmp_path / "own"), "tiny")
    own = experiment.split("train")
    assert own.candidates is None
    record = experiment.train(TrainConfig("tiny-bert", 1e-3, batch_size=2, group_size=3, max_steps=2, max_length=64))
    expected = train(
        TrainConfig("tiny-bert", 1e-3, batch_size=2, group_size=3, max_steps=2, max_length=64),
        own,
        tmp_path / "model",
        BM25.build(own.documents).search(own.queries),
    )
    assert record["result"]["curve"] == expected.result()["curve"]


def test_the_heads_dropout_keeps_the_mean_and_every_step_group_and_seed_draws_its_own():
    trainer, masks = LCETrainer.__new__(LCETrainer), []
    trainer.model, trainer.batch_size = Reranker.from_pretrained("tiny-bert").model, 64
    trainer.model.config.head_dropout = 0.25
    for seed, first in ((1, 0), (1, 64), (2, 0)):
        trainer.args = SimpleNamespace(seed=seed)
        masks.append(trainer._dropout_masks(list(range(first, first + 64)), 4))
    values, counts = masks[0].unique(return_counts=True)
    assert values.tolist() == [0, pytest.approx(4 / 3)] and counts[0] / counts.sum() == pytest.approx(0.25, abs=0.02)
    rows = torch.cat(masks)
    assert len(rows.unique(dim=0)) == len(rows) == 3 * 64 * 4
    trainer.args = SimpleNamespace(seed=1)
    assert torch.equal(trainer._dropout_masks([65, 70], 4), masks[1].view(64, 4, -1)[[1, 6]].flatten(0, 1))  # a process's share


def test_a_student_that_begins_as_its_teacher_has_nothing_to_learn_from_any_group(tmp_path):
    torch.manual_seed(5)
    teacher = Reranker.from_pretrained("tiny-bert", max_length=64, max_query_length=16)
    torch.nn.init.normal_(teacher.model.score.weight, std=20.0)
    for config in (teacher.model.config, teacher.model.config.backbone_config):
        for name in ("head_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            setattr(config, name, 0.0)
    teacher.save_pretrained(tmp_path / "teacher")
    same = dict(loss="distil", teacher=str(tmp_path / "teacher"), max_steps=4, bf16=False) | TINY | {"learning_rate": 1e-9}
    result = train(TrainConfig(str(tmp_path / "teacher"), **same), load("rankmamba/tiny/train"), tmp_path / "student")
    assert max(row["loss"] for row in result.curve) < 0.01


@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_the_scores_of_a_step_are_put_back_into_the_order_of_its_groups(chunks):
    tiny, reranker = load("rankmamba/tiny/train"), Reranker.from_pretrained("tiny-bert", max_length=512)
    trainer, groups = LCETrainer.__new__(LCETrainer), TrainingGroups(tiny, tiny.candidates, reranker.inputs, 4, 1, 4)
    trainer.inputs, trainer.groups, trainer.model, trainer.args = reranker.inputs, groups, reranker.model, SimpleNamespace(seed=1)
    trainer.chunks, trainer.batch_size = chunks, 2
    trainer.teacher = np.random.default_rng(0).random((4, 4), dtype=np.float32)
    step = trainer.batch([2, 3])
    assert step["order"].tolist() != sorted(step["order"].tolist())
    rows = [row for each in step["chunks"] for row in zip(each["input_ids"], each["attention_mask"], strict=True)]
    read = [ids[seen > 0].tolist() for ids, seen in rows]
    assert [read[place] for place in step["order"]] == [pair.ids.tolist() for index in (2, 3) for pair in groups[index]]
    masks = torch.cat([each["dropout_mask"] for each in step["chunks"]])
    assert torch.equal(masks[step["order"]], trainer._dropout_masks([2, 3], 4))
    assert step["shape"] == (2, 4) and np.array_equal(step["teacher"], trainer.teacher[2:])
