"""What lies between the projections of a Mamba-2: convolution, scan and gated norm, chunk by chunk while the rows are in the cache.

The backward pass writes the pieces of the gradient where the input projection reads it: nothing is put together afterwards.
"""

from typing import NamedTuple

import torch

from .. import portable
from ..gradients import once_differentiable
from ..precision import without_autocast
from .library import as_rows, empty, rows, tracked
from .mamba import conv_arguments, conv_backward
from .mamba2 import ssd_backward, ssd_forward
from .norm import norm_arguments, norm_backward_arguments


class _Tensors(NamedTuple):
    """B batch, L tokens, E inner width, W = E + 2 G N convolved channels, H heads, N state size, G groups."""

    projected: torch.Tensor  # (B, L, E + W + H): z, what is convolved, delta
    conv_weight: torch.Tensor  # (W, 4)
    conv_bias: torch.Tensor | None  # (W,)
    A: torch.Tensor  # (H,)
    D: torch.Tensor | None  # (H,)
    delta_bias: torch.Tensor  # (H,)
    norm_weight: torch.Tensor  # (E,)
    conv_state: torch.Tensor | None  # (B, 3, W)
    state: torch.Tensor | None  # (B, H, E / H, N)

    def split(self, projected):
        """Its z, what is convolved, delta."""
        widths = len(self.norm_weight), len(self.conv_weight), len(self.A)
        return projected.split(widths, dim=-1)

    def heads(self, convolved, groups):
        """(B, L, W) -> x, B and C."""
        return portable.mamba2_heads(convolved, len(self.norm_weight), len(self.A), groups)


class _Settings(NamedTuple):
    groups: int
    epsilon: float
    delta_limit: tuple[float, float]
    beyond: torch.Tensor | None  # (B, L)

    def step(self, delta, delta_bias):
        return portable.mamba2_step(delta, delta_bias, self.delta_limit, self.beyond)

    @torch.enable_grad()
    def step_backward(self, delta, delta_bias, dstep):
        """The gradients of delta and its bias."""
        inputs = [t.detach().requires_grad_() for t in (delta, delta_bias)]
        return torch.autograd.grad(self.step(*inputs), inputs, dstep)


def mamba2_inner(*arguments):
    """See `rankmamba.scan.mamba2_inner`."""
    *tensors, groups, epsilon, delta_limit, beyond, return_final_state = arguments
    settings = _Settings(groups, epsilon, delta_limit, beyond)
    if tracked(tensors):
        y, final_state = _Mamba2Inner.apply(settings, return_final_state, *tensors)
    else:
        y, final_state, *_ = _forward(_Tensors(*tensors), settings, return_final_state)
    return (y, final_state) if return_final_state else y


class _Mamba2Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, want_final, *tensors):
        normed, final_state, *made = _forward(_Tensors(*tensors), settings, want_final, keep=True)
        ctx.save_for_backward(*tensors, *made)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return normed, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed, dfinal):
        *tensors, step, convolved, before, y = ctx.saved_tensors
        gradients = _backward(_Tensors(*tensors), ctx.settings, step, convolved, before, y, dnormed, dfinal)
        return None, None, *(None if t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True))


def _forward(t: _Tensors, settings: _Settings, want_final: bool, keep: bool = False):
    """Return the normed y (B, L, E) and the final state or None; then for the backward pass the step, the convolution's output, the
    states between chunks (None unless to be kept) and the scan's y (overwritten unless to be kept)."""
    z, xBC, delta = t.split(as_rows(t.projected))
    step = settings.step(delta, t.delta_bias)
    convolved, y = (empty(*like.shape, dtype=like.dtype) for like in (xBC, z))
    normed = empty(*z.shape, dtype=z.dtype) if keep else y
    conv, conv_alive = conv_arguments(xBC, t.conv_weight, t.conv_bias, t.conv_state, silu=True)
    norm, norm_alive = norm_arguments(y, t.norm_weight, z, settings.epsilon, settings.groups)
    conv.y, norm.out = rows(convolved), rows(normed)
    x, B, C = t.heads(convolved, settings.groups)
    _, final_state, before = ssd_forward(x, step, t.A, B, C, t.D, t.state, want_final, keep, y, conv, norm)
    return normed.to(t.projected.dtype), final_state, step, convolved, before, y


@without_autocast
def _backward(t: _Tensors, settings: _Settings, step, convolved, before, y, dnormed, dfinal):
    """Return the gradients of all tensors."""
    z, xBC, delta = t.split(as_rows(t.projected))
    dprojected, dconvolved = (empty(*like.shape, dtype=y.dtype) for like in (t.projected, convolved))
    dz, dxBC, ddelta = t.split(dprojected)
    (x, B, C), (dx, dB, dC) = (t.heads(both, settings.groups) for both in (convolved, dconvolved))
    dnormed = torch.zeros_like(y) if dnormed is None else dnormed
    norm, alive, (dy, dnorm_weight, _) = norm_backward_arguments(
        y, t.norm_weight, z, settings.epsilon, settings.groups, dnormed, dz
    )
    _, dstep, dA, *dBC, dD, dstate = ssd_backward(x, step, t.A, B, C, t.D, t.state, before, dy, dfinal, dx.flatten(2), norm)
    for into, gradient in zip((dB, dC), dBC, strict=True):
        into.copy_(gradient)
    _, *dconv = conv_backward(xBC, t.conv_weight, t.conv_bias, t.conv_state, True, dconvolved, dxBC)
    dpiece, ddelta_bias = settings.step_backward(delta, t.delta_bias, dstep)
    ddelta.copy_(dpiece)
    dconv_weight, dconv_bias, dconv_state = dconv
    return dprojected, dconv_weight, dconv_bias, dA, dD, ddelta_bias, dnorm_weight.sum(0), dconv_state, dstate
