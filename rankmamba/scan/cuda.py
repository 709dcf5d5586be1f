"""The CUDA kernels of mamba-ssm and causal-conv1d, behind this package's shapes.

Importing this module imports both; only `dispatch` does so, for the first CUDA tensor.
"""

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

from . import portable
from .gradients import with_first_derivatives

CHUNK = 64  # tokens at a time in the part of the scan that the kernel lacks; (B, CHUNK, E, N) float32 in memory


@with_first_derivatives
def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.selective_scan`."""
    delta, B, C = (t.to(u.dtype) for t in (delta, B, C))
    A, D, delta_bias = (None if t is None else t.float() for t in (A, D, delta_bias))
    makes_state = [t for t in (u, delta, A, B, delta_bias) if t is not None]
    learnt = return_final_state and torch.is_grad_enabled() and any(t.requires_grad for t in makes_state)
    if initial_state is None and not learnt:
        gate = None if z is None else z.to(u.dtype)
        y, final_state = _kernel(u, delta, A, B, C, D, delta_bias, gate)
    else:
        y, final_state = (_readable if learnt else _kernel)(u, delta, A, B, C, D, delta_bias)
        if initial_state is not None:
            # The kernel starts from a zero state. The scan is linear in its state, so the contribution of a given one is added afterwards.
            step = F.softplus(delta.float() if delta_bias is None else delta.float() + delta_bias)
            carried, decay = _decayed(step, A, C.float(), initial_state.float())
            y, final_state = y.float() + carried, final_state + decay * initial_state.float()
        if z is not None:
            y = y * F.silu(z.float())
    y = y.to(u.dtype)
    return (y, final_state) if return_final_state else y


def _kernel(u, delta, A, B, C, D, delta_bias, z=None):
    y, final_state = selective_scan_fn(
        *(t.transpose(1, 2) for t in (u, delta)),
        A,
        *(t.transpose(1, 2) for t in (B, C)),
        D,
        z=None if z is None else z.transpose(1, 2),
        delta_bias=delta_bias,
        delta_softplus=True,
        return_last_state=True,
    )
    return y.transpose(1, 2), final_state


def _readable(u, delta, A, B, C, D, delta_bias):
    """`_kernel` where gradients flow through the final state: the kernel's own has none.

    N more tokens with a step of zero leave the state unchanged, and token n of them reads its n-th number as y.
    """
    batch, length, inner = u.shape
    n = A.shape[1]
    nothing = u.new_zeros(batch, n, inner)
    still = nothing - 1e4  # softplus gives a step of zero
    u, delta, B = torch.cat([u, nothing], 1), torch.cat([delta, still], 1), torch.cat([B, B.new_zeros(batch, n, n)], 1)
    C = torch.cat([C, torch.eye(n, dtype=C.dtype, device=C.device).expand(batch, n, n)], 1)
    y, final_state = _kernel(u, delta, A, B, C, D, delta_bias)
    y, read = y.split([length, n], 1)
    read = read.transpose(1, 2).float()
    return y, final_state.detach() + (read - read.detach())  # the value in float32, the gradient of what was read


def _decayed(step, A, C, state):
    """Return what `state` alone contributes to y at each step, (B, L, E), and the share of it left after the last, (B, E, N)."""
    elapsed = step.cumsum(1)
    parts = [
        torch.einsum("blen,ben,bln->ble", torch.exp(elapsed_c[..., None] * A), state, C_c)
        for elapsed_c, C_c in zip(elapsed.split(CHUNK, 1), C.split(CHUNK, 1), strict=True)
    ]
    return torch.cat(parts, 1), torch.exp(step.sum(1)[..., None] * A)


@with_first_derivatives
def causal_conv1d(x, weight, bias=None, initial_state=None, return_final_state=False, activation=None):
    """See `rankmamba.scan.causal_conv1d`."""
    taps = weight.shape[1]
    if not 2 <= taps <= 4:
        return portable.causal_conv1d(x, weight, bias, initial_state, return_final_state, activation)
    # The kernel takes initial states only for channels in multiples of 8: here they are tokens in front, whose values are dropped.
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    tokens = x if initial_state is None else torch.cat([past, x], 1)
    side_by_side = tokens.stride(2) == 1 and all(size % 8 == 0 for size in (x.shape[2], tokens.stride(0), tokens.stride(1)))
    rows = tokens.transpose(1, 2)
    y = causal_conv1d_fn(
        rows if side_by_side else rows.clone(memory_format=torch.contiguous_format),  # of one token, too, which `contiguous` leaves
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        activation=activation,
    ).transpose(1, 2)[:, tokens.shape[1] - x.shape[1] :]
    return (y, torch.cat([past, x[:, 1 - taps :]], 1)[:, 1 - taps :]) if return_final_state else y


@with_first_derivatives
def ssd_scan(x, delta, A, B, C, D=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.ssd_scan`."""
    with torch.cuda.device_of(x):  # mamba-ssm starts one of its kernels on the current device, wherever the tensors are
        y, final_state = mamba_chunk_scan_combined(
            x,
            delta.float(),
            A.float(),
            B.to(x.dtype),
            C.to(x.dtype),
            chunk_size=256,
            D=None if D is None else D.float(),
            initial_states=None if initial_state is None else initial_state.float(),
            return_final_states=True,
        )
    return (y, final_state.float()) if return_final_state else y


@with_first_derivatives
def rms_norm(y, weight, z, epsilon, groups, dtype):
    """See `rankmamba.scan.rms_norm`."""
    out = rmsnorm_fn(y, weight, None, z=z, eps=epsilon, group_size=y.shape[-1] // groups, norm_before_gate=False)
    return out.to(dtype)
