"""Transformers' attention on our own CPU kernel, as Mamba has its scan; registered with Hugging Face under a name.

PyTorch's SDPA reaches an eighth to a quarter of the processor's speed on texts of one or two hundred tokens, and architectures are to
be compared here, not the care that each one's kernel got. Dropout and gradients of a bias stay with SDPA.
"""

import torch
from torch.profiler import record_function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, flash_attention_mask
from transformers.masking_utils import sdpa_mask as masked_pairs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import scan
from ..scan.precision import PRECISIONS

NATIVE = "rankmamba_native"
POOLED_NATIVE = "rankmamba_pooled_native"  # the same for one query of each text, see `last_layer`
ROTARY = NATIVE, POOLED_NATIVE  # the implementations that rotate queries and keys themselves
# Families (transformers' `model_type`) without a window, whose only bias between positions, if any, is handed over (T5's).
PLAIN = {"bert", "roberta", "electra", "opt", "gpt_neox", "gpt2", "llama", "nemotron_h", "t5"}


def native_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, ...] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute attention; with SDPA where dropout, the gradient of a bias, another precision or another mask is needed.

    query: (B, heads, L, head size). key, value: (B, heads or a divisor of it, K, head size). attention_mask: None, or
    (B, K), false where a key is hidden, or as SDPA takes it. position_bias: (1, heads, L, K). rotary: as `scan.native.attention` takes it.
    Returns (B, L, heads, head size).
    """
    causal = module.is_causal if is_causal is None else is_causal
    of_pairs = attention_mask is not None and attention_mask.dim() != 2
    served = not of_pairs and query.device.type == "cpu" and all(tensor.dtype in PRECISIONS for tensor in (query, key, value))
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    served = served and (attention_mask is None or attention_mask.shape == (batch, keys)) and (keys >= queries or not causal)
    served = served and not scan.plain() and not kwargs.get("dropout")
    served = served and not (torch.is_grad_enabled() and position_bias is not None and position_bias.requires_grad)
    if not served:
        if rotary is not None:
            from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb  # see `substitutes._class`

            query, key = apply_rotary_pos_emb(query, query, *rotary[:2])[0], apply_rotary_pos_emb(key, key, *rotary[2:])[0]
        mask = attention_mask if of_pairs else sdpa_mask(attention_mask, causal, query, key)
        return sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, is_causal=causal, position_bias=position_bias, **kwargs
        )
    from ..scan import native

    with record_function("rankmamba::attention"):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return native.attention(query, key, value, attention_mask, causal, scale, position_bias, rotary), None


class RotaryAttention:
    """GPT-NeoX's attention, whose queries and keys our kernel rotates as it reads them; PyTorch passes over them several times for that."""

    def forward(self, hidden_states, attention_mask, layer_past=None, position_embeddings=None, **kwargs):
        """(B, L, D) -> (B, L, D), None. attention_mask: as `native_attention` takes it. position_embeddings: cos, sin (B or 1, L, R)."""
        name = self.config._attn_implementation
        if name not in ROTARY or layer_past is not None:
            return super().forward(hidden_states, attention_mask, layer_past, position_embeddings, **kwargs)
        heads = self.query_key_value(hidden_states).unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
        kwargs |= {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        attend = ALL_ATTENTION_FUNCTIONS[name]
        output, _ = attend(self, *heads.chunk(3, dim=-1), attention_mask, rotary=position_embeddings * 2, **kwargs)
        return self.dense(output.flatten(2)), None


def sdpa_mask(seen: torch.Tensor | None, causal: bool, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return the mask with which SDPA hides the same keys: bool (B or 1, 1, L or 1, K), or None where its own causal kernel does.

    seen: None or (B, K). causal: the last query sees all keys, each before it one less. query, key: as in `native_attention`.
    """
    queries, keys = query.shape[2], key.shape[2]
    if seen is not None:
        seen = seen.bool()[:, None, None]
    if not causal or seen is None and queries in (1, keys):
        return seen
    below = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return below[None, None] if seen is None else seen & below


def native_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function, **kwargs):
    """Return the mask that `native_attention` gets: None or (B, K) where the last query stands at the last key and padding is all
    there is beside causality, else, as for packed texts or a cache with places to come, (B, 1, L, K), true where a key is seen."""
    sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    padding_alone = not scan.plain() and mask_function in (causal_mask_function, bidirectional_mask_function)
    padding, keys = kwargs.get("attention_mask"), kv_offset + kv_length
    if padding_alone and q_offset + q_length == keys and (padding is None or padding.shape[1] == keys):
        return flash_attention_mask(batch_size, **sizes, **kwargs)
    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masked_pairs(batch_size, **sizes, mask_function=mask_function, **kwargs | whole)


def runs(model_type: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel serves a family on a device, with products in `dtype`."""
    return model_type in PLAIN and device.type == "cpu" and dtype in PRECISIONS and scan.kernel(device).name == "native"


AttentionInterface.register(NATIVE, native_attention)
AttentionMaskInterface.register(NATIVE, native_mask)
