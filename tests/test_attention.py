"""Our attention and its gradients against their definition, in every layout, and SDPA wherever it steps back."""

import copy
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXModel, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from rankmamba import scan
from rankmamba.errors import InputError
from rankmamba.network.native_attention import NATIVE
from rankmamba.network.native_attention import native_attention as attend
from rankmamba.network.substitutes import use_kernels

compiled = pytest.mark.skipif(scan.kernel("cpu").name != "native", reason="no compiler was there")


def exact(query, key, value, seen, causal, scale, bias=None):
    """softmax(q k^T scale + bias) v in float64: (B, L, H, P); zeros for a query that sees no key."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(shared, 1) for t in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias.double()
    queries, keys = scores.shape[2:]
    hides = torch.zeros(len(scores), 1, queries, keys, dtype=torch.bool)
    if seen is not None:
        hides = hides | ~seen[:, None, None]
    if causal:
        hides = hides | ~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    blind = hides.all(-1, keepdim=True)
    weights = scores.masked_fill(hides & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0)
    return (weights @ value).transpose(1, 2)


def laid_out(tensor, layout):
    """The same numbers elsewhere in memory: as they are, head beside head in a token, or with others between them."""
    if layout == "heads first":
        return tensor
    if layout == "tokens first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "among others":
        return (
            torch.stack([torch.full_like(tensor, torch.nan), tensor], 3).transpose(1, 2).contiguous().transpose(1, 2)[..., 1, :]
        )
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@compiled
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 90), st.integers(0, 70), st.integers(1, 70)
    ),
    layout=st.sampled_from(["heads first", "tokens first", "among others", "numbers apart"]),
    causal=st.booleans(),
    hidden=st.booleans(),
    biased=st.booleans(),
    large=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    wide=st.booleans(),  # where PyTorch rotates them in autocast, queries and keys are float32 again
    rotated=st.sampled_from([0, 0.25, 1]),  # of a head
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_attention_equals_its_definition_in_float64_in_every_shape_and_layout(
    shape, layout, causal, hidden, biased, large, dtype, wide, rotated, threads, seed
):
    batch, heads, shared, queries, past, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads * shared, queries), (heads, queries + past), (heads, queries + past)
    scale = 30 if large and dtype == torch.float32 else 1
    query, key, value = ((torch.randn(batch, *size, width, generator=generator) * scale).to(dtype) for size in sizes)
    if wide:
        query, key = query.float(), key.float()
    pairs = 0 if past else int(width * rotated) // 2
    angles = torch.randn(batch if layout == "heads first" else 1, queries, pairs, generator=generator).tile(2)
    rotary = (angles.cos(), angles.sin()) * 2 if pairs else None
    seen = None
    if hidden:
        seen = torch.rand(batch, queries + past, generator=generator) < 0.7
    bias = torch.randn(1, heads * shared, queries, queries + past, generator=generator) * 3 if biased else None
    tensors = [laid_out(tensor, layout) for tensor in (query, key, value)]
    module, options = types.SimpleNamespace(is_causal=causal), {"scaling": width**-0.5, "position_bias": bias, "rotary": rotary}
    upstream = laid_out(torch.randn(batch, queries, heads * shared, width, generator=generator), layout).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            got, _ = attend(module, *tensors, seen, **options)
        learning = [tensor.requires_grad_() for tensor in tensors]
        trained, _ = attend(module, *learning, seen, **options)
        assert torch.equal(trained, got) and trained.grad_fn.name() == "_AttentionBackward"
        gradients = torch.autograd.grad(trained, learning, upstream)
    finally:
        torch.set_num_threads(before)
    doubles = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    turned = doubles if rotary is None else (*apply_rotary_pos_emb(*doubles[:2], *rotary[:2]), doubles[2])
    expected = exact(*turned, seen, causal, width**-0.5, bias)
    # a score of some thousands is rounded to 1e-4 before its exponential is taken; bfloat16 rounds weights and results to 1/512 each
    assert got.dtype == dtype
    error = 1 / 250 if dtype == torch.bfloat16 else 1e-3 if scale > 1 else 2e-6
    assert (got - expected).abs().max() <= error * value.abs().max()
    if scale == 1:
        error = 1 / 30 if dtype == torch.bfloat16 else 1e-5
        exactly = torch.autograd.grad(expected, doubles, upstream.double())
        for tensor, gradient, right in zip(learning, gradients, exactly, strict=True):
            assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
            assert (gradient - right).abs().max() <= error * right.abs().max().clamp_min(1)


@compiled
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_where_dropout_a_biass_gradient_or_another_precision_is_wanted_sdpa_hides_the_same_keys_and_adds_the_same_bias(
    past, causal, hidden, biased, monkeypatch
):
    query, key, value = (torch.randn(2, 3, 12 + more, 16, requires_grad=True) for more in (0, past, past))
    seen = torch.rand(2, 12 + past) < 0.7 if hidden else None
    if hidden:
        seen[:, 0] = True
    bias = torch.randn(1, 3, 12, 12 + past, requires_grad=True) if biased else None
    module = types.SimpleNamespace(is_causal=causal)
    expected = exact(query, key, value, seen, causal, 0.25, bias)
    learning = (query, key, value, *([bias] if biased else []))
    gradients = torch.autograd.grad(attend(module, query, key, value, seen, position_bias=bias)[0].square().sum(), learning)
    for got, right in zip(gradients, torch.autograd.grad(expected.square().sum(), learning), strict=True):
        assert torch.allclose(got, right, atol=1e-5)
    with torch.no_grad():
        torch.compiler.reset()  # which compiles a function a few times and then no more
        half_bias = None if bias is None else bias.half()
        rounded = attend(module, query.half(), key.half(), value.half(), seen, position_bias=half_bias)[0]
        traced = torch.compile(attend, backend="eager", fullgraph=True)(module, query, key, value, seen, position_bias=bias)[0]
        monkeypatch.setattr(scan.native, "attention", None)
        dropped = attend(module, query, key, value, seen, position_bias=bias, dropout=0.5)[0]
    assert not torch.allclose(dropped.double(), expected, atol=0.05)
    assert rounded.dtype == torch.float16 and torch.allclose(rounded.double(), expected, atol=0.01)
    assert torch.allclose(traced.double(), expected, atol=1e-5)


def with_both(model, run):
    """What a model gives with our attention and with SDPA."""
    found = []
    for implementation in (NATIVE, "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(run(model.eval()))
    return found


SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@compiled
@pytest.mark.parametrize("left", [0, 3])
def test_generation_on_a_cache_with_places_to_come_is_that_of_sdpa(left):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    seen = torch.ones(2, 9, dtype=torch.long)
    seen[0, :left] = 0
    ids = torch.randint(3, 50, (2, 9))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = with_both(
        model, lambda m: m.generate(ids, attention_mask=seen, cache_implementation="static", **options).logits
    )
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("rotary", [0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpt_neox_rotates_in_the_kernel_and_is_that_of_transformers_in_scoring_training_and_on_a_cache(
    rotary, dtype, monkeypatch
):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    theirs = GPTNeoXModel(GPTNeoXConfig(**SIZES | {"hidden_size": 64}, rope_parameters=rope, attention_dropout=0.5)).eval()
    ids, seen = torch.randint(3, 50, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    seen[0, 30:] = 0
    ours, rotations = use_kernels(copy.deepcopy(theirs)), []
    ours.set_attn_implementation(NATIVE)
    kernel = scan.native.attention
    monkeypatch.setattr(scan.native, "attention", lambda *given: rotations.append(given[-1] is not None) or kernel(*given))

    def states(model, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(ids, attention_mask=seen, **options).last_hidden_state.float()[seen.bool()]

    def learnt(model):
        gradients = torch.autograd.grad(states(model, use_cache=False).square().sum(), list(model.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    def close(got, expected, error):
        assert (got - expected).norm() <= error * expected.norm()

    error = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        close(states(ours, use_cache=False), states(theirs), error)
    close(learnt(ours), learnt(theirs), error)
    assert rotations == [True] * 4
    with torch.no_grad():
        close(states(ours, use_cache=True), states(theirs), error)
        past = ours(ids[:, :25], use_cache=True).cache
        continued = ours(ids[:, 25:30], cache=past).last_hidden_state
        close(continued, theirs(ids[:, :30]).last_hidden_state[:, 25:], 1e-5)
        assert not any(rotations[4:])
        after = len(rotations)
        # where SDPA takes over, PyTorch rotates
        with torch.autocast("cpu", torch.float16):
            halves = [model(ids, attention_mask=seen, use_cache=False).last_hidden_state[seen.bool()] for model in (ours, theirs)]
        close(*halves, 1e-3)
        dropped = states(ours.train(), use_cache=False)
        assert not torch.allclose(dropped, states(ours, use_cache=False))  # SDPA's, which draws anew
        assert len(rotations) == after


@compiled
def test_packed_texts_do_not_see_one_another():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    ids = torch.randint(3, 50, (1, 9))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    ours, theirs = with_both(model, lambda m: m(ids, position_ids=places, use_cache=False).logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    alone, _ = with_both(model, lambda m: m(ids[:, 4:]).logits)
    torch.testing.assert_close(ours[:, 4:], alone, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("given", [4, 12])
def test_a_padding_mask_shorter_or_longer_than_what_was_read_is_that_of_sdpa(given):
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(LlamaConfig(**SIZES)), torch.randint(3, 50, (2, 9))
    seen = torch.ones(2, given, dtype=torch.long)
    seen[0, 1] = 0

    def run(model):
        past = model(ids[:, :5], use_cache=True).cache
        return model(ids[:, 5:], attention_mask=seen, cache=past).logits

    ours, theirs = with_both(model, run)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("causal", [False, True])
def test_one_mask_for_all_texts_and_more_queries_than_keys_are_as_in_sdpa(causal):
    query, key, value = torch.randn(2, 3, 12, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    seen = torch.rand(1, 9) < 0.7
    module = types.SimpleNamespace(is_causal=causal)
    for first in (0, 3):  # with 12 queries and with 9
        got, _ = attend(module, query[:, :, first:], key, value, seen)
        assert torch.allclose(got.double(), exact(query[:, :, first:], key, value, seen, causal, 0.25), atol=1e-5)


@compiled
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_pairs_is_that_of_sdpa(additive):
    torch.manual_seed(0)
    model, ids = BertModel(BertConfig(**SIZES)), torch.randint(3, 50, (2, 9))
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours, theirs = with_both(model, lambda m: m(ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_precision_does_not_reach_the_mask(dtype):
    query, key, value = (torch.randn(2, 3, 12, 16) for _ in range(3))
    seen = torch.ones(2, 12, dtype=torch.bool).index_fill(1, torch.arange(9, 12), False)
    before = scan.native.attention(query, key, value, seen, False, 0.25)
    torch.set_default_dtype(dtype)
    try:
        after = scan.native.attention(query, key, value, seen, False, 0.25)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(after, before)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
MISFITS = {
    "key heads that do not divide": {"key": torch.zeros(2, 3, 7, 8), "value": torch.zeros(2, 3, 7, 8)},
    "more key heads": {"key": torch.zeros(2, 8, 7, 8), "value": torch.zeros(2, 8, 7, 8)},
    "keys of another batch": {"key": torch.zeros(1, 2, 7, 8), "value": torch.zeros(1, 2, 7, 8)},
    "wider keys": {"key": torch.zeros(2, 2, 7, 9), "value": torch.zeros(2, 2, 7, 9)},
    "fewer values": {"value": torch.zeros(2, 2, 6, 8)},
    "a shorter mask": {"seen": torch.ones(2, 6)},
    "angles beyond a head": {"rotary": (torch.zeros(1, 5, 32),) * 2 + (torch.zeros(1, 7, 32),) * 2},
    "too few angles": {"rotary": (torch.zeros(1, 4, 8),) * 2 + (torch.zeros(1, 7, 8),) * 2},
}


@compiled
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_what_would_lead_the_kernel_beyond_its_memory_is_refused(misfit):
    from rankmamba.scan import native

    fits = {"query": Q, "key": K, "value": K, "seen": None, "causal": False, "scale": 1.0}
    assert native.attention(**fits).shape == (2, 5, 4, 8)
    with pytest.raises(InputError, match="expected"):
        native.attention(**fits | misfit)
