"""Before a study at scale paper: what it fetches and where to, each run of the papers as one command, and how long it takes here.

The hours are extrapolated from a minute of measuring: one published backbone of each family is trained and scored on this device
(`profiling`), and the time per token is assumed to grow with the parameters. Every document is assumed to fill its pair, so the hours
are an upper bound.
"""

import itertools
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .parameters import read_scale

TELL = 1e9  # bytes; a study that fetches more says so and asks
MINUTE, MEASURED = 60.0, 512  # seconds of measuring, for all families together; tokens of the sequences
TOKENS_OF_A_DOCUMENT = 1300  # roughly, in MS MARCO, cut at what a token store keeps

# Of arXiv 2403.18276 (FirstP, 512 tokens) and the documents of arXiv 2412.14354 (LongP). Their tables were not seen: these are the
# checkpoints and lengths that their text, their code and readers' notes name, and the other sizes of the same families.
FIRSTP = 512
PAPER = (
    "bert-base bert-large roberta-base roberta-large electra-base electra-large deberta-v3-base deberta-v3-large "
    "modernbert-base modernbert-large t5-base t5-large flan-t5-base flan-t5-large bart-base bart-large "
    "opt-125m opt-350m opt-1.3b pythia-160m pythia-410m pythia-1b pythia-1.4b gpt2 llama-3.2-1b "
    "mamba-130m mamba-370m mamba-790m mamba-1.4b mamba2-130m mamba2-370m mamba2-780m mamba2-1.3b"
).split()
LONGP = (768, 1024, 1536, 4096)
LONG_SYSTEMS = "opt-125m opt-1.3b llama-3.2-1b mamba-130m mamba-370m mamba2-130m mamba2-370m mamba2-780m mamba2-1.3b".split()

# which published backbone stands in for a family; time is scaled by parameters
STAND_INS = {
    "opt-125m": ("opt",),
    "pythia-160m": ("gpt_neox", "gpt2", "llama"),
    "mamba-130m": ("mamba", "falcon_mamba"),
    "mamba2-130m": ("mamba2", "nemotron_h"),
    "bert-base": ("bert", "roberta", "electra", "deberta-v2", "modernbert", "t5", "bart"),
}


class Run(NamedTuple):
    """One row of a paper: a system and the tokens that it reads of a pair."""

    system: str
    max_length: int

    def command(self, scale: str, overrides: Mapping[str, object]) -> str:
        """The command that makes it."""
        settings = {"systems": f"[{self.system}]", "max_length": self.max_length} | {
            name: json.dumps(value, ensure_ascii=False) for name, value in overrides.items()
        }
        given = " ".join(f"-p {shlex.quote(f'{name}={value}')}" for name, value in settings.items())
        return f"python -m rankmamba.study --scale {scale} {given} --results results/{scale}/{self.system}-{self.max_length}"


class Rate(NamedTuple):
    """Tokens per second of a measured backbone, in training and in scoring."""

    training: float
    scoring: float


class Download(NamedTuple):
    """One file that a study needs: size in bytes, where it goes, whether it is there already."""

    url: str
    size: int
    place: Path
    there: bool


def paper_runs() -> list[Run]:
    """Every run of the two papers that its system has positions for."""
    from ..systems import SYSTEMS

    runs = [Run(system, FIRSTP) for system in PAPER]
    runs += [Run(system, length) for system in LONG_SYSTEMS for length in LONGP]
    return [run for run in runs if run.max_length <= (SYSTEMS[run.system].max_length or run.max_length)]


def downloads(collections: Iterable[str]) -> list[Download]:
    """List the files that ir_datasets fetches for some ids; our own collections have none.

    Raises:
        InputError: ir_datasets has no folder to keep files in.
    """
    from ..collection import download_of, import_ir_datasets

    ir_datasets = import_ir_datasets()

    found = {}
    for name in collections:
        for kind in ("docs", "queries", "qrels", "scoreddocs"):
            key, file = download_of(name, kind)
            if "cache_path" in file:
                place = ir_datasets.util.home_path() / name.split("/")[0] / file["cache_path"]
                found[key] = Download(file.get("url", key), file.get("size_hint", 0), place, place.exists())
    return list(found.values())


