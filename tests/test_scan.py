"""The scan against its definition: every kernel, value and gradient, every shape."""

import logging
import subprocess
import sys
import types

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rankmamba import scan
from rankmamba.errors import InputError
from rankmamba.scan import dispatch, portable, reference

KERNELS = ["portable"]
if scan.kernel("cpu").name == "native":
    KERNELS.append("native")
if torch.cuda.is_available() and scan.kernel("cuda").name == "cuda":
    KERNELS.append("cuda")  # on a machine with a GPU every claim is tested there, too
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
# The CUDA kernels compute with fast exponentials, Mamba-2's products in TF32.
CUDA_LIMITS = {"selective_scan": 1e-5, "ssd_scan": 5e-3, "causal_conv1d": 1e-5, "rms_norm": 1e-5, "mamba2_inner": 1e-2}


def runs_on_gpu(kernel):
    """A stand-in for "cuda" runs on a CPU, too."""
    return kernel == "cuda" and "cuda" in KERNELS


def on(kernel, tensors):
    """The tensors among the values on the device that `kernel` runs on."""
    device = "cuda" if runs_on_gpu(kernel) else "cpu"
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}


def error(got, expected):
    """The largest difference, relative to the largest value (1e-3 where that is smaller: some gradients are exactly zero)."""
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)) if expected.numel() else 0.0


def values_and_gradients(function, tensors, **options):
    """Outputs, and the gradient of a fixed random sum of them in every tensor."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o.double().cpu() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    loss.backward()
    found = {f"output {i}": o.detach().cpu() for i, o in enumerate(outputs)}
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items() if leaf is not None
    }
    return found | {f"d{name}": gradient.cpu() for name, gradient in gradients.items()}


def check(name, kernel, tensors, forward, backward, **options):
    exact = values_and_gradients(
        getattr(reference, name), {k: None if t is None else t.double() for k, t in tensors.items()}, **options
    )
    with scan.forced(kernel):
        got = values_and_gradients(getattr(scan, name), on(kernel, tensors), **on(kernel, options))
    if runs_on_gpu(kernel):
        forward, backward = (max(limit, CUDA_LIMITS[name]) for limit in (forward, backward))
    errors = {key: error(got[key], exact[key]) for key in exact}
    limits = {key: forward if key.startswith("output") else backward for key in exact}
    assert {key: e for key, e in errors.items() if not e <= limits[key]} == {}


def mamba(batch, length, inner, n, seed=0, optional=True, dtype=torch.float32):
    """Inputs as a model makes them: strided slices, decays from fast to very slow."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    tensors = {"u": normal(batch, length, 2 * inner)[..., inner:], "delta": normal(batch, length, inner)}
    tensors |= {"B": normal(batch, length, 2 * n + 3)[..., 3 : 3 + n], "C": normal(batch, length, 2 * n + 3)[..., 3 + n :]}
    tensors["z"] = normal(batch, length, 2 * inner)[..., :inner] if optional else None
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    tensors["A"] = -torch.exp(1.5 * normal(inner, n))
    tensors |= {"D": normal(inner), "delta_bias": normal(inner) - 3} if optional else {"D": None, "delta_bias": None}
    return tensors | {"initial_state": normal(batch, inner, n) if optional else None}


