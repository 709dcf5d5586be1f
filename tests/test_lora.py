"""LoRA: what is adapted really learns, in every family, and a saved model is an ordinary one with the same scores."""

import numpy as np
import pytest
import torch

from rankmamba.collection import load
from rankmamba.lora import add_lora, merge_lora
from rankmamba.reranker import Reranker
from rankmamba.systems import SYSTEMS
from rankmamba.train import TrainConfig, train

TINY = sorted(name for name in SYSTEMS if name.startswith("tiny-"))
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
    merge_lora(adapted)
    np.testing.assert_allclose(reranker.predict(PAIRS), unmerged, rtol=0, atol=1e-5)
    assert [name for name, _ in reranker.model.named_parameters()] == names


def test_training_with_lora_moves_only_its_maps_and_saves_an_ordinary_folder(tmp_path):
    config = TrainConfig(
        "tiny-mamba", lora_r=4, lora_alpha=8, max_steps=6, batch_size=2, group_size=4, max_length=64, max_query_length=16, learning_rate=1e-2
    )
    result = train(config, load("rankmamba/tiny/train"), tmp_path / "model")
    torch.manual_seed(config.seed)
    saved = Reranker.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(saved.predict(PAIRS), result.reranker.predict(PAIRS))
    assert not [name for name in saved.model.state_dict() if "lora" in name or "base_layer" in name]
