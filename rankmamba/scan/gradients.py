"""Which gradients the kernels have: first ones."""

import functools

import torch

from ..errors import InputError


def once_differentiable(backward):
    """Decorate a kernel's backward pass; torch's decorator of this name can leave second derivatives out without a word.

    Raises:
        InputError: it was called with create_graph=True.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *gradients):
        if torch.is_grad_enabled():
            raise InputError(
                "expected first derivatives, got create_graph=True: the kernels have no second ones; compute what is to be differentiated "
                'twice, forward and backward, within `with rankmamba.scan.forced("portable"):`'
            )
        return backward(ctx, *gradients)

    return wrapped