def mamba2(batch, length, heads, width, groups, n, seed=0, state=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    channels = heads * width + 2 * groups * n
    x, B, C = normal(batch, length, channels).to(dtype).split([heads * width, groups * n, groups * n], -1)
    tensors = {"x": x.unflatten(-1, (heads, width)), "B": B.unflatten(-1, (groups, n)), "C": C.unflatten(-1, (groups, n))}
    tensors |= {"delta": torch.nn.functional.softplus(normal(batch, length, heads) - 2), "A": -torch.exp(1.5 * normal(heads))}
    return tensors | {"D": normal(heads), "initial_state": normal(batch, heads, width, n) if state else None}


def between_projections(batch, length, heads, width, groups, n, optional=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    inner, convolved = heads * width, heads * width + 2 * groups * n
    tensors = {"projected": normal(batch, length, inner + convolved + heads).to(dtype), "conv_weight": normal(convolved, 4) / 2}
    tensors |= {"A": -torch.exp(1.5 * normal(heads)), "delta_bias": normal(heads) - 3, "norm_weight": normal(inner)}
    tensors |= {"conv_bias": normal(convolved), "D": normal(heads)} if optional else {"conv_bias": None, "D": None}
    states = {"conv_state": normal(batch, 3, convolved), "initial_state": normal(batch, heads, width, n)}
    return tensors | (states if optional else {})


SCAN_SHAPES = [(2, 70, 37, 16), (1, 1, 1, 1), (3, 33, 64, 5), (2, 129, 8, 17), (1, 32, 33, 3)]
SSD_SHAPES = [(2, 130, 6, 10, 3, 7), (1, 1, 1, 1, 1, 1), (2, 64, 4, 64, 1, 16), (1, 65, 2, 5, 2, 64), (1, 150, 3, 64, 1, 128)]


@every_kernel
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("shape", SCAN_SHAPES, ids=str)
def test_selective_scan_equals_the_recurrence_in_float64(kernel, shape, optional):
    check("selective_scan", kernel, mamba(*shape, optional=optional), 1e-6, 2e-6, return_final_state=True)


@every_kernel
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("shape", SSD_SHAPES, ids=str)
def test_ssd_scan_equals_the_recurrence_in_float64(kernel, shape, state):
    # dA is a small sum of large terms of both signs
    check("ssd_scan", kernel, mamba2(*shape, state=state), 2e-6, 1e-5, return_final_state=True)


@every_kernel
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("shape", [(2, 70, 37, 4), (1, 1, 1, 4), (2, 2, 33, 4), (1, 33, 8, 1), (2, 40, 5, 7)], ids=str)
def test_causal_conv1d_equals_its_definition_in_float64(kernel, shape, activation):
    batch, length, inner, taps = shape
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(batch, length, 2 * inner, generator=g)[..., inner:],
        "weight": torch.randn(inner, taps, generator=g),
    }
    tensors |= {"bias": torch.randn(inner, generator=g), "initial_state": torch.randn(batch, taps - 1, inner, generator=g)}
    check("causal_conv1d", kernel, tensors, 1e-6, 2e-6, return_final_state=True, activation=activation)
    tensors |= {"bias": None, "initial_state": None}
    check("causal_conv1d", kernel, tensors, 1e-6, 2e-6, return_final_state=True, activation=activation)


@every_kernel
@pytest.mark.parametrize("shape", [(2, 40, 96, 1), (1, 1, 15, 3), (2, 33, 70, 2)], ids=str)
def test_rms_norm_equals_its_definition_in_float64(kernel, shape):
    batch, length, inner, groups = shape
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(batch, length, inner, generator=g) for name in "yz"} | {
        "weight": torch.randn(inner, generator=g)
    }
    check("rms_norm", kernel, tensors, 1e-6, 4e-6, epsilon=1e-5, groups=groups)
    check("rms_norm", kernel, tensors | {"z": None}, 1e-6, 4e-6, epsilon=1e-5, groups=groups)


