"""Hugging Face's Mamba, FalconMamba and Mamba-2 blocks, computed by `rankmamba.scan`: forward passes of their mixers and norms.

`substitutes.use_kernels` gives them to a backbone's modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..scan import causal_conv1d, mamba2_heads, mamba2_inner, mamba2_step, plain, rms_norm, selective_scan, ssd_token
from ..scan.precision import autocasts, wide


def has_scan(model: nn.Module) -> bool:
    """Return whether `rankmamba.scan` computes anything in this model."""
    return any(isinstance(module, ScanMixer) for module in model.modules())


@dataclass
class MambaState:
    """What a Mamba backbone keeps of the tokens it has read: two tensors, however many tokens.

    conv: (layers, B, K-1, W), the last inputs of each convolution; W is E (Mamba) or E + 2 G N (Mamba-2).
    ssm: (layers, B, E, N) or (layers, B, H, P, N), float32. `MambaState()` has read nothing.

    Pass it to the backbone as `cache`. A forward pass never changes it; the state afterwards is `state.after`. With
    record=False `after` is not kept, which saves its memory.

    >>> state = MambaState()
    >>> backbone(input_ids=documents, attention_mask=mask, cache=state, use_cache=False)
    >>> read, rows = state.after, [3, 0, 0, 7]
    >>> candidates = MambaState(read.conv[:, rows], read.ssm[:, rows], record=False)
    >>> backbone(input_ids=queries, cache=candidates, use_cache=False).last_hidden_state  # (4, L, D), continued
    """

    conv: torch.Tensor | None = None
    ssm: torch.Tensor | None = None
    record: bool = True
    _next: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def after(self) -> MambaState:
        """The state after the tokens of the last forward pass.

        Raises:
            InputError: there was none, or it was not recorded.
        """
        if not self._next:
            raise InputError(
                "expected a state that a forward pass has continued with record=True, got none; run the backbone first"
            )
        layers = [self._next[layer] for layer in sorted(self._next)]
        return MambaState(*(torch.stack(parts) for parts in zip(*layers, strict=True)))

    def _read(self, layer):
        return (None, None) if self.ssm is None else (self.conv[layer], self.ssm[layer])

    def _write(self, layer, conv, ssm):
        if self.record:
            self._next[layer] = (conv, ssm)


@dataclass
class _HuggingFaceCache:
    """The same two methods for transformers' own cache, so that generate() works; its convolution state has one input more."""

    cache: object
    taps: int
    record: bool = True

    def _read(self, layer):
        kept = self.cache.layers[layer]
        if not kept.has_previous_state[0]:
            return None, None
        conv = kept.conv_states[0]
        return conv[..., conv.shape[-1] - self.taps + 1 :].transpose(1, 2), kept.recurrent_states[0]

    def _write(self, layer, conv, ssm):
        self.cache.update_conv_state(F.pad(conv.transpose(1, 2), (1, 0)), layer, conv_kernel_size=self.taps)
        self.cache.update_recurrent_state(ssm, layer)


@dataclass(frozen=True)
class _Padding:
    """Where the real tokens of a batch are.

    lengths: (B,). order, back: (B, L), which move them to the front of their row and back; None where they already are in front.
    """

    lengths: torch.Tensor
    order: torch.Tensor | None
    back: torch.Tensor | None

    @staticmethod
    def of(attention_mask: torch.Tensor | None, length: int) -> _Padding | None:
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
            raise InputError(
                f"expected an attention_mask (B, at least {length}) of a Mamba, got {tuple(attention_mask.shape)}; packed texts, say, it "
                "would mix: give each its own row"
            )
        real = attention_mask[:, -length:].bool()
        lengths = real.sum(1)
        if not plain():  # torch.compile and torch.export cannot look at values
            if real.all():
                return None
            if torch.equal(real, torch.arange(length, device=real.device) < lengths[:, None]):
                return _Padding(lengths, None, None)
        order = torch.argsort((~real).byte(), dim=1, stable=True)
        return _Padding(lengths, order, torch.argsort(order, dim=1))

    def to_front(self, hidden):
        return hidden if self.order is None else hidden.gather(1, self.order[..., None].expand_as(hidden))

    def put_back(self, hidden):
        return hidden if self.back is None else hidden.gather(1, self.back[..., None].expand_as(hidden))

    def in_front(self, places):
        """Where tokens (B, n) are once the real ones are in front."""
        return places if self.back is None else self.back.gather(1, places)

    def beyond(self, length):
        """(B, L), true after the last real token."""
        return torch.arange(length, device=self.lengths.device) >= self.lengths[:, None]


