"""What Transformers compute between products, in one pass: against its definition, against transformers, and where it steps back."""

import copy
import pickle
from contextlib import contextmanager, nullcontext
from functools import partial

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

    for name in ("gelu", "add_norm"):
        monkeypatch.setattr(scan.native, name, counted(name))
    return names


ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8}
EXACT = {torch.float32: 1e-6, torch.bfloat16: 2e-4}  # before a result is rounded
precisions = st.sampled_from(list(ROUNDING))
every_shape = given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    biased=st.booleans(),
    apart=st.integers(0, 3),
    dtype=precisions,
    other=precisions,
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)


def matrix(width, rows, apart, dtype, seed):
    """Random (rows, width), `apart` numbers between the rows."""
    return (3 * torch.randn(rows, width + apart, generator=torch.Generator().manual_seed(seed))).to(dtype)[:, :width]


@contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@compiled
@every_shape
def test_gelu_and_its_gradients_equal_their_definition_in_float64(shape, biased, apart, dtype, other, threads, seed):
    rows, width = shape
    x, upstream = matrix(width, rows, apart, dtype, seed), matrix(width, rows, 3 - apart, other, seed + 1)
    inputs = [x] + [matrix(width, 1, 0, torch.float32, seed + 2)[0]] * biased
    tracked = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = torch.nn.functional.gelu(sum(exact))
    with torch_threads(threads):
        with torch.no_grad():
            scored = scan.native.gelu(x.clone(), inputs[1] if biased else None)
        learnt = scan.native.gelu(tracked[0], tracked[1] if biased else None)
        gradients = torch.autograd.grad(learnt, tracked, upstream.to(dtype))
    assert torch.equal(scored, learnt) and learnt.dtype == dtype
    assert torch.equal(tracked[0], x), "what the backward pass reads"
    assert ((learnt - expected).abs() <= 1e-6 + (ROUNDING[dtype] + EXACT[dtype]) * expected.abs()).all()
    upstream = upstream.to(dtype).double()
    slope = EXACT[dtype] * upstream.abs()
    for got, true, part in zip(gradients, torch.autograd.grad(expected, exact, upstream), (slope, slope.sum(0)), strict=False):
        assert got.shape == true.shape
        assert ((got - true).abs() <= part + ROUNDING[got.dtype] * true.abs() + 1e-5).all()


@compiled
def test_gelu_at_the_ends():
    x = torch.tensor([[-1e30, -100.0, 0.0, 100.0, torch.inf, -torch.inf, torch.nan]], requires_grad=True)
    y = scan.native.gelu(x, None)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    close = partial(torch.testing.assert_close, rtol=0, atol=2e-7, equal_nan=True)
    close(y, torch.tensor([[0.0, 0.0, 0.0, 100.0, torch.inf, 0.0, torch.nan]]))
    close(slope, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0, 0.0, torch.nan]]))


@compiled
@every_shape
@torch.no_grad()
def test_add_norm_equals_its_definition_in_float64(shape, biased, apart, dtype, other, threads, seed):
    rows, width = shape
    x, beside = matrix(width, rows, apart, dtype, seed), matrix(width + apart, rows, 0, dtype, seed)
    residual = matrix(rows, width, 0, other, seed + 1).t() if apart == 1 else matrix(width, rows, apart, other, seed + 1)
    bias, weight, shift = matrix(width, 3, 0, torch.float32, seed + 2)
    added = x.double() + residual.double() + (bias.double() if biased else 0)
    norm = torch.nn.functional.layer_norm(added, (width,), weight.double(), shift.double(), 1e-5)
    with torch_threads(threads):
        normed = scan.native.add_norm(beside[:, :width], bias if biased else None, residual, weight, shift, 1e-5)
    # where a row is nearly constant, its deviation is all rounding
    spread = added.std(-1, correction=0, keepdim=True).clamp_min(1e-3)
    assert normed.dtype == other
    assert ((normed - norm).abs() * spread.clamp_max(1) <= 6e-5 + ROUNDING[other] * norm.abs()).all()
    assert torch.equal(beside[:, width:], matrix(width + apart, rows, 0, dtype, seed)[:, width:])  # what lies between the rows


@compiled
@every_family
@torch.no_grad()
def test_scoring_runs_them_and_gives_the_numbers_of_transformers(family, calls):
    theirs, ids = lively(family), torch.randint(60, (3, 7))
    ours = use_kernels(copy.deepcopy(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(hidden(ours, ids), hidden(theirs, ids), rtol=1e-5, atol=1e-5)
    assert calls.count("gelu") == 2 and calls.count("add_norm") == (0 if family == "gpt_neox" else 4)
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
    assert calls.count("gelu") == 2 and calls.count("add_norm") == (0 if family == "gpt_neox" else 4)


@compiled
@every_family
def test_training_runs_gelu_and_gives_the_gradients_of_transformers(family, calls):
    theirs, ids = lively(family), torch.randint(60, (8, 20))
    ours, upstream = use_kernels(copy.deepcopy(theirs)), torch.randn(8, 20, SIZES["hidden_size"])

    def gradients(model, dtype=None):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            states = hidden(model, ids)
        found = torch.autograd.grad((states * upstream).sum(), list(model.parameters()), materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    expected = gradients(theirs)
    torch.testing.assert_close(gradients(ours), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    got, rounded = (gradients(model, torch.bfloat16) for model in (ours, theirs))
    assert (got - expected).norm() <= 1.1 * (rounded - expected).norm()
    assert calls == ["gelu"] * 4


@compiled
@every_family
def test_other_precisions_and_activations_adapters_and_watched_parts_stay_with_pytorch(family, calls):
    ids, adapted = torch.randint(60, (3, 7)), FAMILIES[family][2]
    lora = get_peft_model(use_kernels(lively(family)), LoraConfig(target_modules=adapted, init_lora_weights=False)).eval()
    relu = use_kernels(lively(family, hidden_act="relu"))
    replaced, watched, patched, seen, passed = *(use_kernels(lively(family)) for _ in range(3)), [], []
    for module in list(replaced.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, torch.nn.Linear):
                setattr(module, name, torch.nn.Sequential(part))  # without weights of its own, as a quantised one
    for part in watched.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda part, inputs, output: seen.append(part))
    traced_back = use_kernels(lively(family))
    named = traced_back.named_modules()
    parts = [part for name, part in named if isinstance(part, torch.nn.Linear) and "pooler" not in name]
    for part in parts:
        part.register_full_backward_hook(lambda part, inputs, outputs: passed.append(part))
    hidden(traced_back, ids).sum().backward()
    with torch.no_grad():
        hidden(traced_back, ids)
    assert len(set(passed)) == len(parts) and not calls
    for part in patched.modules():
        if isinstance(part, torch.nn.Linear):
            part.forward = part.forward
    for model, autocast in [
        (lora, nullcontext()),
        (replaced, nullcontext()),
        (watched, nullcontext()),
        (patched, nullcontext()),
        (use_kernels(lively(family)), torch.autocast("cpu", torch.float16)),
        (use_kernels(lively(family)).double(), nullcontext()),
    ]:
        with torch.no_grad(), autocast:
            assert hidden(model, ids).isfinite().all()
    assert not calls and len(set(seen)) == sum(isinstance(part, torch.nn.Linear) for part in watched.modules())
    model = use_kernels(lively(family))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        assert hidden(model, ids).isfinite().all()
    with scan.forced("portable"):
        hidden(model, ids).sum().backward()
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
    assert "gelu" not in calls


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