@every_kernel
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SSD_SHAPES if shape[2] > 1], ids=str)  # one channel is normed to its sign
def test_what_lies_between_mamba2s_projections_equals_its_parts_in_float64(kernel, shape, optional):
    beyond = torch.arange(shape[1]) >= torch.tensor([[shape[1]], [shape[1] // 2]])[: shape[0]] if optional else None
    tensors = between_projections(*shape, optional=optional)
    check("mamba2_inner", kernel, tensors, 4e-6, 2e-5, groups=shape[4], beyond=beyond, return_final_state=True)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name == "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 300, 4, 32, 1, 16), (1, 333, 6, 16, 2, 24)], ids=str)
@pytest.mark.parametrize("read", [slice(2), slice(1), slice(1, 2)], ids=["both", "y", "state"])
def test_one_call_between_the_projections_gives_the_very_numbers_of_its_parts(kernel, dtype, shape, read):
    names = "selective_scan", "causal_conv1d", "ssd_scan", "rms_norm"
    parts = types.SimpleNamespace(**{name: getattr(scan.native, name) for name in names})

    def call(**tensors):
        return scan.mamba2_inner(**tensors, groups=shape[4], return_final_state=True)[read]

    tensors = between_projections(*shape, dtype=dtype)
    with scan.forced(parts):
        expected = values_and_gradients(call, tensors)
    got = values_and_gradients(call, tensors)
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []


@every_kernel
@pytest.mark.parametrize("gated", [False, True])
def test_rms_norm_rounds_its_result_to_another_format_and_takes_its_gradient_in_it(kernel, gated):
    g = torch.Generator().manual_seed(0)
    tensors = {"y": torch.randn(2, 40, 96, generator=g), "weight": torch.randn(96, generator=g)}
    tensors |= {"z": torch.randn(2, 40, 96, generator=g)} if gated else {}

    def run(round_after):
        given = {name: t.clone().requires_grad_() for name, t in on(kernel, tensors).items()}
        with scan.forced(kernel):
            out = scan.rms_norm(**given, dtype=None if round_after else torch.bfloat16)
        out = out.to(torch.bfloat16)
        return out, torch.autograd.grad(out.float().square().sum(), list(given.values()))

    (late, expected), (early, gradients) = run(True), run(False)
    assert torch.equal(early, late)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@every_kernel
def test_bfloat16_inputs_cost_no_more_than_their_rounding(kernel):
    # one rounding of the result is 2^-9; the gradients of bfloat16 inputs are rounded too
    check("selective_scan", kernel, mamba(2, 70, 37, 16, dtype=torch.bfloat16), 2**-8, 2**-7, return_final_state=True)
    for shape in ((2, 130, 4, 16, 2, 16), (1, 70, 11, 17, 1, 33), (1, 150, 3, 64, 1, 128)):
        check("ssd_scan", kernel, mamba2(*shape, dtype=torch.bfloat16), 2**-6, 2**-5, return_final_state=True)
        tensors = between_projections(*shape, dtype=torch.bfloat16)
        check("mamba2_inner", kernel, tensors, 2**-6, 2**-5, groups=shape[4], return_final_state=True)


@every_kernel
@pytest.mark.parametrize("length", [1, 17, 47, 65, 129, 150, 193])
@pytest.mark.parametrize("width, n", [(33, 17), (64, 128), (65, 129)])
def test_whole_numbers_come_out_exactly_in_bfloat16(kernel, length, width, n):
    g = torch.Generator().manual_seed(length)

    def whole(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=g).float()

    def one_of(count):
        return torch.nn.functional.one_hot(torch.randint(0, count, (1, length, 1), generator=g), count).to(torch.bfloat16)

    tensors = {"x": whole(-1, 1, 1, length, 3, width).to(torch.bfloat16), "B": one_of(n), "C": one_of(n)}
    tensors |= {"delta": torch.ones(1, length, 3), "A": torch.zeros(3), "D": whole(-2, 2, 3)}
    tensors["initial_state"] = whole(-3, 3, 1, 3, width, n)
    exact, _ = reference.ssd_scan(**{name: tensor.double() for name, tensor in tensors.items()}, return_final_state=True)
    with scan.forced(kernel), torch.no_grad():
        y = scan.ssd_scan(**on(kernel, tensors))
    assert torch.equal(y.cpu(), exact.to(torch.bfloat16))


@every_kernel
def test_a_long_memory_is_kept_to_float32_precision(kernel):
    tensors = mamba(1, 2048, 4, 4)
    tensors["A"] = tensors["A"] * 1e-3
    check("selective_scan", kernel, tensors, 5e-6, 5e-6, return_final_state=True)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("selective_scan", mamba(2, 35, 3, 2)), ("ssd_scan", mamba2(2, 66, 2, 3, 1, 2))],
    ids=["mamba", "mamba2"],
)
def test_portable_gradients_are_right_to_float64(name, tensors):
    leaves = [t.double().requires_grad_() for t in tensors.values()]
    names = list(tensors)
    function = getattr(portable, name)
    assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(names, t, strict=True)), return_final_state=True), leaves)