def parts(settings: dict) -> dict[str, tuple[str, ...]]:
    """The ids that a study with these settings reads, by what they are for: "train", "dev" and "test"."""
    from ..collection import UNIONS

    names = {part: f"{settings['collection']}/{part}" for part in ("train", "dev", "test")}
    return {part: UNIONS.get(name, (name,)) for part, name in names.items()}


def announce(settings: dict, yes: bool) -> None:
    """Before a study on a collection of gigabytes, say what it fetches and where to and how long it takes here, and ask.

    Smaller collections are passed over silently. yes: do not ask; without a terminal, only `yes` lets the study go on.

    Raises:
        InputError: the user did not agree, or it would read more of a document than is kept.
    """
    files = downloads(itertools.chain(*parts(settings).values()))
    if sum(file.size for file in files) < TELL:
        return
    _check_reach(settings)
    missing = [file for file in files if not file.there]
    rates = measure({stand_in(system) for system in settings["systems"]}, settings["group_size"])
    hours = sum(estimate(system, settings["max_length"], rates, *pairs(settings, system)) for system in settings["systems"])
    print("\n".join([*_to_fetch(missing), f"about {hours:,.1f} hours on {_device()}"]), file=sys.stderr)
    if yes or not missing:
        return
    if sys.stdin is not None and sys.stdin.isatty() and input("Fetch these files? [y/N] ").strip().lower() in ("y", "yes"):
        return
    raise InputError("expected to be allowed to fetch these files, got no yes; give --yes, or put them there by hand")


def _check_reach(settings: dict) -> None:
    """Check that the study reads no more of a document than a store of tokens keeps."""
    from ..data.token_store import LONGEST

    passage = settings["max_length"] - settings["max_query_length"]
    reach = passage + (settings["max_passages"] - 1) * passage // 2
    if reach > LONGEST:
        raise InputError(
            f"expected to read at most {LONGEST} tokens of a document of a large collection, got {reach}; choose a smaller max_length or "
            "fewer max_passages"
        )


def _to_fetch(missing: Sequence[Download]) -> list[str]:
    if not missing:
        return ["nothing to fetch but the checkpoints"]
    lines = [f"to fetch: {sum(file.size for file in missing) / 1e9:.1f} GB, and the checkpoints"]
    return lines + [f"  {file.size / 1e6:>9,.1f} MB  {file.url} -> {file.place}" for file in missing]


def dry_run(scale: str, settings: dict, overrides: Mapping[str, object]) -> str:
    """Say what a study at a scale fetches and keeps, and each run of the papers as a command with its hours and GB on this device.

    overrides: the parameters among `settings` that the user gave; each command has them, too.

    Raises:
        InputError: among them are systems or max_length, which each run has its own of.
    """
    files = downloads(itertools.chain(*parts(settings).values()))
    if not files:
        minutes = sum(read_scale(scale)["minutes"].values())
        return f"scale {scale}: about {minutes:.0f} minutes, as its file says; the papers' runs are those of scale paper"
    for name in {"systems", "max_length"} & set(overrides):
        raise InputError(f"expected no {name} for a list of the papers' runs, each of which has its own, got {overrides[name]}")
    training, scoring = pairs(settings)
    documents = _count(settings["collection"], "docs")
    lines = _to_fetch([file for file in files if not file.there])
    lines += [
        f"to keep beside it: about {2 * TOKENS_OF_A_DOCUMENT * documents / 1e9:.1f} GB of tokens for each vocabulary, twice that "
        "beyond 65,536 words, and the texts once more in ir_datasets' own store",
        f"each run: {training:,} pairs to train on, {scoring:,} to score",
        "",
    ]
    runs = paper_runs()
    rates = measure(dict.fromkeys(stand_in(run.system) for run in runs), settings["group_size"])
    lines += [f"measured on {_device()}, tokens/s in training and in scoring:"]
    lines += [f"  {name:<12} {rate.training:>11,.0f} {rate.scoring:>11,.0f}" for name, rate in rates.items()]
    lines += ["", "     hours      GB  command"]
    total = 0.0
    for run in runs:
        hours = estimate(run.system, run.max_length, rates, training, scoring)
        total += hours
        lines.append(f"{hours:>10,.1f} {gigabytes(run.system):>7.1f}  {run.command(scale, overrides)}")
    lines += ["", f"{total:,.0f} hours in all, one run after another; GB: the most that one takes while it trains"]
    lines += ["(notebook 06 then stores states, some GB to some tens, and says before it begins if there is no room)"]
    return "\n".join(lines)


