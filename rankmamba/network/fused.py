"""What Transformers compute between their matrix products, in one pass each on a CPU.

These are bias with GELU and, for scoring, bias with residual and LayerNorm. PyTorch copies the bias before the product and passes over
all tokens once more for each of the others, which is a tenth of MiniLM's time (LOG.md). As with `native_attention`, architectures are to
be compared here, not the care that each one's kernels got. Training's LayerNorm stays with PyTorch, which is as fast there.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as every_module
from transformers.activations import GELUActivation

from .. import scan
from ..scan.precision import PRECISIONS

HOOKS = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"  # of modules, as torch names them


class FusedIntermediate:
    """BERT's, RoBERTa's and ELECTRA's Intermediate: act(dense(x))."""

    def forward(self, hidden_states):
        """(..., D) -> (..., 4 D)."""
        if not _serves(self, hidden_states, self.dense) or not isinstance(self.intermediate_act_fn, GELUActivation):
            return super().forward(hidden_states)
        return _gelu_of(self.dense, hidden_states)


class FusedOutput:
    """Their SelfOutput and Output: LayerNorm(dense(x) + input)."""

    def forward(self, hidden_states, input_tensor):
        """(..., D or 4 D) and (..., D) -> (..., D)."""
        norm = self.LayerNorm
        learns = torch.is_grad_enabled() or self.training
        if learns or not _serves(self, hidden_states, self.dense) or type(norm) is not nn.LayerNorm:
            return super().forward(hidden_states, input_tensor)
        rows = _product(self.dense, hidden_states)
        from ..scan import native

        normed = native.add_norm(rows, self.dense.bias, input_tensor.flatten(0, -2), norm.weight, norm.bias, norm.eps)
        return normed.view(input_tensor.shape)


class FusedMLP:
    """GPT-NeoX's feed-forward network: dense(act(dense(x)))."""

    def forward(self, hidden_states):
        """(..., D) -> (..., D)."""
        if not _serves(self, hidden_states, self.dense_h_to_4h) or not isinstance(self.act, GELUActivation):
            return super().forward(hidden_states)
        return self.dense_4h_to_h(_gelu_of(self.dense_h_to_4h, hidden_states))


def runs(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels compute parts of a model on a device, with products in `dtype`."""
    parts = FusedIntermediate, FusedOutput, FusedMLP
    native = dtype in PRECISIONS and scan.kernel(device).name == "native"
    return native and any(isinstance(module, parts) for module in model.modules())


def _serves(module: nn.Module, hidden: torch.Tensor, linear: nn.Module) -> bool:
    """Return whether the kernels may compute `module`: its weights are float32, used as they are or in autocast's bfloat16, nothing
    replaces its linear map or hooks into its parts, and no forward-mode gradients are needed."""
    replaced = type(linear) is not nn.Linear or "forward" in vars(linear)
    watched = any(getattr(part, f"_{hooks}") for part in module.children() for hooks in HOOKS)
    if replaced or watched or any(getattr(every_module, f"_global_{hooks}") for hooks in HOOKS):
        return False
    product = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    precise = linear.weight.dtype == torch.float32 and product in PRECISIONS and hidden.dtype in (torch.float32, product)
    reached = hidden.device.type == "cpu" and torch.autograd.forward_ad._current_level < 0 and not scan.plain()
    return reached and precise and scan.kernel("cpu").name == "native"


def _product(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (all tokens, W), without the bias."""
    return F.linear(hidden.flatten(0, -2), linear.weight)


def _gelu_of(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    rows = _product(linear, hidden)
    from ..scan import native

    return native.gelu(rows, linear.bias).view(*hidden.shape[:-1], linear.out_features)
