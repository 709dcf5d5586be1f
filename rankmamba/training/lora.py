"""LoRA (arXiv 2106.09685) through peft: small trained updates beside frozen weights, for backbones above 700 M parameters."""

from ..backbones import family_of
from ..errors import InputError
from ..model import RerankerModel

DROPOUT = 0.1  # as in the original RankMamba
# The decoder of an encoder-decoder takes one step, and attention over one token depends on neither its query nor its key.
SINGLE_STEP = r"(.*\.)?decoder\..*(SelfAttention\.(q|k)|self_attn\.(q|k)_proj)"


def add_lora(model: RerankerModel, r: int, alpha: int):
    """Freeze the backbone and put LoRA of rank r, scaled by alpha / r, beside its linear maps; the head is trained whole.

    The model changes in place. Returns the adapted model of peft, whose `merge_and_unload` makes it an ordinary
    one again, with the same scores.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(
            "expected peft to be installed for lora_r > 0, got no such package; pip install 'rankmamba[hf]'"
        ) from error
    family = family_of(model.config.backbone_config)
    targets = family.lora_targets
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=DROPOUT,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules=rf"score|{SINGLE_STEP}" if family.kind == "encoder-decoder" else "score",  # OPT has a decoder too
        ),
    )
    model.score.requires_grad_(True)
    return adapted
