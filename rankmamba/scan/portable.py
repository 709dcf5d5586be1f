"""The scans in plain PyTorch: any device, float32 or float64, a chunk of tokens at a time.

A chunk's states exist only while the chunk is computed; the backward pass recomputes them from the state before each chunk.
"""

import torch
import torch.nn.functional as F

from .precision import wide, without_autocast
from .reference import recurrence

CHUNK = 1 << 19  # (token, channel, state) triples computed together


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.selective_scan`."""
    out_dtype = u.dtype
    A = wide(A, u)
    u, delta, B, C, D, z, delta_bias, initial_state = (
        None if t is None else t.to(A.dtype) for t in (u, delta, B, C, D, z, delta_bias, initial_state)
    )
    delta = F.softplus(delta if delta_bias is None else delta + delta_bias)
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape)
    seen_through = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func takes no autograd.Function of this kind
    scan = _recurrence if seen_through else _SelectiveScan.apply
    y, final_state = scan(u, delta, A.mT.contiguous(), B, C, initial_state.mT.contiguous())
    if D is not None:
        y = torch.addcmul(y, D, u)
    if z is not None:
        y = y * F.silu(z)
    y = y.to(out_dtype)
    return (y, final_state.mT) if return_final_state else y


def _recurrence(u, delta, A, B, C, h):
    """`_SelectiveScan` token by token: slow, but all of torch's derivatives go through it."""
    y, h = recurrence(u, delta, A.mT, B, C, h.mT)
    return y, h.mT


class _SelectiveScan(torch.autograd.Function):
    """h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t, y_t = C_t h_t.

    u, delta: (B, L, E). A: (N, E). B, C: (B, L, N). h: (B, N, E). The channels come last because torch
    loops over the last dimension, and N is short.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, h):
        y = torch.empty_like(u)
        starts = []
        chunks, buffers = _chunks(u, A, 2)
        for chunk in chunks:
            starts.append(h)
            decay, states = _states(u[:, chunk], delta[:, chunk], A, B[:, chunk], h, buffers)
            y[:, chunk] = _over_n(C[:, chunk], states)
            h = states[:, -1].clone()
        ctx.save_for_backward(u, delta, A, B, C, *starts)
        return y, h if starts else h.clone()

    @staticmethod
    @without_autocast
    def backward(ctx, dy, dh):
        u, delta, A, B, C, *starts = ctx.saved_tensors
        if torch.is_grad_enabled() and starts and not torch.compiler.is_compiling():  # create_graph=True
            inputs = [t.view_as(t) for t in (u, delta, A, B, C, starts[0])]  # so that no gradient goes on to what they were made of
            learnt = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            gradients = iter(torch.autograd.grad(_recurrence(*inputs), learnt, (dy, dh), create_graph=True))
            return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
        du, ddelta, dB, dC = (torch.empty_like(t) for t in (u, delta, B, C))
        dA = torch.zeros_like(A)
        chunks, buffers = _chunks(u, A, 3)
        for chunk, start in zip(reversed(chunks), reversed(starts), strict=True):
            u_c, delta_c, B_c, C_c, dy_c = (t[:, chunk] for t in (u, delta, B, C, dy))
            decay, states = _states(u_c, delta_c, A, B_c, start, buffers)
            dC[:, chunk] = _over_e(states, dy_c)
            # dstates[t]: the gradient of h_t, through y_t and through everything later.
            dstates = torch.mul(dy_c[:, :, None], C_c[..., None], out=_first(buffers[2], dy_c))
            dstates[:, -1] += dh
            for t in range(dstates.shape[1] - 2, -1, -1):
                dstates[:, t].addcmul_(decay[:, t + 1], dstates[:, t + 1])
            dh = decay[:, 0] * dstates[:, 0]
            du_scaled = _over_n(B_c, dstates)
            dB[:, chunk] = _over_e(dstates, delta_c * u_c)
            du[:, chunk] = delta_c * du_scaled
            # Through the decay: d exp(delta A) = decay d(delta A), and decay * h_(t-1) is what remains of the state before.
            dlog = dstates.mul_(decay)
            dlog[:, 1:].mul_(states[:, :-1])
            dlog[:, 0].mul_(start)
            torch.mul(dlog, A, out=states)
            ddelta[:, chunk] = torch.addcmul(states.sum(2), u_c, du_scaled)
            dA += dlog.mul_(delta_c[:, :, None]).sum((0, 1))
        return du, ddelta, dA, dB, dC, dh


def _chunks(u, A, count):
    """Return slices of the L tokens, and `count` buffers (B, K, N, E) that fit the longest, to be reused.

    Unless four tokens take more, a buffer stays within two megabytes: it fits the cache, and is small enough not to be returned to the
    system each time.
    """
    batch, length, inner = u.shape
    size = max(1, min(length, max(4, CHUNK // max(1, batch * A.numel()))))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)], u.new_empty(
        count, batch, size, *A.shape
    )


def _first(buffer, tokens):
    return buffer[:, : tokens.shape[1]]


def _states(u, delta, A, B, h, buffers):
    """Return what each step keeps of the state, exp(delta A), and the state after each step: both (B, K, N, E), in `buffers`."""
    decay = torch.mul(delta[:, :, None], A, out=_first(buffers[0], u)).exp_()
    states = torch.mul((delta * u)[:, :, None], B[..., None], out=_first(buffers[1], u))
    for t in range(states.shape[1]):
        states[:, t].addcmul_(decay[:, t], h)
        h = states[:, t]
    return decay, states


def _over_n(weights, states):
    """(B, K, N), (B, K, N, E) -> (B, K, E)."""
    return (weights[:, :, None] @ states).squeeze(2)


def _over_e(states, weights):
    """(B, K, N, E), (B, K, E) -> (B, K, N)."""
    return (states @ weights[..., None]).squeeze(-1)


def causal_conv1d(x, weight, bias=None, initial_state=None, return_final_state=False, activation=None):
    """See `rankmamba.scan.causal_conv1d`."""
    taps, length = weight.shape[1], x.shape[1]
    inputs = wide(x)
    past = inputs.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state.to(inputs.dtype)
    padded = torch.cat([past, inputs], 1)
    weight = weight.to(inputs.dtype)
    y = weight[:, 0] * padded[:, :length]
    for k in range(1, taps):
        y = torch.addcmul(y, weight[:, k], padded[:, k : k + length])
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    y = y.to(x.dtype)
    return (y, padded[:, length:].to(x.dtype)) if return_final_state else y


def ssd_scan(x, delta, A, B, C, D=None, initial_state=None, return_final_state=False, chunk=64):
    """See `rankmamba.scan.ssd_scan`: a masked matrix product within chunks, a short recurrence between them."""
    batch, length, heads, width = x.shape
    groups, n = B.shape[2:]
    B, C = B.to(x.dtype), C.to(x.dtype)
    shared = heads // groups  # heads that use the same B and C
    A = wide(A, x)
    exact = A.dtype
    # Chunks of Q tokens; delta = 0 in the padding: nothing is added and nothing decays there.
    count = -(-length // chunk)
    pad = count * chunk - length

    def split(t, *shape):
        if pad:  # not by F.pad, which refuses what has no elements before torch 2.9 or so
            t = torch.cat([t, t.new_zeros(batch, pad, *t.shape[2:])], 1)
        return t.reshape(batch, count, chunk, *shape)

    step = split(delta.to(exact), groups, shared).permute(0, 1, 3, 4, 2)  # (B, c, G, S, Q)
    xs = split(x, groups, shared, width).permute(0, 1, 3, 4, 2, 5)  # (B, c, G, S, Q, P)
    Bs = split(B, groups, n).transpose(2, 3)  # (B, c, G, Q, N)
    Cs = split(C, groups, n).transpose(2, 3)
    work = x.dtype  # the products run in the inputs' precision, with float32 sums; decays and states stay float32
    log_decay = torch.cumsum(step * A.view(groups, shared, 1), -1)
    # 1. within a chunk: y_i += sum_(j<=i) (C_i . B_j) exp(a_(j+1) + ... + a_i) delta_j x_j
    scores = (Cs @ Bs.transpose(-1, -2)).to(exact)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(later, float("-inf")).exp()
    mixing = between * scores[:, :, :, None] * step[..., None, :]
    y = (mixing.to(work) @ xs).to(exact)
    # 2. what each chunk adds to the state, and the state before each chunk
    total = log_decay[..., -1]
    weights = step * torch.exp(total[..., None] - log_decay)
    added = (xs * weights[..., None].to(work)).transpose(-1, -2).to(exact) @ Bs[:, :, :, None].to(exact)
    state = A.new_zeros(batch, heads, width, n) if initial_state is None else initial_state.to(exact)
    state = state.reshape(batch, groups, shared, width, n)
    before = []
    for decay, more in zip(total.exp()[..., None, None].unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = decay * state + more
    # 3. what the state before the chunk gives
    if before:
        carried = Cs[:, :, :, None] @ torch.stack(before, 1).transpose(-1, -2).to(work)
        y = torch.addcmul(y, carried.to(exact), log_decay.exp()[..., None])
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, count * chunk, heads, width)[:, :length]
    if D is not None:
        y = torch.addcmul(y, D.to(exact)[:, None], x.to(exact))
    y, state = y.to(x.dtype), state.reshape(batch, heads, width, n)
    return (y, state) if return_final_state else y


def mamba2_heads(convolved, inner, heads, groups):
    """(B, L, E + 2 G N) -> x (B, L, H, E / H), B and C (B, L, G, N)."""
    shared = (convolved.shape[2] - inner) // 2
    x, B, C = convolved.split([inner, shared, shared], dim=-1)
    return x.unflatten(2, (heads, -1)), B.unflatten(2, (groups, -1)), C.unflatten(2, (groups, -1))


def mamba2_step(delta, delta_bias, limit, beyond=None):
    """delta (B, L, H) -> the step: softplus(delta + delta_bias) within its limits, and 0 at the tokens `beyond` (B, L)."""
    step = F.softplus(wide(delta) + wide(delta_bias)).clamp(*limit)
    return step if beyond is None else step.masked_fill(beyond[..., None], 0.0)


def ssd_token(x, delta, A, B, C, D, initial_state, at):
    """See `rankmamba.scan.ssd_token`."""
    shared = x.shape[2] // B.shape[2]  # heads that use the same B and C

    def there(tensor):
        return wide(tensor.gather(1, at.view(-1, 1, *(1,) * (tensor.dim() - 2)).expand(-1, 1, *tensor.shape[2:])))

    behind = torch.arange(x.shape[1], device=x.device) > at
    step = wide(delta).masked_fill(behind[..., None], 0.0)
    decay = step * wide(A)
    later = F.pad(decay[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # of the tokens after j
    reads = there(C)
    scores = (reads * B).sum(-1).repeat_interleave(shared, dim=2)  # (B, L, H)
    weights = (later.exp() * step * scores).to(x.dtype)  # as exact as x: no copy of x with more digits, the largest tensor by far
    y = wide(torch.einsum("blh,blhp->bhp", weights, x))[:, None]
    if initial_state is not None:
        reads = reads.repeat_interleave(shared, dim=2)[:, 0, :, None]  # (B, H, 1, N)
        y = y + (decay.sum(1).exp()[..., None] * (initial_state * reads).sum(-1))[:, None]
    return (y + wide(D)[:, None] * there(x)).to(x.dtype)


def rms_norm(y, weight, z, epsilon, groups, dtype):
    """See `rankmamba.scan.rms_norm`."""
    gated = wide(y) if z is None else wide(y) * F.silu(wide(z))
    parts = gated.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight * parts.flatten(-2)).to(dtype)
