"""What Transformers compute between products, in one pass: against its definition, against transformers, and where it steps back."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    RobertaConfig,
    RobertaModel,
)

from rankmamba import scan
from rankmamba.network.substitutes import use_kernels
from rankmamba.reranker import Reranker

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80}
FAMILIES = {
    "bert": (BertModel, BertConfig, ["query", "dense"]),
    "roberta": (RobertaModel, RobertaConfig, ["query", "dense"]),
    "electra": (ElectraModel, ElectraConfig, ["query", "dense"]),
    "gpt_neox": (GPTNeoXModel, GPTNeoXConfig, ["dense_h_to_4h"]),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
compiled = pytest.mark.skipif(scan.kernel("cpu").name != "native", reason="no compiler was there")


def lively(family, **options):
    """A random model whose biases and norms matter, too."""
    torch.manual_seed(0)
    model, config, _ = FAMILIES[family]
    built = model(config(**SIZES, **options)).eval()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return built


def hidden(model, ids):
    return model(input_ids=ids).last_hidden_state


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that ran, in order."""
    names = []

    def counted(name):
        kernel = getattr(scan.native, name)
        return lambda *args: names.append(name) or kernel(*args)

    for name in ("gelu_", "add_norm"):
        monkeypatch.setattr(scan.native, name, counted(name))
    return names


@compiled
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    biased=st.booleans(),
    apart=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    residual_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_both_equal_their_definitions_in_float64_in_every_shape(shape, biased, apart, dtype, residual_dtype, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator) * scale

    wide = normal(rows, width + apart, scale=3).to(dtype)
    bias, weight, shift = (normal(width) for _ in range(3))
    bias = bias if biased else None
    residual = (normal(width, rows).t() if apart == 1 else normal(rows, width + apart)[:, :width]).to(residual_dtype)
    x = wide[:, :width]
    added = x.double() if bias is None else x.double() + bias.double()
    gelu = torch.nn.functional.gelu(added)
    norm = torch.nn.functional.layer_norm(added + residual.double(), (width,), weight.double(), shift.double(), 1e-5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = scan.native.gelu_(wide.clone()[:, :width], bias)
        beside = wide.clone()
        normed = scan.native.add_norm(beside[:, :width], bias, residual, weight, shift, 1e-5)
    finally:
        torch.set_num_threads(before)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8}
    assert got.dtype == dtype and ((got - gelu).abs() <= 3e-6 + rounding[dtype] * gelu.abs()).all()
    ends = scan.native.gelu_(torch.tensor([[-1e30, -100.0, 100.0, torch.inf, -torch.inf, torch.nan]]), None)
    torch.testing.assert_close(
        ends, torch.tensor([[0.0, 0.0, 100.0, torch.inf, 0.0, torch.nan]]), rtol=0, atol=1e-6, equal_nan=True
    )
    # where a row is nearly constant, its deviation is all rounding
    spread = (added + residual.double()).std(-1, correction=0, keepdim=True).clamp_min(1e-3)
    assert normed.dtype == residual_dtype
    assert ((normed - norm).abs() * spread.clamp_max(1) <= 2e-5 + rounding[residual_dtype] * norm.abs()).all()
    assert torch.equal(beside[:, width:], wide[:, width:])  # what lies between the rows


@compiled
@every_family
@torch.no_grad()
def test_scoring_runs_them_and_gives_the_numbers_of_transformers(family, calls):
    theirs, ids = lively(family), torch.randint(60, (3, 7))
    ours = use_kernels(copy.deepcopy(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(hidden(ours, ids), hidden(theirs, ids), rtol=1e-5, atol=1e-5)
    assert calls.count("gelu_") == 2 and calls.count("add_norm") == (0 if family == "gpt_neox" else 4)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(hidden(other, ids), hidden(ours, ids))


@compiled
@every_family
@torch.no_grad()
def test_in_bfloat16_they_run_too_and_round_no_more_than_pytorch(family, calls):
    theirs, ids = lively(family), torch.randint(60, (8, 20))
    ours, expected = use_kernels(copy.deepcopy(theirs)), hidden(theirs, ids)
    with torch.autocast("cpu", torch.bfloat16):
        got, rounded = hidden(ours, ids), hidden(theirs, ids)
    assert got.dtype == rounded.dtype
    assert (got - expected).abs().mean() <= 1.1 * (rounded - expected).abs().mean()
    assert calls.count("gelu_") == 2 and calls.count("add_norm") == (0 if family == "gpt_neox" else 4)


@compiled
@every_family
def test_training_other_precisions_and_activations_adapters_and_watched_parts_stay_with_pytorch(family, calls):
    ids, adapted = torch.randint(60, (3, 7)), FAMILIES[family][2]
    training = use_kernels(lively(family)).train()
    lora = get_peft_model(use_kernels(lively(family)), LoraConfig(target_modules=adapted, init_lora_weights=False)).eval()
    relu = use_kernels(lively(family, hidden_act="relu"))
    replaced, watched, patched, seen = *(use_kernels(lively(family)) for _ in range(3)), []
    for module in list(replaced.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, torch.nn.Linear):
                setattr(module, name, torch.nn.Sequential(part))  # without weights of its own, as a quantised one
    for part in watched.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda part, inputs, output: seen.append(part))
    for part in patched.modules():
        if isinstance(part, torch.nn.Linear):
            part.forward = part.forward
    gradient, steps_back = torch.enable_grad(), torch.no_grad()
    for model, context, autocast in [
        (use_kernels(lively(family)), gradient, nullcontext()),
        (training, steps_back, nullcontext()),
        (lora, steps_back, nullcontext()),
        (replaced, steps_back, nullcontext()),
        (watched, steps_back, nullcontext()),
        (patched, steps_back, nullcontext()),
        (use_kernels(lively(family)), steps_back, torch.autocast("cpu", torch.float16)),
        (use_kernels(lively(family)).double(), steps_back, nullcontext()),
    ]:
        with context, autocast:
            assert hidden(model, ids).isfinite().all()
    assert not calls and len(set(seen)) == sum(isinstance(part, torch.nn.Linear) for part in watched.modules())
    model = use_kernels(lively(family))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        assert hidden(model, ids).isfinite().all()
    assert not calls
    hook = torch.nn.modules.module.register_module_forward_hook(lambda part, inputs, output: None)
    try:
        with torch.no_grad():
            hidden(use_kernels(lively(family)), ids)
    finally:
        hook.remove()
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(hidden(relu, ids), hidden(lively(family, hidden_act="relu"), ids), rtol=1e-5, atol=1e-5)
    assert "gelu_" not in calls


@compiled
def test_a_reranker_says_whether_they_run():
    said = {
        (name, dtype): Reranker.from_pretrained(name, device="cpu", dtype=dtype).setup["fused"]
        for name in ("tiny-bert", "tiny-neox", "tiny-opt", "tiny-mamba")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert {which for which, runs in said.items() if runs == "native"} == {
        (name, dtype) for name in ("tiny-bert", "tiny-neox") for dtype in (torch.float32, torch.bfloat16)
    }