@pytest.mark.parametrize("initial", [True, False])
def test_second_derivatives_are_right_on_the_portable_kernel_and_refused_by_the_others(initial):
    tensors = mamba(2, 5, 3, 2) | ({} if initial else {"initial_state": None})
    names = [name for name, tensor in tensors.items() if tensor is not None]
    leaves = [tensors[name].double().requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(
        lambda *t: portable.selective_scan(**dict(zip(names, t, strict=True)), return_final_state=True), leaves
    )
    for name, make in CALLS.items():
        made = {key: tensor.requires_grad_() for key, tensor in make().items() if tensor is not None}
        first = next(iter(made.values()))
        for kernel in KERNELS:
            with scan.forced(kernel):
                y = getattr(scan, name)(**made, **OPTIONS.get(name, {}))
                if kernel == "native":
                    with pytest.raises(InputError, match="expected first derivatives, got create_graph=True"):
                        torch.autograd.grad(y.pow(2).sum(), first, create_graph=True)
                elif kernel == "portable":
                    (gradient,) = torch.autograd.grad(y.pow(2).sum(), first, create_graph=True)
                    assert torch.autograd.grad(gradient.pow(2).sum(), first)[0].isfinite().all()


def test_torch_func_gives_the_gradients_of_autograd():
    tensors = mamba(2, 9, 4, 3)
    u, rest = tensors.pop("u"), tensors
    expected = torch.autograd.functional.jacobian(lambda u: scan.selective_scan(u, **rest).sum((0, 2)), u)
    got = torch.func.jacrev(lambda u: scan.selective_scan(u, **rest).sum((0, 2)))(u)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    _, forward = torch.func.jvp(lambda u: scan.selective_scan(u, **rest).sum(), (u,), (torch.ones_like(u),))
    torch.testing.assert_close(forward, expected.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "tensors", "single"),
    [("selective_scan", mamba(2, 70, 37, 16), "A"), ("ssd_scan", mamba2(2, 130, 6, 10, 3, 7), "A")],
    ids=["mamba", "mamba2"],
)
def test_float64_stays_float64_beside_a_float32_decay(name, tensors, single):
    double = {key: tensor.double() for key, tensor in tensors.items()}
    exact = getattr(reference, name)(**double)
    assert error(getattr(scan, name)(**double | {single: tensors[single]}), exact) < 1e-12


# ---- properties


sizes = st.tuples(*(st.integers(1, most) for most in (3, 80, 40, 20)))


@every_kernel
@settings(max_examples=25, deadline=None)
@given(shape=sizes, cut=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_sequence_split_anywhere_gives_the_same_outputs_and_states(kernel, shape, cut, seed):
    batch, length, inner, n = shape
    at = round(cut * length)
    along = ("u", "delta", "B", "C", "z")
    tensors = on(kernel, mamba(*shape, seed=seed))
    first = {k: t[:, :at] if k in along else t for k, t in tensors.items()}
    second = {k: t[:, at:] if k in along else t for k, t in tensors.items()}
    with scan.forced(kernel), torch.no_grad():
        y, state = scan.selective_scan(**tensors, return_final_state=True)
        y1, between = scan.selective_scan(**first, return_final_state=True)
        y2, end = scan.selective_scan(**(second | {"initial_state": between}), return_final_state=True)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, state, rtol=1e-5, atol=1e-5)

    heads = on(kernel, mamba2(batch, length, 2, inner, 1, n, seed=seed))
    along = ("x", "delta", "B", "C")
    first = {k: t[:, :at] if k in along else t for k, t in heads.items()}
    second = {k: t[:, at:] if k in along else t for k, t in heads.items()}
    with scan.forced(kernel), torch.no_grad():
        y, state = scan.ssd_scan(**heads, return_final_state=True)
        y1, between = scan.ssd_scan(**first, return_final_state=True)
        y2, end = scan.ssd_scan(**(second | {"initial_state": between}), return_final_state=True)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, state, rtol=1e-4, atol=1e-4)