def pairs(settings: dict, system: str = "default") -> tuple[int, int]:
    """Count the (query, document) pairs that one run, of a system, trains on and scores; of a document in passages each passage."""
    collection, batch = settings["collection"], settings["batch_size"]
    steps = int(settings["epochs"] * _count(f"{collection}/train", "qrels") / batch)
    caps = settings["max_steps"]
    cap = caps.get(system, caps["default"])
    steps = min(steps, cap) if cap else steps
    ids = parts(settings)
    queries = sum(
        min(settings[f"n_{part}"], sum(_count(name, "queries") for name in ids[part])) for part in ("dev", "test")
    )
    return steps * batch * settings["group_size"], queries * settings["top_k"] * settings["max_passages"]


def estimate(system: str, max_length: int, rates: dict[str, Rate], training: int, scoring: int) -> float:
    """Estimate a run's hours from its stand-in's rate: the time per token is assumed to grow with the parameters."""
    from ..backbones import find

    measured = stand_in(system)
    rate, millions = rates[measured], find(measured).millions
    slower = (find(system).millions or millions) / millions
    return max_length * slower * (training / rate.training + scoring / rate.scoring) / 3600


def gigabytes(system: str) -> float:
    """The most that a run's models take on the disk, in GB: the backbone, two checkpoints of the training and a third being written.

    A checkpoint has the weights, and AdamW's two moments of those that are trained: with LoRA, hardly any.
    """
    from ..systems import SYSTEMS

    spec = SYSTEMS[system]
    weights = 4 * spec.millions / 1e3
    return weights + 3 * (weights if spec.lora_r else 3 * weights)


def stand_in(system: str) -> str:
    """Return the system whose shape is measured for another."""
    from ..backbones import find

    model_type = find(system).family.model_type
    return next((name for name, families in STAND_INS.items() if model_type in families), "pythia-160m")


def measure(names: Iterable[str], group_size: int) -> dict[str, Rate]:
    """Train and score published backbones with random weights on this device, all of them in about a minute."""
    names = list(names)
    return {name: _measure(name, group_size, MINUTE / len(names)) for name in names}


def _measure(name: str, group_size: int, budget: float) -> Rate:
    from .. import profiling

    found = profiling.measure(name, MEASURED, group_size, group_size=group_size, repeats=3, seconds=budget / 4)
    if found["out_of_memory"]:
        raise InputError(f"expected memory for a group of {group_size} pairs of {MEASURED} tokens of {name}, got too little")
    return Rate(found["training"]["tokens_per_s"], found["inference"]["tokens_per_s"])


def _count(name: str, kind: str) -> int:
    """How many documents, queries or judgements ir_datasets says that an id has, without fetching anything."""
    import ir_datasets

    from ..data import embedded  # noqa: F401  registers rankmamba/...

    try:
        return ir_datasets.load(name).metadata()[kind]["count"]
    except KeyError as error:
        raise InputError(f"expected an id whose {kind} ir_datasets has counted, got {name!r}") from error


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"this CPU ({torch.get_num_threads()} threads)"