class ScanMixer:
    """What the three mixers share: padding, states and the convolution.

    A causal model cannot see to its right, so once the real tokens of a row are in front, the tokens after them matter only
    where a final state is wanted.
    """

    pooled_batch = None  # in a last layer: `last_layer._Batch`; only the output at its positions is read

    def forward(self, hidden_states, cache=None, attention_mask=None, **kwargs):
        """(B, L, D) -> (B, L, D). attention_mask: (B, >= L), 1 = real. cache: `MambaState`, their Cache or None."""
        padding = _Padding.of(attention_mask, hidden_states.shape[1])
        if padding is not None:
            hidden_states = padding.to_front(hidden_states)
        state = cache
        if state is not None and not isinstance(state, MambaState):
            state = _HuggingFaceCache(state, self.conv_kernel_size)
        past = (None, None) if state is None else state._read(self.layer_idx)
        record = state is not None and state.record
        positions = None if self.pooled_batch is None or record else self.pooled_batch.positions
        if positions is not None:
            places = positions[:, None]
            at = places if padding is None else padding.in_front(places)
            pooled = self.out_proj(self._mix(hidden_states, *past, padding, record, at)[0])
            return pooled.new_zeros(hidden_states.shape).scatter(1, places[..., None].expand_as(pooled), pooled)
        mixed, last_inputs, last_state = self._mix(hidden_states, *past, padding, record)
        if record:
            state._write(self.layer_idx, last_inputs, last_state)
        return self.out_proj(mixed if padding is None else padding.put_back(mixed))

    def _split(self, hidden_states, at, gate, rest):
        """in_proj's outputs: `gate`, only for the tokens at `at`, and `rest`. gate, rest: slices of its rows."""
        if type(self.in_proj) is not nn.Linear:  # an adapter cannot be cut
            projected = self.in_proj(hidden_states)
            return _take(projected, at)[..., gate], projected[..., rest]
        bias = None if self.in_proj.bias is None else self.in_proj.bias[rest]
        return self.in_proj(_take(hidden_states, at))[..., gate], F.linear(hidden_states, self.in_proj.weight[rest], bias)

    def _convolve(self, x, past):
        """(B, L, W) -> act(conv(x))."""
        act = self._other_act()
        y = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, past, activation=None if act else "silu")
        return act(y) if act else y

    def _other_act(self):
        """What follows the convolution, or None for silu, which the kernels compute."""
        return None if self.activation in ("silu", "swish") else self.act

    def _last_inputs(self, x, past, padding):
        """The last K-1 real inputs of the convolution, x: (B, L, W) -> (B, K-1, W)."""
        kept, length = self.conv_kernel_size - 1, x.shape[1]
        before = x.new_zeros(x.shape[0], kept, x.shape[2]) if past is None else past.to(x.dtype)
        if padding is None:
            inputs = torch.cat([before, x[:, max(0, length - kept) :]], 1)
            return inputs[:, inputs.shape[1] - kept :]
        at = padding.lengths[:, None] + torch.arange(kept, device=x.device)
        return _take(torch.cat([before, x], 1), at)


def _take(hidden, at):
    """(B, L, W) -> the tokens at `at` (B, n), (B, n, W)."""
    return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))


def _by_channel(linear, x, bias=True):
    """linear(x): (B, L, D) -> (B, L, W). On a GPU each channel's tokens are contiguous, as Mamba's CUDA kernels read them."""
    if not x.is_cuda or type(linear) is not nn.Linear or (bias and linear.bias is not None):
        return linear(x) if bias else F.linear(x, linear.weight)
    return (linear.weight @ x.flatten(0, 1).T).unflatten(1, x.shape[:2]).permute(1, 2, 0)


