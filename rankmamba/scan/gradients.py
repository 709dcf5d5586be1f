"""Which gradients the kernels have: first ones. torch's own decorator, and mamba-ssm, can leave second ones out without a word."""

import functools

import torch

from ..errors import InputError


def once_differentiable(backward):
    """Decorate a kernel's backward pass.

    Raises:
        InputError: it was called with create_graph=True.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *gradients):
        _refuse_a_graph()
        return backward(ctx, *gradients)

    return wrapped


def with_first_derivatives(function):
    """Decorate a function whose kernels are not ours: its outputs are as `once_differentiable` as ours."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        outputs = function(*args, **kwargs)
        for tensor in outputs if isinstance(outputs, tuple) else (outputs,):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: _refuse_a_graph())
        return outputs

    return wrapped


def _refuse_a_graph() -> None:
    if torch.is_grad_enabled():
        raise InputError(
            "expected first derivatives, got create_graph=True: the kernels have no second ones; compute what is to be differentiated "
            'twice, forward and backward, within `with rankmamba.scan.forced("portable"):`'
        )
