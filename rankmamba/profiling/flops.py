"""The arithmetic of a system: what its mathematics needs, whatever kernel computes it.

One operation is an addition, a multiplication, a division, an exponential or a logarithm. Counted are

- products of matrices, by torch's counter: 2 M N K;
- attention, of which a causal model needs the lower triangle only, and a last layer that computes just the pooled token one row;
- convolutions of K taps: 2 K a value;
- Mamba's scan (arXiv 2312.00752, equation 2a), for each token and channel: 7 N for exp(d A) h + d u B and C h (N states: two
  products to make the decay and its exponential, one for d u B, a product and a sum for h, a product and a sum for y), and 11 for
  the step d = softplus(delta + bias), d u, D u and the gate y silu(z);
- Mamba-2's scan (arXiv 2405.21060, equation 1), for each token and channel: 5 N (its decay is one number a head), and 3 for d u
  and D u; its gated norm: 9 a value.

Not counted: norms, activations, embeddings, softmax, and what a last layer of Mamba-2 does in place of its scan (`scan.ssd_token`);
they are linear in tokens and small beside the products. Training counts three times the forward pass (arXiv 2204.02311, appendix B):
what a kernel recomputes in the backward pass is not counted.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import scan
from ..model import RerankerModel


def forward_flops(model: RerankerModel, length: int) -> int:
    """Operations of scoring one pair of `length` tokens.

    They are a polynomial of degree two in the length, so pairs of 2, 3 and 4 tokens determine them.
    """
    attention, pools = model.backbone.config._attn_implementation, model.last_layer.pools_attention
    if attention is not None:
        model.backbone.set_attn_implementation("eager")  # the only implementation whose products the counter always sees
    try:
        two, three, four = (_count(model, tokens, pools) for tokens in (2, 3, 4))
    finally:
        if attention is not None:
            model.backbone.set_attn_implementation(attention)
    first, second = three - two, four - 2 * three + two
    return two + (length - 2) * first + (length - 2) * (length - 3) // 2 * second


def _count(model: RerankerModel, length: int, pools: bool) -> int:
    counter, kernel = FlopCounterMode(display=False), _CountingKernel()
    with scan.forced(kernel), counter, torch.no_grad():
        model.eval()(torch.zeros(1, length, dtype=torch.long, device=model.device))
    counts = counter.get_flop_counts()["Global"]
    attention = counts.pop(torch.ops.aten.bmm, 0)  # products with weights are mm and addmm, and the scans do not get here
    last = attention // model.backbone.config.num_hidden_layers if pools else 0
    attention -= last
    if model.config.kind == "causal":
        attention = attention * (length + 1) // (2 * length)
    return sum(counts.values()) + attention + last // length + kernel.operations


class _CountingKernel:
    """The scan's four functions (`rankmamba.scan`) for one sequence: they count, and return tensors of the right shape."""

    def __init__(self):
        self.operations = 0

    def selective_scan(self, u, delta, A, *_):
        self.operations += u.numel() * (7 * A.shape[1] + 11)
        return torch.empty_like(u)

    def causal_conv1d(self, x, weight, *_):
        self.operations += 2 * x.numel() * weight.shape[1]
        return torch.empty_like(x)

    def ssd_scan(self, x, delta, A, B, *_):
        self.operations += x.numel() * (5 * B.shape[3] + 3)
        return torch.empty_like(x)

    def rms_norm(self, y, weight, z, epsilon, groups, dtype):
        if z is not None:  # norms alone are counted for no system
            self.operations += 9 * y.numel()
        return torch.empty_like(y, dtype=dtype)