class ScanMamba(ScanMixer):
    """Mamba's mixer (arXiv 2312.00752, figure 3), computed by `rankmamba.scan`."""

    def _mix(self, hidden_states, past_conv, past_ssm, padding, record, at=None):
        """(B, L, D) -> (B, L, E), or (B, 1, E) of the tokens at `at` (B, 1); and, if recorded, the convolution's last inputs and the
        last state."""
        if at is None:
            x, z = _by_channel(self.in_proj, hidden_states).chunk(2, dim=-1)
        else:
            inner = self.intermediate_size
            gate, x = self._split(hidden_states, at, slice(inner, None), slice(inner))
            z = None
        u = self._convolve(x, past_conv)
        low_rank, B, C = self._select(u)
        delta, delta_bias = self._delta(low_rank)
        if record and padding is not None:
            # softplus(-1e4) = 0: nothing is added to the state and nothing decays
            delta = delta.masked_fill(padding.beyond(delta.shape[1])[..., None], -1e4)
        y = selective_scan(
            u,
            delta,
            -torch.exp(wide(self.A_log)),
            B,
            C,
            wide(self.D),
            z,
            delta_bias,
            initial_state=past_ssm,
            return_final_state=record,
        )
        if record:
            return y[0], self._last_inputs(x, past_conv, padding), y[1]
        return (y if at is None else _take(y, at) * F.silu(gate)), None, None

    def _select(self, u):
        """(B, L, E) -> the input-dependent parameters: delta before its projection (B, L, R), B and C (B, L, N)."""
        return self.x_proj(u).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)

    def _delta(self, low_rank):
        """(B, L, R) -> the step before its softplus, (B, L, E), and the bias that is still to be added to it."""
        if type(self.dt_proj) is nn.Linear:
            # The bias decides the step's size (softplus of about -5); adding it in bfloat16 would move the step by a percent.
            return _by_channel(self.dt_proj, low_rank, bias=False), wide(self.dt_proj.bias)
        # LoRA or a quantised layer: only its own call is right, which adds the bias itself; so keep it out of autocast's bfloat16.
        bias = self.dt_proj.bias
        with torch.autocast(low_rank.device.type, enabled=False):
            return self.dt_proj(low_rank.to(bias.dtype if isinstance(bias, torch.Tensor) else torch.float32)), None


class ScanFalconMamba(ScanMamba):
    """FalconMamba's mixer, which normalises delta, B and C (arXiv 2410.05355, section 3), computed by `rankmamba.scan`."""

    def _select(self, u):
        low_rank, B, C = super()._select(u)
        return self.dt_layernorm(low_rank), self.b_layernorm(B), self.c_layernorm(C)


class ScanMamba2(ScanMixer):
    """Mamba-2's mixer (arXiv 2405.21060, figure 6), computed by `rankmamba.scan`."""

    def _mix(self, hidden_states, past_conv, past_ssm, padding, record, at=None):
        A, D = -torch.exp(wide(self.A_log)), wide(self.D)
        if at is not None:
            return self._mix_token(hidden_states, past_conv, past_ssm, A, D, at), None, None
        projected = self.in_proj(hidden_states)
        y = mamba2_inner(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            A,
            D,
            self.dt_bias,
            self.norm.weight,
            past_conv,
            past_ssm,
            groups=self.n_groups,
            epsilon=self.norm.variance_epsilon,
            delta_limit=self.time_step_limit,
            beyond=padding.beyond(projected.shape[1]) if record and padding is not None else None,
            act=self._other_act(),
            return_final_state=record,
        )
        if not record:
            return y, None, None
        _, xBC, _ = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        return y[0], self._last_inputs(xBC, past_conv, padding), y[1]

    def _mix_token(self, hidden_states, past_conv, past_ssm, A, D, at):
        """(B, L, D) -> what the tokens at `at` (B, 1) give, (B, 1, E)."""
        inner = self.intermediate_size
        z, rest = self._split(hidden_states, at, slice(inner), slice(inner, None))
        xBC, delta = rest.split([self.conv_dim, self.num_heads], dim=-1)
        x, B, C = mamba2_heads(self._convolve(xBC, past_conv), inner, self.num_heads, self.n_groups)
        y = ssd_token(x, mamba2_step(delta, self.dt_bias, self.time_step_limit), A, B, C, D, past_ssm, at)
        return rms_norm(y.flatten(2), self.norm.weight, z, self.norm.variance_epsilon, self.n_groups)


class ScanRMSNorm:
    """The norm before each block, which takes transformers seven passes over the tokens."""

    before_products = False

    def forward(self, hidden_states):
        """(B, L, D) -> (B, L, D). Before matrix products it rounds as autocast would, which saves a pass over the tokens."""
        device = hidden_states.device.type
        rounds = self.before_products and autocasts(device)
        dtype = torch.get_autocast_dtype(device) if rounds else None
        return rms_norm(hidden_states, self.weight, epsilon=self.variance_epsilon, dtype=dtype)
