"""Mamba-2's scan and norm on the native kernels (arXiv 2405.21060, section 6).

The sequence is cut into c chunks of Q tokens. The forward pass is one kernel. In the backward pass the large products are torch's: the
S = H / G heads of a group share B and C, so what a chunk adds to the state is one product (N, Q) (Q, S P), and what it reads from it one
product (Q, N) (N, S P), with the state as (N, S P).
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .. import portable
from ..precision import without_autocast
from .library import Norm, Pass, Ssd, SsdForward, Weigh, as_plain, as_rows, call, pointer, rows, tracked, workers

PART = 8  # state indices, as in ssd_backward.h
NORM_ROWS = 32  # tokens, as in gated_norm.h
CHUNK = 64  # tokens; work inside a chunk grows with Q, work on the states between chunks with 1/Q


def ssd_scan(x, delta, A, B, C, D=None, initial_state=None, return_final_state=False):
    """See `rankmamba.scan.ssd_scan`."""
    tensors = (x, delta, A, B, C, D, initial_state)
    if x.numel() == 0 or B.numel() == 0:
        return portable.ssd_scan(*tensors, return_final_state)
    if tracked(tensors):
        y, final_state = _SsdScan.apply(*tensors, return_final_state)
    else:
        y, final_state, _ = _ssd_forward(*tensors, return_final_state)
    return (y, final_state) if return_final_state else y


def _ssd_forward(x, delta, A, B, C, D, initial_state, want_final, want_before=False):
    """Return y (B, L, H, P); the final state (B, H, P, N), if wanted; and the states before the chunks that read one, if wanted."""
    batch, length, heads, width = x.shape
    groups, n = B.shape[2:]
    x, B, C = _rows(x), _rows(B.to(x.dtype)), _rows(C.to(x.dtype))
    delta, A2, D, initial = as_plain(delta), as_plain(A) * math.log2(math.e), as_plain(D), as_plain(initial_state)
    size = min(CHUNK, length)
    reading = -(-length // size) - (initial is None)
    y = torch.empty(x.shape, dtype=x.dtype)
    final = torch.empty(batch, heads, width, n) if want_final else None
    before = torch.empty(reading, batch, groups, n, heads // groups * width, dtype=x.dtype) if want_before else None
    arguments = SsdForward(batch, length, heads, width, groups, n, size, rows(x), rows(B), rows(C), rows(y))
    for name, tensor in {"delta": delta, "A2": A2, "D": D, "initial": initial, "final": final, "before": before}.items():
        setattr(arguments, name, pointer(tensor))
    call("ssd_forward", arguments, workers(x.numel() * (size + 2 * n)))
    return y.unflatten(2, (heads, width)), final, before


class _SsdScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, initial_state, want_final):
        y, final_state, before = _ssd_forward(x, delta, A, B, C, D, initial_state, want_final, want_before=True)
        ctx.save_for_backward(x, delta, A, B, C, D, initial_state, before)
        ctx.want_final = want_final
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        *inputs, before = ctx.saved_tensors
        if dy is None and dfinal is None:
            return (None,) * 8
        return *_ssd_backward(inputs, ctx.want_final, before, dy, dfinal), None


@without_autocast
def _ssd_backward(inputs, want_final, before, dy, dfinal):
    chunks = _Chunks(*inputs, want_final, before)
    gradients = chunks.backward(torch.zeros_like(inputs[0]) if dy is None else dy, dfinal)
    return tuple(None if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True))


class _Chunks:
    """One call's backward pass, cut into chunks. Large tensors have the chunk first: leaving out the first or the last is a slice.

    before: the state before each chunk that reads one, (c', B, G, N, S P). carried: what the chunk reads from it, (c' B, Q, H P).
    """

    def __init__(self, x, delta, A, B, C, D, initial_state, want_final, before):
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.n = B.shape[2:]
        self.shared = self.heads // self.groups
        self.size = min(CHUNK, self.length)
        self.count = -(-self.length // self.size)
        self.reads_from = 0 if initial_state is not None else 1  # the first chunk that reads a state
        self.adds_until = self.count if want_final else self.count - 1  # chunks beyond need not add to it
        self.x = _rows(x)
        self.work = self.x.dtype  # the large products run in this; states and decays are float32
        self.A, self.D, self.initial_state = A.detach().float(), as_plain(D), initial_state
        self.B, self.C = self._cut(B), self._cut(C)  # (c, B, G, Q, N)
        self.delta = self._fill(delta.detach().float()).contiguous().unflatten(1, (self.count, self.size))  # (B, c, Q, H)
        # Decays are made of differences of these sums, hence the double precision, and two floats for the kernel.
        log = (self.delta.double() * (self.A.double() * math.log2(math.e))).cumsum(2)
        self.log_high = log.float()
        self.log_low = (log - self.log_high).float()
        self.since_start = torch.exp2(self.log_high)  # decay of the state up to each token
        self.until_end = (
            torch.exp2(log[:, :, -1:] - log).float() * self.delta
        )  # weight of each token in the state after the chunk
        self.scores = self.C.float() @ self.B.float().mT  # (c, B, G, Q, Q)
        self.before = before
        self.carried = self._flat(self.C[self.reads_from :] @ before) if len(before) else None

    def backward(self, dy, dfinal):
        """Return the gradients of x, delta, A, B, C, D and the initial state."""
        dy = _rows(dy)
        reading, adding = slice(self.reads_from, None), slice(None, self.adds_until)
        dB, dC = torch.zeros(self.B.shape), torch.zeros(self.C.shape)
        dlog = torch.zeros(self.batch, self.count, self.size, self.heads)  # of the running sums of delta A
        # Back through the states. Each slot: the gradient of the state before a chunk, the last one: that of the final state.
        count = self.count - self.reads_from
        dstates = torch.empty(count + (self.adds_until == self.count), *self._state_shape, dtype=self.work)
        dfinal = None if dfinal is None else self._inside(dfinal)
        dstates[count:] = 0 if dfinal is None else dfinal
        dinitial = None if self.initial_state is None else torch.empty(self._state_shape)
        if count:
            read = self._weigh(dy, self.since_start, self.reads_from, self.count)
            dC[reading] = read @ self.before.mT
            torch.matmul(self.C[reading].mT, read, out=dstates[:count])
            dlog[:, reading, -1] = self._pass(dstates[:count], dfinal, dinitial)
        dadded = dstates[1 - self.reads_from :][adding]
        dB[adding] = self._weigh(self.x, self.until_end, 0, self.adds_until) @ dadded.mT
        dxw = self._flat(self.B[adding] @ dadded)
        # Inside the chunks.
        dx, dscores = torch.empty(self.x.shape, dtype=self.work), torch.empty(self.scores.shape)
        dlog_inside, ddelta = torch.empty(self.delta.shape), torch.empty(self.delta.shape)
        dD = torch.empty(self.count, self.batch, self.heads)
        arguments = self._arguments()
        arguments.dy, arguments.dxw, arguments.dx = rows(dy), rows(dxw), rows(dx)
        arguments.dscores, arguments.da, arguments.ddelta, arguments.dD = map(pointer, (dscores, dlog_inside, ddelta, dD))
        call("ssd_backward", arguments, workers(4 * self.x.numel() * self.size))
        dC += dscores @ self.B.float()
        dB += dscores.mT @ self.C.float()
        # A token's delta A goes into all later sums of its chunk.
        dlog = dlog.add_(dlog_inside).flip(2).cumsum(2).flip(2)
        ddelta = ddelta.addcmul_(dlog, self.A).flatten(1, 2)[:, : self.length]
        dA = (dlog * self.delta).sum((0, 1, 2))
        dinitial = None if dinitial is None else self._outside(dinitial)
        return dx.unflatten(2, (self.heads, self.width)), ddelta, dA, self._uncut(dB), self._uncut(dC), dD.sum((0, 1)), dinitial

    @property
    def _state_shape(self):
        return self.batch, self.groups, self.n, self.shared * self.width

    def _inside(self, state):
        """(B, H, P, N) -> (B, G, N, S P)"""
        return state.detach().float().unflatten(1, (self.groups, self.shared)).permute(0, 1, 4, 2, 3).flatten(3).contiguous()

    def _outside(self, state):
        return state.unflatten(3, (self.shared, self.width)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()

    def _pass(self, dstates, dfinal, dinitial):
        """Run the gradient of the state back through the chunks that read one; return that of log kept, (B, c', H)."""
        kept = self.since_start[:, self.reads_from :, -1]
        dlog = torch.empty(-(-self.n // PART), self.batch, len(dstates), self.heads)
        arguments = Pass(
            self.batch, self.groups, self.n, self.heads, self.width, len(dstates), pointer(dstates), pointer(self.before)
        )
        arguments.bfloat16 = self.work == torch.bfloat16
        arguments.kept, arguments.kept_batch_stride, arguments.kept_chunk_stride = pointer(kept), kept.stride(0), kept.stride(1)
        arguments.dfinal, arguments.dinitial, arguments.dlog = map(pointer, (dfinal, dinitial, dlog))
        call("pass_backward", arguments, workers(dstates.numel()))
        return dlog.sum(0)

    def _fill(self, x):
        """Zeros behind the last token, up to whole chunks."""
        missing = self.count * self.size - self.length
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x

    def _cut(self, x):
        """(B, L, G, N) -> (c, B, G, Q, N)"""
        return self._fill(x.detach().to(self.work)).unflatten(1, (self.count, self.size)).permute(1, 0, 3, 2, 4).contiguous()

    def _uncut(self, x):
        return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.length]

    def _flat(self, x):
        """(c, B, G, Q, S P) -> (c B, Q, H P)"""
        return x.transpose(2, 3).reshape(-1, self.size, self.heads * self.width)

    def _weigh(self, x, factor, start, stop):
        """x (B, L, H P) times factor (B, c, Q, H), chunks start to stop: (stop - start, B, G, Q, S P)"""
        out = torch.empty((stop - start) * self.batch, self.size, self.heads * self.width, dtype=self.work)
        arguments = Weigh(self.batch, self.length, self.heads, self.width, self.size, stop - start, start)
        arguments.x, arguments.out, arguments.factor = rows(x), rows(out), pointer(factor)
        arguments.factor_batch_stride = factor.stride(0)
        call("weigh", arguments, workers(out.numel()))
        return out.view(stop - start, self.batch, self.size, self.groups, self.shared * self.width).transpose(2, 3)

    def _arguments(self):
        sizes = (self.batch, self.length, self.heads, self.width, self.groups, self.size, self.count)
        arguments = Ssd(*sizes, self.reads_from, self.adds_until)
        arguments.x, arguments.carried = rows(self.x), rows(self.carried)
        arguments.scores, arguments.log_high, arguments.log_low = map(pointer, (self.scores, self.log_high, self.log_low))
        arguments.delta, arguments.D = pointer(self.delta), pointer(self.D)
        return arguments


def _rows(x):
    """(B, L, H, P) -> (B, L, H P), a view where the channels of a token lie together."""
    x = x.detach()
    together = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return as_rows(x.flatten(2) if together else x.contiguous().flatten(2))


def gated_rms_norm(y, z, weight, epsilon, groups=1):
    """See `rankmamba.scan.gated_rms_norm`."""
    if y.numel() == 0:
        return portable.gated_rms_norm(y, z, weight, epsilon, groups)
    if tracked((y, z, weight)):
        return _GatedNorm.apply(y, z, weight, epsilon, groups)
    return _norm_forward(y, z, weight, epsilon, groups)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, epsilon, groups):
        ctx.save_for_backward(y, z, weight)
        ctx.epsilon, ctx.groups = epsilon, groups
        return _norm_forward(y, z, weight, epsilon, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *_norm_backward(*ctx.saved_tensors, ctx.epsilon, ctx.groups, dout), None, None


def _norm_arguments(y, z, weight, epsilon, groups):
    alive = as_rows(y), as_rows(z), as_plain(weight)
    return Norm(*y.shape, groups, epsilon, rows(alive[0]), rows(alive[1]), weight=pointer(alive[2])), alive


def _norm_forward(y, z, weight, epsilon, groups):
    arguments, alive = _norm_arguments(y, z, weight, epsilon, groups)
    out = torch.empty(y.shape, dtype=alive[0].dtype)
    arguments.out = rows(out)
    call("norm_forward", arguments, workers(8 * y.numel()))
    return out.to(y.dtype)


@without_autocast
def _norm_backward(y, z, weight, epsilon, groups, dout):
    arguments, alive = _norm_arguments(y, z, weight, epsilon, groups)
    batch, length, inner = y.shape
    dout = as_rows(dout)
    dy, dz = (torch.empty(t.shape, dtype=t.dtype) for t in alive[:2])
    dweight = torch.empty(batch * -(-length // NORM_ROWS), inner)
    arguments.dout, arguments.dy, arguments.dz, arguments.dweight = rows(dout), rows(dy), rows(dz), pointer(dweight)
    call("norm_backward", arguments, workers(16 * y.numel()))
    return dy.to(y.dtype), dz.to(z.dtype), dweight.sum(0).to(weight.dtype)
