"""The recurrences of the papers, one token at a time: slow, obvious, differentiable, in the precision of what they are given.

Everything else in this package is tested against these functions run in float64.
"""

import torch
import torch.nn.functional as F


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, return_final_state=False):
    """Mamba's selective scan (arXiv 2312.00752, algorithm 2 and equation 2a); see `rankmamba.scan.selective_scan`."""
    if delta_bias is not None:
        delta = delta + delta_bias
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    y, h = recurrence(u, F.softplus(delta), A, B, C, h)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return (y, h) if return_final_state else y


def recurrence(u, delta, A, B, C, h):
    """What is recurrent in it: (B, L, E) and the last state (B, E, N), given the step itself, after softplus, and the first state h."""
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(delta_t[..., None] * A)  # (B, E, N): zero-order hold of A
        h = decay * h + (delta_t * u_t)[..., None] * B_t[:, None]  # Euler for B, as in the released code
        outputs.append((h * C_t[:, None]).sum(-1))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(u), h


def causal_conv1d(x, weight, bias=None, initial_state=None, return_final_state=False, activation=None):
    """Each channel's own filter over its last K values; see `rankmamba.scan.causal_conv1d`."""
    taps = weight.shape[1]
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state
    padded = torch.cat([past, x], 1)
    y = sum(weight[:, k] * padded[:, k : k + x.shape[1]] for k in range(taps))
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    return (y, padded[:, x.shape[1] :]) if return_final_state else y


def ssd_scan(x, delta, A, B, C, D=None, initial_state=None, return_final_state=False):
    """Mamba-2's scan with one decay per head (arXiv 2405.21060, equation 1 and section 7); see `rankmamba.scan.ssd_scan`."""
    batch, length, heads, width = x.shape
    B, C = (m.repeat_interleave(heads // m.shape[2], 2) for m in (B, C))
    h = x.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        decay = torch.exp(delta[:, t] * A)[..., None, None]
        h = decay * h + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D[:, None] * x
    return (y, h) if return_final_state else y


def rms_norm(y, weight, z=None, epsilon=1e-5, groups=1):
    """Gate, root mean square, weight; see `rankmamba.scan.rms_norm`."""
    parts = (y if z is None else y * F.silu(z)).unflatten(-1, (groups, -1))
    return weight * (parts / (parts.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()).flatten(-2)


def mamba2_inner(
    projected,
    conv_weight,
    conv_bias,
    A,
    D,
    delta_bias,
    norm_weight,
    conv_state=None,
    initial_state=None,
    groups=1,
    beyond=None,
    return_final_state=False,
):
    """Convolution, step, scan and gated norm; see `rankmamba.scan.mamba2_inner`."""
    inner, heads = len(norm_weight), len(A)
    shared = (len(conv_weight) - inner) // 2
    z, xBC, delta = projected.split([inner, len(conv_weight), heads], dim=-1)
    x, B, C = causal_conv1d(xBC, conv_weight, conv_bias, conv_state, activation="silu").split([inner, shared, shared], -1)
    x, B, C = x.unflatten(2, (heads, -1)), B.unflatten(2, (groups, -1)), C.unflatten(2, (groups, -1))
    step = F.softplus(delta + delta_bias)
    step = step if beyond is None else torch.where(beyond[..., None], 0, step)
    y, state = ssd_scan(x, step, A, B, C, D, initial_state, return_final_state=True)
    y = rms_norm(y.flatten(2), norm_weight, z, groups=groups)
    return (y, state) if return_final_state else y
