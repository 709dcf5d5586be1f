"""The selective scan of Mamba and Mamba-2, the convolution before it and the norm after it: one call each, on every device.

B batch, L tokens, E inner width, N state size, K taps, H heads of width P, G groups of heads that share B and C. Channels last.
Activations (u, delta, B, C, z, x) are float32, bfloat16 or float64. The state and all sums are float32 (float64 for float64).
"""

from collections.abc import Callable

import torch
from torch.profiler import record_function

from ..errors import InputError
from . import portable
from .dispatch import Kernel, forced, implementation, kernel, plain
from .portable import mamba2_heads, mamba2_step
from .precision import without_autocast

__all__ = [
    "Kernel",
    "causal_conv1d",
    "forced",
    "kernel",
    "mamba2_heads",
    "mamba2_inner",
    "mamba2_step",
    "plain",
    "rms_norm",
    "selective_scan",
    "ssd_scan",
    "ssd_token",
]


@without_autocast
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run Mamba's selective scan: y_t = C_t h_t + D u_t, h_t = exp(d_t A) h_(t-1) + d_t B_t u_t.

    d_t = softplus(delta_t + delta_bias) is the step; z gates the output, y silu(z).
    u, delta, z: (B, L, E). A: (E, N), negative. B, C: (B, L, N). D, delta_bias: (E,).
    initial_state: (B, E, N), the final state of what came before; zero if left out.
    Returns y (B, L, E) in u's precision, and with return_final_state also the state after the last token, (B, E, N).
    Differentiable in every tensor, once; more often, and by torch.func, on the portable kernel (`forced`).

    Raises:
        InputError: the shapes do not match, or a tensor has no floating-point numbers.
    Source: arXiv 2312.00752, algorithm 2 and section 3.4.
    """
    batch, length, inner = _shape("u", u, 3)
    n = _shape("A", A, 2)[1]
    expected = {
        "delta": (delta, (batch, length, inner)),
        "A": (A, (inner, n)),
        "B": (B, (batch, length, n)),
        "C": (C, (batch, length, n)),
        "D": (D, (inner,)),
        "z": (z, (batch, length, inner)),
        "delta_bias": (delta_bias, (inner,)),
        "initial_state": (initial_state, (batch, inner, n)),
    }
    _check("u", u, expected)
    with record_function("rankmamba::scan"):
        return implementation(u).selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, return_final_state)


@without_autocast
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Filter each channel over its own last K values: y_t = act(bias + sum_k weight[:, k] x_(t-K+1+k)).

    x: (B, L, E). weight: (E, K). bias: (E,). initial_state: (B, K-1, E), the inputs before the first, oldest first; zero if left
    out. activation: None or "silu". Returns y (B, L, E), and with return_final_state also the last K-1 inputs, (B, K-1, E).
    The native kernels have four taps, as every Mamba has; other filters run in torch's operations on a CPU.

    Raises:
        InputError: the shapes do not match, or the activation is unknown.
    Source: arXiv 2312.00752, figure 3.
    """
    batch, _, inner = _shape("x", x, 3)
    taps = _shape("weight", weight, 2)[1]
    expected = {
        "weight": (weight, (inner, taps)),
        "bias": (bias, (inner,)),
        "initial_state": (initial_state, (batch, taps - 1, inner)),
    }
    _check("x", x, expected)
    if taps < 1 or activation not in (None, "silu"):
        raise InputError(f"expected at least one tap and activation None or 'silu', got {taps} and {activation!r}")
    with record_function("rankmamba::convolution"):
        return implementation(x).causal_conv1d(x, weight, bias, initial_state, return_final_state, activation)


@without_autocast
def ssd_scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run Mamba-2's scan: per head, y_t = C_t h_t + D x_t, h_t = exp(delta_t A) h_(t-1) + delta_t x_t B_t.

    x: (B, L, H, P). delta: (B, L, H), the step itself (after softplus), not negative. A: (H,), negative.
    B, C: (B, L, G, N), G divides H. D: (H,). initial_state: (B, H, P, N).
    Returns y like x, and with return_final_state also the state after the last token, (B, H, P, N).

    Raises:
        InputError: the shapes do not match.
    Source: arXiv 2405.21060, sections 3.2 and 6.
    """
    _check_ssd(x, delta, A, B, C, D, initial_state)
    with record_function("rankmamba::scan"):
        return implementation(x).ssd_scan(x, delta, A, B, C, D, initial_state, return_final_state)


@without_autocast
def ssd_token(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    initial_state: torch.Tensor | None,
    at: torch.Tensor,
) -> torch.Tensor:
    """Return `ssd_scan`'s y at one token of each sequence, (B, 1, H, P), for far less work than the whole scan; arguments as there.

    at: int64 (B, 1). Computed like attention, without a running state, in torch's operations, on any device:
    y_t = sum_(j <= t) exp((delta_(j+1) + ... + delta_t) A) delta_j (C_t . B_j) x_j + D x_t (arXiv 2405.21060, equation 7).

    Raises:
        InputError: the shapes do not match.
    """
    _check_ssd(x, delta, A, B, C, D, initial_state)
    _check("x", x, {"at": (at, (x.shape[0], 1))})
    with record_function("rankmamba::scan"):
        return portable.ssd_token(x, delta, A, B, C, D, initial_state, at)


@without_autocast
def rms_norm(
    y: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Divide y, or y silu(z), by its root mean square over each of `groups` parts of the channels; times weight.

    y, z: (B, L, E). weight: (E,). Returns (B, L, E) in `dtype`, by default y's.

    Raises:
        InputError: the shapes do not match.
    Source: arXiv 1910.07467; with a gate arXiv 2405.21060, figure 6: RMSNormGated of the released code with norm_before_gate=False.
    """
    inner = _shape("y", y, 3)[2]
    _check("y", y, {"z": (z, tuple(y.shape)), "weight": (weight, (inner,))})
    if groups < 1 or inner % groups:
        raise InputError(f"expected channels in equal groups, got {inner} channels and {groups} groups")
    return implementation(y).rms_norm(y, weight, z, epsilon, groups, dtype or y.dtype)


