"""The settings of a training, and their YAML file."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..batch.parameters import ROOT, load_yaml, yaml_text
from ..errors import InputError
from ..files import sha256

RANGES = {  # lowest and highest value
    "learning_rate": (0, math.inf),
    "batch_size": (1, math.inf),
    "group_size": (2, math.inf),
    "epochs": (0, math.inf),
    "max_steps": (0, math.inf),
    "warmup": (0, 1),
    "weight_decay": (0, 1),
    "lora_r": (0, math.inf),
    "seed": (0, 2**32 - 1),
}
# the files of a folder that decide what a system is
MADE_OF = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.model")


def check_range(name: str, value: object) -> None:
    """Check a value of one of `RANGES`.

    Raises:
        InputError: it is not a number, or out of its range.
    """
    low, high = RANGES[name]
    if not isinstance(value, int | float) or not low <= value <= high:
        wanted = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise InputError(f"expected {name} {wanted}, got {value!r}")


def check_type(name: str, value: object, wanted: type, where: str = "") -> None:
    """Check that a value is of the type of its field; a whole number is a float, too, but no other number is whole.

    Raises:
        InputError: it is not; the message ends with `where`.
    """
    taken = float | int if wanted is float else wanted
    if not isinstance(value, taken) or (isinstance(value, bool) and wanted not in (bool, bool | None)):
        raise InputError(f"expected {getattr(wanted, '__name__', wanted)} as {name!r}, got {value!r}{where}")


@dataclass
class TrainConfig:
    """The settings of a training run; its record holds every field.

    system: a name in the table of systems, a Hub id or a folder. learning_rate: AdamW's peak, reached after `warmup` (a share
    of all steps) and then decaying linearly to 0. batch_size: queries per step, on all devices together. group_size: documents per
    query, 1 positive. epochs: passes over the training queries, may be fractional. max_steps: a cap on the steps, 0 for none.
    max_length, max_query_length: tokens. bf16: None lets the device decide. loss: "lce", or "distil" to imitate the scores of
    `teacher`, the folder of a trained reranker (KL divergence over the group). lora_r, lora_alpha: rank and scale of LoRA; rank 0 trains
    all weights. gradient_checkpointing: compute layers twice to save memory. compile: use torch.compile.
    """

    system: str
    learning_rate: float = 2e-5
    batch_size: int = 8
    group_size: int = 8
    epochs: float = 1.0
    max_steps: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_length: int = 512
    max_query_length: int = 50
    seed: int = 0
    bf16: bool | None = None
    loss: str = "lce"
    teacher: str | None = None
    lora_r: int = 0
    lora_alpha: int = 128
    gradient_checkpointing: bool = False
    compile: bool = False

    def settings(self) -> dict:
        """The fields by name, and what tells weights in a folder, of `system` or `teacher`, from those before it was trained anew."""
        return dataclasses.asdict(self) | weights_in(name for name in (self.system, self.teacher) if name is not None)

    def check(self, processes: int = 1) -> None:
        """Check the fields' types, and what these cannot express.

        Raises:
            InputError: a value is of another type, a number is out of its range, the processes cannot share the batch evenly, loss and
                teacher do not match, or the teacher is not a saved reranker.
        """
        for field in dataclasses.fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        for name in RANGES:
            check_range(name, getattr(self, name))
        if self.batch_size % processes:
            raise InputError(
                f"expected a batch_size that {processes} processes can share evenly, got {self.batch_size}; it counts the queries of "
                "a step on all of them together"
            )
        if self.loss not in ("lce", "distil"):
            raise InputError(f"expected loss 'lce' or 'distil', got {self.loss!r}")
        if (self.loss == "distil") != (self.teacher is not None):
            raise InputError(
                f"expected a teacher for loss 'distil' and none for 'lce', got loss={self.loss!r} and teacher={self.teacher!r}"
            )
        if self.teacher is not None:
            from ..reranking.saved import is_saved  # imports torch, and a study's parameters are checked without it

            if not is_saved(Path(self.teacher)):
                raise InputError(
                    f"expected the folder of a trained reranker as teacher, got {self.teacher!r}: the head of a system is new, so its "
                    "scores would be random; train it and name the folder of its model"
                )


def weights_in(systems: Iterable[str]) -> dict[str, dict]:
    """The SHA-256 of what those systems are made of that are folders or come with the repository, for a record's config: other weights,
    configurations or vocabularies change it."""
    found = {}
    for name in systems:
        for place in (Path(name), ROOT / "data" / "checkpoints" / name):
            if next(place.glob("*.safetensors"), None) is not None:
                found[name] = [sha256(path) for pattern in MADE_OF for path in sorted(place.glob(pattern))]
                break
    return {"weights_in": found} if found else {}


def read_config(path: str | Path) -> tuple[TrainConfig, dict]:
    """Read a YAML file: the fields of `TrainConfig`, and {"collection", "folder", "candidates" (a run's path, or None)}.

    Raises:
        InputError: there is no such file, or it lacks a name, has an unknown one, or a value of the wrong type.
    """
    path = Path(path)
    values = load_yaml(yaml_text(path), path)
    if not isinstance(values, dict):
        raise InputError(f"expected names and values, got {values!r:.80} ({path})")
    where = {"collection": str, "folder": str, "candidates": str}
    types = {field.name: field.type for field in dataclasses.fields(TrainConfig)} | where
    for name in ("system", "collection", "folder"):
        if name not in values:
            raise InputError(f"expected a value for {name!r}, got none ({path})")
    for name, value in values.items():
        if name not in types:
            raise InputError(f"expected names among {', '.join(types)}, got {name!r} ({path})")
        check_type(name, value, types[name], f" ({path})")
    config = TrainConfig(**{name: value for name, value in values.items() if name not in where})
    return config, {name: values.get(name) for name in where}
