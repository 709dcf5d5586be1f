"""The implementation of attention that a backbone runs, and why."""

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, logging

from . import native_attention


def choose_attention(backbone: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Switch a backbone to the fastest attention that it, the device and the precision allow; return which, and why."""
    name, reason = _choose(backbone, device, dtype)
    if name == "sdpa" and native_attention.runs(backbone.config.model_type, device, dtype):
        name, reason = native_attention.NATIVE, "our kernel on a CPU; SDPA where there is dropout"
    if name != "none":
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # flash attention would warn about float32 weights, ignoring autocast
        try:
            backbone.set_attn_implementation(name)
        finally:
            logging.set_verbosity(verbosity)
    if name == "sdpa" and device.type == "cuda":
        # cuDNN's attention builds a plan for every new shape of a batch: a step of nano-t5 took 0.9 s instead of 0.2 (LOG.md)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return f"{name}: {reason}"


def _choose(backbone: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if getattr(backbone.config, "num_attention_heads", None) is None:
        return "none", "the backbone has no attention"
    if not backbone._supports_sdpa:
        return "eager", "the backbone has no SDPA"
    if not backbone._supports_flash_attn:
        return "sdpa", "the backbone has no flash attention"
    if device.type != "cuda" or dtype != torch.bfloat16:
        return "sdpa", "flash attention needs a GPU and bf16"
    if not is_flash_attn_2_available():
        return "sdpa", "flash-attn does not import; pip install --no-build-isolation '.[gpu]'"
    return "flash_attention_2", "flash-attn imports"
