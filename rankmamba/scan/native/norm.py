"""Root mean square norm, gated or not, on the native kernels."""

import torch

from .. import portable
from ..gradients import once_differentiable
from ..precision import PRECISIONS, without_autocast
from .library import ITEM_ROWS, Norm, as_plain, as_rows, call, empty, pointer, rows, tracked, workers


def rms_norm(y, weight, z, epsilon, groups, dtype):
    """See `rankmamba.scan.rms_norm`."""
    if y.numel() == 0:
        return portable.rms_norm(y, weight, z, epsilon, groups, dtype)
    if tracked((y, weight, z)):
        return _RMSNorm.apply(y, weight, z, epsilon, groups, dtype)
    return _forward(y, weight, z, epsilon, groups, dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, z, epsilon, groups, dtype):
        ctx.save_for_backward(y, weight, z)
        ctx.epsilon, ctx.groups = epsilon, groups
        return _forward(y, weight, z, epsilon, groups, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *_backward(*ctx.saved_tensors, ctx.epsilon, ctx.groups, dout), None, None, None


def norm_arguments(y, weight, z, epsilon, groups):
    """Return the C arguments and the tensors they point to."""
    alive = as_rows(y), as_plain(weight), as_rows(z)
    return Norm(*y.shape, groups, epsilon, rows(alive[0]), rows(alive[2]), weight=pointer(alive[1])), alive


def norm_workers(arguments):
    backward = 2 if arguments.dout.data else 1
    return workers(8 * backward * arguments.batch * arguments.length * arguments.inner)


def _forward(y, weight, z, epsilon, groups, dtype):
    arguments, alive = norm_arguments(y, weight, z, epsilon, groups)
    out = empty(*y.shape, dtype=dtype if dtype in PRECISIONS else alive[0].dtype)
    arguments.out = rows(out)
    call("norm_forward", arguments, norm_workers(arguments))
    return out.to(dtype)


@without_autocast
def _backward(y, weight, z, epsilon, groups, dout):
    arguments, alive, (dy, dweight, dz) = norm_backward_arguments(y, weight, z, epsilon, groups, dout)
    call("norm_backward", arguments, norm_workers(arguments))
    return dy.to(y.dtype), dweight.sum(0).to(weight.dtype), None if z is None else dz.to(z.dtype)


def norm_backward_arguments(y, weight, z, epsilon, groups, dout, dz=None):
    """Return the C arguments, the tensors they point to, and those that they write: the gradients of y, of weight, to be summed, and of z,
    new memory unless dz is given."""
    arguments, alive = norm_arguments(y, weight, z, epsilon, groups)
    batch, length, inner = y.shape
    dout, dy = as_rows(dout), empty(*y.shape, dtype=alive[0].dtype)
    if z is not None and dz is None:
        dz = empty(*z.shape, dtype=alive[2].dtype)
    dweight = empty(batch * -(-length // ITEM_ROWS), inner)
    arguments.dout, arguments.dy, arguments.dz, arguments.dweight = rows(dout), rows(dy), rows(dz), pointer(dweight)
    return arguments, (*alive, dout), (dy, dweight, dz)
