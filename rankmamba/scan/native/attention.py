"""Attention on the native kernels, forward and backward."""

import torch

from ...errors import InputError
from ..gradients import once_differentiable
from ..precision import without_autocast
from .library import Attention, Rotation, as_plain, as_rows, call, empty, pointer, rows, tracked, workers


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    scale: float,
    bias: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """softmax(query key^T scale + bias) value: (B, L, H, P), in the precision of the values.

    query: float32 or bfloat16 (B, H, L, P). key, value: likewise, (B, H or a divisor of it, K, P). seen: (B, K), false or 0 where a
    key is hidden. causal: the last query sees all keys, each before it one less. A query that sees no key gets zeros. bias: (1, H, L, K);
    gets no gradient. rotary: cosines and sines for the queries, (B or 1, L, R), and for the keys, (B or 1, K, R), of R / 2 angles, twice;
    the first R numbers of each query and key are rotated by them first, in pairs R / 2 apart (arXiv 2104.09864). No gradient either.

    Raises:
        InputError: a tensor has another shape.
    """
    _check(query, key, value, seen, rotary)
    hidden = None if seen is None else as_plain(torch.where(seen.bool(), 0.0, -torch.inf))
    if bias is not None:
        bias = as_plain(bias.expand(1, *query.shape[1:3], key.shape[2]))
    angles = (as_plain(part[..., : part.shape[-1] // 2]) for part in rotary or ())
    run = _Attention.apply if tracked((query, key, value)) else _forward
    return run(query, key, value, causal, scale, hidden, bias, *angles)


def _check(query, key, value, seen, rotary):
    """Check the shapes: the kernel believes them, and a checkpoint's configuration may say anything."""
    (batch, heads, length, width), (_, shared, keys, _) = query.shape, key.shape
    wanted = {"key": (key, (batch, shared, keys, width)), "value": (value, key.shape)}
    if seen is not None:
        wanted["seen"] = (seen, (batch, keys))
    for place, part in enumerate(rotary or ()):
        wanted[f"rotary[{place}]"] = (part, (batch if len(part) > 1 else 1, keys if place > 1 else length, rotary[0].shape[-1]))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise InputError(f"expected {name} {tuple(shape)} for queries {tuple(query.shape)}, got {tuple(tensor.shape)}")
    wrong = None
    if not shared or heads % shared:
        wrong = f"expected a number of key heads that divides {heads} query heads, got {shared}"
    elif rotary is not None and rotary[0].shape[-1] > width:
        wrong = f"expected to rotate at most the {width} numbers of a head, got {rotary[0].shape[-1]}"
    if wrong is not None:
        raise InputError(f"{wrong}; correct the model's configuration")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, causal, scale, hidden, bias, *angles):
        ctx.save_for_backward(query, key, value, hidden, bias, *angles)
        ctx.options = causal, scale
        return _forward(query, key, value, causal, scale, hidden, bias, *angles)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        query, key, value, *rest = ctx.saved_tensors
        return *_backward(dout, query, key, value, *ctx.options, *rest), *[None] * (2 + len(rest))


def _arguments(query, key, value, causal, scale, hidden, bias, *angles):
    """Return the C arguments and the tensors they point to."""
    (batch, heads, length, width), (_, shared, keys, _) = query.shape, key.shape
    alive = *(as_rows(t) for t in (query, key, value)), hidden, bias, *angles
    arguments = Attention(batch, heads, width, length, keys, heads // shared, causal, scale)
    for name, tensor in zip("qkv", alive, strict=False):
        setattr(arguments, name, rows(tensor.transpose(1, 2)))
        setattr(arguments, f"{name}_head", tensor.stride(1))
    arguments.hidden, arguments.bias = pointer(hidden), pointer(bias)
    if angles:
        arguments.q_rotation, arguments.k_rotation = _rotation(*angles[:2]), _rotation(*angles[2:])
    return arguments, alive


def _rotation(cos, sin):
    return Rotation(pointer(cos), pointer(sin), cos.shape[2], cos.stride(0) if len(cos) > 1 else 0)


def _products(query, key):
    """Multiplications in one of the matrix products."""
    return query.numel() * key.shape[2]


def _forward(query, key, value, *options):
    batch, heads, length, width = query.shape
    arguments, alive = _arguments(query, key, value, *options)
    out = empty(batch, length, heads * width, dtype=alive[2].dtype)
    arguments.out = rows(out)
    call("attention", arguments, workers(2 * _products(query, key)))
    return out.view(batch, length, heads, width)


@without_autocast
def _backward(dout, query, key, value, *options):
    arguments, alive = _arguments(query, key, value, *options)
    dout = as_rows(dout)
    gradients = [empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3], dtype=t.dtype) for t in alive[:3]]
    arguments.dout, arguments.dout_head = rows(dout), dout.stride(2)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        setattr(arguments, name, rows(gradient.flatten(2)))
    call("attention_backward", arguments, workers(5 * _products(query, key)))
    return [gradient.transpose(1, 2) for gradient in gradients]
