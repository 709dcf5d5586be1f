"""Training: the LCE loss, the recipe, reproducibility, stopping."""

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rankmamba.collection import load
from rankmamba.inputs import token_batches
from rankmamba.reranker import Reranker
from rankmamba.train import LCETrainer, TrainConfig, lce_loss, train

TINY = dict(epochs=100, batch_size=2, group_size=4, max_length=64, max_query_length=16, learning_rate=5e-3)


def test_lce_is_minus_log_softmax_of_the_positive_by_hand():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
    by_hand = -np.mean([np.log(np.exp(row[0]) / np.exp(row).sum()) for row in scores.numpy()])
    assert lce_loss(scores).item() == pytest.approx(by_hand, abs=1e-6)


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


def test_a_step_run_in_chunks_of_like_length_has_the_loss_of_one_batch(tmp_path):
    reranker = Reranker.from_pretrained("tiny-neox", dtype=torch.float32)
    trainer = LCETrainer.__new__(LCETrainer)
    trainer.pairs, trainer.tokens = reranker.inputs, 0
    documents = reranker.inputs.documents(["one", "two words", "a much longer text " * 9, "four " * 30] * 2)
    query = reranker.inputs.queries(["a query"])[0]
    pairs = [reranker.inputs.join(query, document) for document in documents]
    batch = trainer._collate([pairs[:4], pairs[4:]])
    assert len(batch["chunks"]) > 1
    whole = reranker.model(**reranker.inputs.collate(pairs)).logits.view(2, 4)
    expected = F.cross_entropy(whole, torch.zeros(2, dtype=torch.long))
    assert trainer.compute_loss(reranker.model, batch).item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_tie_does_not_count_as_a_win_of_the_positive():
    reranker = Reranker.from_pretrained("tiny-neox", dtype=torch.float32)
    trainer = LCETrainer.__new__(LCETrainer)
    trainer.pairs, trainer.tokens = reranker.inputs, 0
    pair = reranker.inputs.join(reranker.inputs.queries(["q"])[0], reranker.inputs.documents(["same"])[0])
    trainer.compute_loss(reranker.model, trainer._collate([[pair] * 4]))
    assert trainer.accuracy == 0.0


def test_stopping_ends_after_the_step_and_keeps_what_was_learnt(tmp_path):
    stop = threading.Event()
    config = TrainConfig("tiny-bert", max_steps=50, **TINY)
    result = train(
        config, load("rankmamba/tiny/train"), tmp_path / "model", on_step=lambda row: row["step"] == 3 and stop.set(), stop=stop
    )
    assert result.stopped and result.steps == 3
    assert Reranker.from_pretrained(tmp_path / "model").predict([("a", "b")]).shape == (1,)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        train(
            TrainConfig("tiny-mamba", max_steps=60, **{**TINY, "learning_rate": 1e30}),
            load("rankmamba/tiny/train"),
            tmp_path / "model",
        )
    assert not (tmp_path / "model").exists()


def test_state_space_parameters_are_not_decayed():
    model = Reranker.from_pretrained("tiny-mamba").model
    trainer = LCETrainer.__new__(LCETrainer)
    decayed = trainer.get_decay_parameter_names(model)
    assert not [name for name in decayed if "A_log" in name or name.endswith(".D") or "bias" in name]
    assert any("in_proj.weight" in name for name in decayed)


def test_training_pads_at_most_a_quarter():
    lengths = np.random.default_rng(0).gamma(3, 40, 64).astype(int) + 12
    chunks = token_batches(lengths, max(max(lengths), -(-sum(lengths) // LCETrainer.CHUNKS)))
    assert sum(max(lengths[c]) * len(c) for c in chunks) / sum(lengths) <= 1.25