@without_autocast
def mamba2_inner(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv_state: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    groups: int = 1,
    epsilon: float = 1e-5,
    delta_limit: tuple[float, float] = (0.0, float("inf")),
    beyond: torch.Tensor | None = None,
    act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute what lies between the projections of a Mamba-2: `causal_conv1d`, `ssd_scan` and the gated `rms_norm`.

    projected: (B, L, E + W + H), the first projection's z, convolved channels (x, B and C; W = E + 2 G N) and delta.
    conv_weight: (W, K). conv_bias: (W,). A, D, delta_bias: (H,). norm_weight: (E,). groups: G, also of the norm.
    delta_limit: of the step softplus(delta + delta_bias). beyond: (B, L), the tokens whose step is 0: they leave the state as it is.
    act: what follows the convolution, silu if left out. conv_state: (B, K-1, W), initial_state: (B, H, E / H, N): what came before.
    Returns (B, L, E), and with return_final_state also the state after the last token. The native kernels take a chunk of tokens
    through all of it while its rows are in the cache.

    Raises:
        InputError: the shapes do not match.
    Source: arXiv 2405.21060, figure 6.
    """
    batch, length, width = _shape("projected", projected, 3)
    convolved, taps = _shape("conv_weight", conv_weight, 2)
    (inner,), (heads,) = _shape("norm_weight", norm_weight, 1), _shape("A", A, 1)
    fits = min(heads, groups) >= 1 and inner % heads == heads % groups == 0 and inner <= convolved
    if not fits or (convolved - inner) % (2 * groups) or width != inner + convolved + heads:
        parts = f"{inner} of norm_weight, {convolved} of conv_weight and {heads} of A in {groups} groups"
        raise InputError(f"expected projected and {parts} to be E + W + H channels, E, W = E + 2 G N and H, got {width} channels")
    n = (convolved - inner) // (2 * groups)
    expected = {
        "conv_bias": (conv_bias, (convolved,)),
        "D": (D, (heads,)),
        "delta_bias": (delta_bias, (heads,)),
        "beyond": (beyond, (batch, length)),
        "conv_state": (conv_state, (batch, taps - 1, convolved)),
        "initial_state": (initial_state, (batch, heads, inner // heads, n)),
    }
    _check("projected", projected, expected)
    native = getattr(implementation(projected), "mamba2_inner", None)
    if native and act is None and taps == 4:  # what its convolution has
        tensors = projected, conv_weight, conv_bias, A, D, delta_bias, norm_weight, conv_state, initial_state
        with record_function("rankmamba::scan"):
            return native(*tensors, groups, epsilon, delta_limit, beyond, return_final_state)
    z, xBC, delta = projected.split([inner, convolved, heads], dim=-1)
    xBC = causal_conv1d(xBC, conv_weight, conv_bias, conv_state, activation=None if act else "silu")
    x, B, C = mamba2_heads(act(xBC) if act else xBC, inner, heads, groups)
    y = ssd_scan(x, mamba2_step(delta, delta_bias, delta_limit, beyond), A, B, C, D, initial_state, return_final_state)
    y, state = y if return_final_state else (y, None)
    y = rms_norm(y.flatten(2), norm_weight, z, epsilon, groups)
    return (y, state) if return_final_state else y


def _check_ssd(x, delta, A, B, C, D, initial_state):
    batch, length, heads, width = _shape("x", x, 4)
    groups, n = _shape("B", B, 4)[2:]
    expected = {
        "delta": (delta, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, n)),
        "C": (C, (batch, length, groups, n)),
        "D": (D, (heads,)),
        "initial_state": (initial_state, (batch, heads, width, n)),
    }
    _check("x", x, expected)
    if groups == 0 or heads % groups:
        raise InputError(f"expected heads in G equal groups, got {heads} heads and G = {groups}")


def _shape(name, tensor, dims):
    _check_dtype(name, tensor)
    if tensor.dim() != dims:
        raise InputError(f"expected {name} with {dims} dimensions, got {tuple(tensor.shape)}")
    return tensor.shape


def _check(leading, first, expected):
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise InputError(f"expected {name} {shape} beside {leading} {tuple(first.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != first.device:
            raise InputError(f"expected {name} on {first.device} like {leading}, got {tensor.device}")
        if name not in ("at", "beyond"):
            _check_dtype(name, tensor)


def _check_dtype(name, tensor):
    if not tensor.is_floating_point():
        raise InputError(f"expected {name} with floating-point numbers, got {tensor.dtype}")
