"""Loading a saved reranker from a folder that need not be trusted: all weights, as safetensors only, and no code of its own."""

import json
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import InputError
from ..model import RerankerConfig, RerankerModel

WEIGHTS = "model.safetensors"
# what a saved reranker consists of; anything else in its folder is the user's own
FILES = (
    "config.json config_sentence_transformers.json modules.json *.safetensors *.safetensors.index.json tokenizer* vocab.* merges.txt "
    "*.model special_tokens_map.json added_tokens.json records"
).split()
REMEDY = "copy the folder again, or train the system again"


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a reranker of ours, by its config.json.

    Raises:
        InputError: config.json is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") == RerankerConfig.model_type
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"expected the configuration of a model, got no JSON object ({path}: {error}); {REMEDY}") from error


def check_target(folder: str | Path) -> None:
    """Check that a reranker may be saved as `folder`: nothing is there, or a saved reranker, which it replaces.

    Raises:
        InputError: it is a file, or holds something else.
    """
    folder = Path(folder)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not is_saved(folder):
        raise InputError(f"expected a new or empty folder, or a saved reranker to replace, got {folder}; choose another name")


def carry_over(folder: str | Path, to: Path) -> None:
    """Copy the user's own files beside a saved reranker (notes, .git) to the folder that takes its place."""
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if not (to / path.name).exists() and not any(fnmatch(path.name, pattern) for pattern in FILES):
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, to / path.name, symlinks=True)
            else:
                shutil.copy2(path, to / path.name, follow_symlinks=False)


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer's words came from its folder.

    Raises:
        FileNotFoundError: the folder has none; transformers would go on with an empty vocabulary.
    """
    if not tokenizer.is_fast and not tokenizer.vocab_files_names:
        return  # ByT5's words are bytes
    if not any((folder / name).is_file() for name in ("tokenizer.json", *tokenizer.vocab_files_names.values())):
        raise FileNotFoundError("no vocabulary")


def load_saved(folder: Path, limits: dict[str, int]) -> tuple[RerankerModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, again if another process saved as `folder` meanwhile; limits: override the folder's own, see
    `RerankerConfig`.

    Raises:
        InputError: a file is missing or damaged, or weights are missing, of other shapes or not finite.
    """
    while True:
        before = _version(folder)
        try:
            loaded = _load(folder, limits)
        except InputError:
            if _version(folder) == before:
                raise
        else:
            if _version(folder) == before:
                return loaded


def _version(folder: Path) -> tuple[int, int] | None:
    """What changes when another folder takes this one's place; None while there is none."""
    with suppress(FileNotFoundError):
        found = (folder / "config.json").stat()
        return found.st_ino, found.st_ctime_ns


def _load(folder: Path, limits: dict[str, int]) -> tuple[RerankerModel, PreTrainedTokenizerBase]:
    # damaged files surface in transformers, tokenizers and safetensors as errors of every class
    try:
        config = RerankerConfig.from_pretrained(folder)
        config.limits = config.limits | limits
        if set(config.limits) != {"max_length", "max_query_length"} or {type(limit) for limit in config.limits.values()} != {int}:
            raise ValueError(f"max_length and max_query_length expected, {config.limits!r:.80} found")
        model, found = RerankerModel.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        check_vocabulary(folder, tokenizer)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
        raise InputError(f"expected a whole saved reranker (safetensors) in {folder}, got {reason}; {REMEDY}") from error
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *(name for name, *_ in found["mismatched_keys"])]
    wrong += [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if wrong:
        raise InputError(f"expected all weights in {folder}, of fitting shapes and finite, got others as {wrong[0]}; {REMEDY}")
    return model, tokenizer
