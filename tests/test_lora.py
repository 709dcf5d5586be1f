"""LoRA: what is adapted really learns, in every family, and a saved model is an ordinary one with the same scores."""

import threading

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, set_seed

from rankmamba.backbones import find
from rankmamba.collection import load
from rankmamba.errors import InputError
from rankmamba.files import sha256
from rankmamba.reranker import Reranker
from rankmamba.systems import SYSTEMS
from rankmamba.train import TrainConfig, train
from rankmamba.training.lora import add_lora

TINY = sorted(name for name in SYSTEMS if name.startswith("tiny-"))
SMALL = dict(batch_size=2, group_size=4, max_length=64, max_query_length=16)
PAIRS = [("what do bees make", f"Bees make honey and wax in a hive, said number {n}. " * (n + 1)) for n in range(4)]


def lively(system: str) -> Reranker:
    """A random model in which no weight is too small to be seen at the output."""
    torch.manual_seed(0)
    reranker = Reranker.from_pretrained(system, dtype=torch.float32, max_length=64, max_query_length=16)
    for parameter in reranker.model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return reranker


@pytest.mark.parametrize("system", TINY)
def test_every_adapted_map_receives_gradients_and_merging_keeps_the_scores(system):
    reranker = lively(system)
    names = [name for name, _ in reranker.model.named_parameters()]
    before = reranker.predict(PAIRS)
    adapted = add_lora(reranker.model, r=4, alpha=8)
    np.testing.assert_allclose(reranker.predict(PAIRS), before, rtol=0, atol=1e-5)
    for name, parameter in reranker.model.named_parameters():
        if "lora_B" in name:  # starts at zero, and A's gradient with it
            torch.nn.init.normal_(parameter, std=0.1)
    reranker.model.train()
    pairs = [reranker.inputs.join(reranker.inputs.queries([q])[0], reranker.inputs.documents([d])[0]) for q, d in PAIRS]
    scores = reranker.model(**reranker.inputs.collate(pairs)).logits[:, 0]
    (scores * torch.arange(1.0, 5.0)).sum().backward()
    trained = {name: p.grad for name, p in reranker.model.named_parameters() if p.requires_grad}
    assert {"score.weight", "score.bias"} < set(trained)
    assert len(trained) >= 2 * 2 * reranker.model.config.backbone_config.num_hidden_layers
    assert not [name for name in trained if "lora_" not in name and "score" not in name]
    assert not [name for name, gradient in trained.items() if gradient is None or gradient.abs().max() == 0]
    reranker.model.eval()
    unmerged = reranker.predict(PAIRS)
    assert np.abs(unmerged - before).max() > 1e-3
    adapted.merge_and_unload()
    np.testing.assert_allclose(reranker.predict(PAIRS), unmerged, rtol=0, atol=1e-5)
    assert [name for name, _ in reranker.model.named_parameters()] == names


def test_adapters_of_peft_on_everything_count_on_the_head_too_and_a_model_that_has_them_is_not_saved(tmp_path):
    reranker = lively("tiny-mamba")
    reranker.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(reranker.model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(200, 300, (2, 12))
    reranker.model.eval()
    adapted(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "score" in name and "lora_" in name)
    before = {path.name: sha256(path) for path in (tmp_path / "model").iterdir()}
    with pytest.raises(InputError, match="expected a plain network to save, got a wrapped one .*merge adapters first"):
        reranker.save_pretrained(tmp_path / "model")
    assert {path.name: sha256(path) for path in (tmp_path / "model").iterdir()} == before
    unmerged = reranker.predict(PAIRS)
    adapted.merge_and_unload()
    reranker.save_pretrained(tmp_path / "model")
    again = Reranker.from_pretrained(tmp_path / "model", dtype=torch.float32)
    np.testing.assert_allclose(again.predict(PAIRS), unmerged, rtol=0, atol=1e-5)


def test_training_with_lora_moves_only_its_maps_and_saves_an_ordinary_folder(tmp_path):
    config = TrainConfig("tiny-mamba", lora_r=4, lora_alpha=8, epochs=10, max_steps=4, learning_rate=1e-2, **SMALL)
    set_seed(config.seed)
    before = Reranker.from_pretrained("tiny-mamba").model.state_dict()
    result = train(config, load("rankmamba/tiny/train"), tmp_path / "model")
    saved = Reranker.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(saved.predict(PAIRS), result.reranker.predict(PAIRS), rtol=0, atol=1e-7)
    after = saved.model.state_dict()
    assert list(after) == list(before)
    moved = {name.split(".")[-2] for name in before if not torch.equal(after[name], before[name])}
    assert moved == {"in_proj", "x_proj", "dt_proj", "out_proj", "score"}
    assert torch.equal(after["score.bias"], before["score.bias"])  # which no loss over a group sees
    assert result.result()["parameters"] == saved.model.num_parameters()


def test_training_with_lora_goes_on_from_its_checkpoint(tmp_path):
    config = TrainConfig("tiny-bert", lora_r=4, lora_alpha=8, epochs=10, max_steps=4, learning_rate=1e-2, **SMALL)
    collection, stop = load("rankmamba/tiny/train"), threading.Event()
    whole = train(config, collection, tmp_path / "whole")
    assert train(config, collection, tmp_path / "cut", on_step=lambda row: row["step"] == 2 and stop.set(), stop=stop).stopped
    cut = train(config, collection, tmp_path / "cut")
    assert cut.result() == whole.result()
    assert sha256(tmp_path / "cut" / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")


def test_a_checkpoint_outside_the_table_gets_lora_by_its_own_size(tmp_path):
    MambaConfig(hidden_size=2048, num_hidden_layers=48).save_pretrained(tmp_path / "large")  # mamba-1.4b's shape
    large = find(str(tmp_path / "large"))
    assert large.lora_r == SYSTEMS["mamba-1.4b"].lora_r == 64 and large.millions == pytest.approx(1372, abs=1)
    small = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=512))
    small.save_pretrained(tmp_path / "small")
    found = find(str(tmp_path / "small"))
    assert found.lora_r == 0 and found.millions == small.base_model.num_parameters() / 1e6