@every_kernel
@settings(max_examples=15, deadline=None)
@given(shape=sizes, seed=st.integers(0, 99))
def test_the_order_of_a_batch_does_not_matter(kernel, shape, seed):
    tensors = on(kernel, mamba(*shape, seed=seed))
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed)).to(tensors["u"].device)
    batched = ("u", "delta", "B", "C", "z", "initial_state")
    with scan.forced(kernel), torch.no_grad():
        y = scan.selective_scan(**tensors)
        shuffled = scan.selective_scan(**{k: t[order] if k in batched else t for k, t in tensors.items()})
        alone = scan.selective_scan(**{k: t[:1] if k in batched else t for k, t in tensors.items()})
    torch.testing.assert_close(shuffled, y[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone, y[:1], rtol=1e-6, atol=1e-6)


# ---- extremes


@every_kernel
def test_steps_of_any_size_are_exact(kernel):
    tensors = mamba(1, 40, 9, 4)
    tensors["delta"][0, 10, :4] = 5000.0  # forgets everything
    tensors["delta"][0, 20] = -1e4  # a step of zero
    tensors["z"][0, 5] = 200.0
    tensors["z"][0, 6] = -200.0
    check("selective_scan", kernel, tensors, 1e-6, 2e-6, return_final_state=True)


@every_kernel
def test_a_step_of_zero_leaves_the_state_untouched(kernel):
    tensors = on(kernel, mamba(2, 40, 9, 4))
    tensors["delta"][:] = -1e4
    with scan.forced(kernel):
        state = scan.selective_scan(**tensors, return_final_state=True)[1]
    assert torch.equal(state, tensors["initial_state"])


@every_kernel
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z"])
def test_what_is_not_a_number_stays_visible(kernel, name):
    tensors = on(kernel, mamba(1, 10, 9, 4))
    tensors[name] = tensors[name].clone()
    tensors[name][(0,) * tensors[name].dim()] = float("nan")
    with scan.forced(kernel):
        assert scan.selective_scan(**tensors).isnan().any()


@every_kernel
@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)], ids=str)
def test_nothing_to_scan_is_not_an_error(kernel, shape):
    batch, length, inner, n = shape
    tensors = on(kernel, mamba(*shape))
    heads = on(kernel, mamba2(batch, length, 2, inner, 1, n))
    with scan.forced(kernel):
        found = values_and_gradients(scan.selective_scan, tensors, return_final_state=True)
        y = scan.causal_conv1d(tensors["u"], torch.ones(inner, 4).to(tensors["u"]), activation="silu")
        states = scan.ssd_scan(**heads, return_final_state=True)
    assert found["output 0"].shape == y.shape == (batch, length, inner)
    if length == 0:
        assert torch.equal(found["output 1"], tensors["initial_state"].cpu())
    assert states[0].shape == (batch, length, 2, inner) and states[1].shape == (batch, 2, inner, n)


@pytest.mark.parametrize(
    "name, tensors",
    [
        ("selective_scan", mamba(3, 300, 130, 16)),
        ("mamba2_inner", between_projections(1, 300, 6, 64, 1, 32)),  # one thread takes a chunk through all of it, three cannot
    ],
)
def test_threads_do_not_change_a_result(name, tensors):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = values_and_gradients(getattr(scan, name), tensors)
        torch.set_num_threads(3)
        three = values_and_gradients(getattr(scan, name), tensors)
    finally:
        torch.set_num_threads(before)
    assert "native" not in KERNELS or torch.equal(one["output 0"], three["output 0"])
    assert max(error(three[key], one[key].double()) for key in one) < 1e-6


def test_wrong_shapes_are_named():
    tensors = mamba(2, 5, 4, 3)
    with pytest.raises(InputError, match=r"expected B \(2, 5, 3\) beside u \(2, 5, 4\), got \(2, 4, 3\)"):
        scan.selective_scan(**(tensors | {"B": tensors["B"][:, :4]}))
    with pytest.raises(InputError, match="activation"):
        scan.causal_conv1d(tensors["u"], torch.ones(4, 4), activation="relu")
    heads = mamba2(2, 5, 4, 3, 1, 2, state=False)
    with pytest.raises(InputError, match=r"expected D \(4,\) beside x \(2, 5, 4, 3\), got \(3,\)"):
        scan.ssd_scan(**(heads | {"D": torch.ones(3)}))
    with pytest.raises(InputError, match=r"expected at \(2, 1\) beside x \(2, 5, 4, 3\), got \(2,\)"):
        scan.ssd_token(**heads, at=torch.tensor([4, 4]))
    for wrong in ({"A": tensors["A"].to(torch.complex64)}, {"u": tensors["u"].int()}):
        ((key, tensor),) = wrong.items()
        with pytest.raises(InputError, match=f"expected {key} with floating-point numbers, got {tensor.dtype}"):
            scan.selective_scan(**(tensors | wrong))
    inner = between_projections(2, 5, 4, 3, 1, 4)
    for wrong in ({"groups": 3}, {"groups": 0}, {"projected": inner["projected"][..., 1:]}, {"norm_weight": torch.ones(11)}):
        with pytest.raises(InputError, match=r"W = E \+ 2 G N"):
            scan.mamba2_inner(**(inner | wrong))


def test_torch_compile_works_around_the_kernels():
    tensors = mamba(2, 9, 8, 4)
    compiled = torch.compile(scan.selective_scan, backend="eager")
    torch.testing.assert_close(compiled(**tensors), scan.selective_scan(**tensors), rtol=1e-5, atol=1e-5)


CALLS = {
    "selective_scan": lambda: mamba(2, 70, 37, 16),
    "ssd_scan": lambda: mamba2(1, 150, 3, 64, 1, 33),
    "causal_conv1d": lambda: {"x": torch.randn(2, 9, 5), "weight": torch.randn(5, 4), "initial_state": torch.randn(2, 3, 5)},
    "mamba2_inner": lambda: between_projections(1, 150, 3, 64, 1, 33),
    "rms_norm": lambda: {"y": torch.randn(2, 40, 96), "weight": torch.randn(96), "z": torch.randn(2, 40, 96)},
}
OPTIONS = {"rms_norm": {"epsilon": 1e-5}}
every_call = pytest.mark.parametrize("name", CALLS)


@every_call
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_precision_and_device_change_nothing(name, dtype):
    tensors, options = CALLS[name](), OPTIONS.get(name, {})
    before = values_and_gradients(getattr(scan, name), tensors, **options)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            y = getattr(scan, name)(**tensors, **options)
        after = values_and_gradients(getattr(scan, name), tensors, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, before["output 0"]) and all(torch.equal(after[key], before[key]) for key in before)


@every_call
def test_tensors_that_torch_negates_as_they_are_read_count_negated(name):
    tensors, options = CALLS[name](), OPTIONS.get(name, {})
    for wrapped in [key for key, tensor in tensors.items() if tensor is not None and key != "A"]:
        lazy = tensors | {wrapped: torch._neg_view(tensors[wrapped])}
        plain = tensors | {wrapped: -tensors[wrapped]}
        ours, theirs = (getattr(scan, name)(**given, **options) for given in (lazy, plain))
        assert torch.equal(ours, theirs), wrapped


@every_call
def test_zeros_that_torch_keeps_nowhere_are_zeros_and_freed_memory_is_an_error(name):
    tensors, options = CALLS[name](), OPTIONS.get(name, {})
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        lazy = tensors | {key: torch._efficientzerotensor(tensor.shape)}
        plain = tensors | {key: torch.zeros(tensor.shape)}
        ours, theirs = (getattr(scan, name)(**given, **options) for given in (lazy, plain))
        assert torch.equal(ours, theirs), key
    if "native" in KERNELS:
        freed = next(iter(tensors.values()))
        freed.untyped_storage().resize_(0)
        with pytest.raises(InputError, match="freed"):
            getattr(scan, name)(**tensors, **options)


@every_call
def test_half_precision_comes_back_as_it_was_given(name):
    tensors, options = CALLS[name](), OPTIONS.get(name, {})
    halves = {key: None if t is None else t.half() for key, t in tensors.items()}
    assert getattr(scan, name)(**halves, **options).dtype == torch.float16


@every_call
def test_tensors_on_meta_have_shapes_and_nothing_else(name):
    tensors, options = CALLS[name](), OPTIONS.get(name, {})
    meta = {key: None if t is None else t.to("meta") for key, t in tensors.items()}
    ours, theirs = (getattr(scan, name)(**given, **options) for given in (meta, tensors))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device.type == "meta"


@pytest.mark.parametrize(
    "kernel, half", [(name, torch.bfloat16) for name in KERNELS] + [(name, torch.float16) for name in KERNELS if name == "native"]
)
def test_mamba2_takes_x_and_its_maps_in_precisions_of_their_own(kernel, half):
    tensors = mamba2(2, 70, 4, 8, 2, 16, state=False)
    exact = scan.ssd_scan(**tensors)
    mixed = tensors | {"x": tensors["x"].to(half), "B": tensors["B"] * 1e5, "C": tensors["C"] * 1e-5}  # beyond float16
    with scan.forced(kernel):
        got = scan.ssd_scan(**mixed)
    assert got.dtype == half and (got - exact).abs().max() < 0.03 * exact.abs().max()


def test_what_records_or_has_no_memory_runs_portable_and_a_forward_derivative_is_refused():
    tensors = mamba(2, 9, 8, 4, optional=False)
    rest = {key: tensors[key] for key in ("delta", "A", "B", "C")}
    graph = make_fx(lambda u: scan.selective_scan(u, **rest))(tensors["u"])
    other = torch.randn(2, 9, 8)
    torch.testing.assert_close(graph(other), scan.selective_scan(other, **rest), rtol=1e-5, atol=1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {key: torch.empty(tensor.shape) for key, tensor in ({"u": other} | rest).items()}
        assert scan.selective_scan(**fakes).shape == other.shape
    functional = torch.func.functionalize(lambda y: scan.rms_norm(y, torch.ones(8)))
    torch.testing.assert_close(functional(other), scan.rms_norm(other, torch.ones(8)), rtol=1e-5, atol=1e-5)
    with fwAD.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        scan.selective_scan(fwAD.make_dual(tensors["u"], torch.ones(2, 9, 8)), **rest)


# ---- the choice of a kernel


@pytest.fixture
def fresh_choice():
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def test_falling_back_is_said_once_with_reason_and_remedy(fresh_choice, monkeypatch, caplog):
    def missing():
        raise ImportError("no compiled library")

    monkeypatch.setattr(dispatch, "_native", missing)
    with caplog.at_level(logging.WARNING):
        kernels = [scan.kernel("cpu") for _ in range(3)]
        scan.selective_scan(**mamba(1, 2, 3, 4))
    assert kernels[0] == dispatch.Kernel(
        "portable",
        "the native kernel is not there (ImportError: no compiled library); install a C++ compiler "
        "(Debian: apt-get install g++), then pip install --no-build-isolation --editable .",
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"the scan runs in plain PyTorch, several times slower: {kernels[0].reason}"
    ]


def test_every_device_gets_its_own_kernel_and_a_device_without_one_the_portable(fresh_choice, monkeypatch, caplog):
    native, cuda = types.SimpleNamespace(description=lambda: "native for AVX2"), object()
    monkeypatch.setattr(dispatch, "_native", lambda: native)
    monkeypatch.setattr(dispatch, "_cuda", lambda: cuda)
    assert scan.kernel("cpu") == dispatch.Kernel("native", "native for AVX2")
    assert scan.kernel("cuda:1") == dispatch.Kernel("cuda", "mamba-ssm and causal-conv1d import")
    assert dispatch.implementation(torch.zeros(1)) is native and dispatch._choose("cuda")[1] is cuda
    assert not caplog.records
    assert scan.kernel("meta") == dispatch.Kernel("portable", "there is no kernel for meta")
    assert dispatch.implementation(torch.zeros(1, device="meta")) is portable
    with scan.forced("cuda"):
        assert dispatch.implementation(torch.zeros(1)) is cuda and dispatch.implementation(torch.zeros(1).double()) is portable


def test_cuda_packages_that_do_not_import_are_named_with_the_remedy(fresh_choice, monkeypatch):
    def broken():
        raise OSError("undefined symbol: _ZN3c10\nand a long rest")

    monkeypatch.setattr(dispatch, "_cuda", broken)
    assert scan.kernel("cuda") == dispatch.Kernel(
        "portable",
        "mamba-ssm or causal-conv1d does not import (OSError: undefined symbol: _ZN3c10); "
        "pip install --no-build-isolation '.[gpu]' beside the torch that is in use",
    )
    assert dispatch._choose("cuda")[1] is portable


def test_a_cpu_never_imports_a_cuda_package(tmp_path):
    for package in ("mamba_ssm", "causal_conv1d"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('a CUDA package was imported')")
    code = (
        "import torch, rankmamba.scan as scan; x = torch.ones(1, 3, 8); "
        "scan.causal_conv1d(x, torch.ones(8, 4)); scan.selective_scan(x, x, -torch.ones(8, 2), x[..., :2], x[..., :2])"
    )
    run = f"import sys; sys.path[:0] = {[str(tmp_path)] + sys.path!r}; {code}"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 0 and "CUDA" not in done.stderr, done.stderr


@pytest.fixture
def cuda(monkeypatch):
    """rankmamba.scan.cuda over stand-ins for the CUDA packages that follow those packages' reference functions on the CPU."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        assert delta_softplus and u.dtype == delta.dtype == B.dtype == C.dtype
        z = None if z is None else z.mT
        y = reference.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z, delta_bias, None, return_last_state)
        return (y[0].mT, y[1].detach()) if return_last_state else y.mT  # no gradient comes through the last state

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert 2 <= weight.shape[1] <= 4
        eights = x.stride(1) == 1 and x.shape[1] % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
        assert x.stride(2) == 1 or eights  # what the kernel's own checks ask for
        return reference.causal_conv1d(x.mT, weight, bias, activation=activation).mT

    def chunk_scan(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
        return reference.ssd_scan(x, dt, A, B, C, D, initial_states, return_final_states)

    def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        assert not norm_before_gate and bias is None
        return reference.rms_norm(x, weight, z, eps, x.shape[-1] // group_size)

    contents = {
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": chunk_scan},
        "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    }
    for path, functions in contents.items():
        parts = path.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        module = types.ModuleType(path)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.delitem(sys.modules, "rankmamba.scan.cuda", raising=False)
    yield
    sys.modules.pop("rankmamba.scan.cuda", None)


def test_cuda_calls_fit_and_continue_a_prefix_rightly(cuda):
    tensors = mamba(2, 150, 8, 4)
    check("selective_scan", "cuda", tensors, 1e-6, 2e-6, return_final_state=True)
    check("selective_scan", "cuda", mamba(2, 150, 8, 4, optional=False), 1e-6, 2e-6, return_final_state=True)
    check("ssd_scan", "cuda", mamba2(2, 40, 4, 8, 2, 4), 1e-6, 1e-5, return_final_state=True)
    for inner, taps in ((8, 4), (5, 4), (8, 1), (16, 7)):
        x = torch.randn(2, 50, 2 * inner)[..., inner:]
        conv = {
            "x": x,
            "weight": torch.randn(inner, taps),
            "bias": torch.randn(inner),
            "initial_state": torch.randn(2, taps - 1, inner),
        }
        check("causal_conv1d", "cuda", conv, 1e-6, 2e-6, return_final_state=True, activation="silu")
        check("causal_conv1d", "cuda", conv | {"initial_state": None}, 1e-6, 2e-6, return_final_state=True)
    norm = {"y": tensors["u"], "z": tensors["z"], "weight": torch.randn(8)}
    check("rms_norm", "cuda", norm, 1e-6, 4e-6, epsilon=1e-5, groups=2)
    check("rms_norm", "cuda", norm | {"z": None}, 1e-6, 4e-6, epsilon=1e-5, groups=2)
    assert dispatch._cuda() is sys.modules["rankmamba.scan.cuda"]
    u = tensors.pop("u").requires_grad_()
    with scan.forced("cuda"), pytest.raises(InputError, match="expected first derivatives, got create_graph=True"):
        torch.autograd.grad(scan.selective_scan(u, **tensors).pow(2).sum(), u, create_graph=True)


def test_a_forced_kernel_holds_inside_the_block_and_not_behind_it_even_after_an_error():
    tensor = torch.zeros(1)
    chosen = dispatch.implementation(tensor)
    with pytest.raises(KeyError, match="outside"):
        with scan.forced("portable"):
            assert dispatch.implementation(tensor) is portable
            raise KeyError("outside")
    assert dispatch.implementation(tensor) is chosen
    assert scan.kernel().name == scan.kernel("cpu").name


@given(data=st.data())
def test_one_token_of_mamba2s_scan_is_that_of_the_whole_scan(data):
    batch, length, groups, shared, width, n = (data.draw(st.integers(1, most)) for most in (3, 70, 2, 3, 9, 9))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))

    def draw(*shape):
        return torch.randn(*shape, generator=seed)

    heads = groups * shared
    x, B, C, D = draw(batch, length, heads, width), draw(batch, length, groups, n), draw(batch, length, groups, n), draw(heads)
    step, A = draw(batch, length, heads).exp(), -draw(heads).exp()
    state = draw(batch, heads, width, n) if data.draw(st.booleans()) else None
    at = torch.randint(0, length, (batch, 1), generator=seed)
    whole = scan.ssd_scan(x, step, A, B, C, D, state)
    expected = whole.gather(1, at[..., None, None].expand(-1, 1, heads, width))
    torch.testing.assert_close(
        scan.ssd_token(x, step, A, B, C, D, state, at), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )
    doubles = [None if t is None else t.double() for t in (x, step, A, B, C, D, state)]
    whole = scan.ssd_scan(*doubles).gather(1, at[..., None, None].expand(-1, 1, heads, width))
    torch.testing.assert_close(scan.ssd_token(*doubles, at), whole, rtol=1e-9, atol=1e-11 * whole.abs().max().item())
