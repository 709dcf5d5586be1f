"""How much one pre-training decides: every nano system pre-trained from several seeds, then fine-tuned alike.

`python -m rankmamba.pretraining_seeds` pre-trains each system of scale pretrain with every seed but the one that data/checkpoints has
(the seed draws the weights, the order of the queries and their negatives), fine-tunes all of them with one seed by the recipe of scale
quick, and ranks every dev query; no test query is touched. If systems differ by no more than the pre-trainings of one of them do, their
difference says nothing about the architectures. A run that was stopped resumes where it was.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from .batch.parameters import ROOT, parse_parameters, settle
from .collection import digest_of
from .errors import InputError
from .evaluate import PRIMARY, clusters
from .experiment import Experiment, progress
from .files import refusals
from .learning_rates import last_quarter, measured_on
from .pairwise import pairwise
from .pretrained import publish
from .reporting.tables import p_value
from .reranker import Reranker
from .results import environment, find_record, leave_record
from .systems import CHECKPOINTS, SCRATCH
from .train import TrainConfig, scale_config, train

SEEDS = (0, 1, 2, 3, 4)
WIKI = "rankmamba/wiki"


def pretrained(folder: Path, config: TrainConfig, collection: str) -> Path:
    """Return the checkpoint of a pre-training with this configuration: the published one if that is how it was made, else made here."""
    name = config.system.removesuffix(SCRATCH)
    published = CHECKPOINTS / name / "training.json"
    record = json.loads(published.read_text(encoding="utf-8")) if published.is_file() else {}
    if record.get("config") == dataclasses.asdict(config) and record.get("collection") == f"{collection}/train":
        return published.parent
    experiment = Experiment(folder, collection, "pretrain", config.seed)
    with progress(f"{name}, seed {config.seed}") as on_step:
        experiment.train(config, on_step)
    (checkpoint,) = publish(folder, folder / "checkpoints")
    return checkpoint


def tried(folder: Path, before: TrainConfig, collection: str, after: TrainConfig, study: Experiment, top_k: int) -> dict:
    """Pre-train on `collection`, fine-tune as `study` does, and measure every dev query on the reranked `top_k`.

    Returns the record, found again if done before; the models stay in a folder of their own below `folder`.
    """
    settings = {"pretraining": dataclasses.asdict(before), "fine_tuning": dataclasses.asdict(after), "top_k": top_k}
    settings |= digest_of([f"{collection}/train", f"{study.collection}/train", f"{study.collection}/dev"])
    if collection != WIKI:  # records of before 2026-11-29 do not say it
        settings["collection"] = collection
    if record := find_record(folder, "pretraining", collection=f"{study.collection}/dev", config=settings):
        return record
    models = folder / f"{after.system}-seed{before.seed}"
    checkpoint = pretrained(models, before, collection)
    with progress(f"{after.system} of seed {before.seed}, fine-tuning") as on_step:
        config = dataclasses.replace(after, system=str(checkpoint))
        trained = train(config, study.split("train"), models / "fine-tuned", on_step=on_step)
    dev, reranker = study.split("dev"), Reranker.from_pretrained(models / "fine-tuned")
    curve = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["result"]["curve"]
    losses = {"pretraining_loss": last_quarter(curve), "loss": last_quarter(trained.curve)}
    result = losses | measured_on(dev, reranker, top_k)
    made = folder, "pretraining", after.system, dev.name, study.scale, before.seed
    return leave_record(*made, settings, result, {"seconds": reranker.cost.seconds}, environment() | reranker.setup)


def table(records: Sequence[dict]) -> pd.DataFrame:
    """One row per system: for each seed the loss over the last quarter of its pre-training and the mean on dev after fine-tuning."""
    rows = pd.DataFrame(
        [(r["system"], r["seed"], r["result"]["pretraining_loss"], r["result"]["mean"]) for r in records],
        columns=["system", "seed", "loss", PRIMARY],
    )
    found = rows.pivot(index="system", columns="seed", values=["loss", PRIMARY])
    return found.loc[found[PRIMARY].mean(axis=1).sort_values(ascending=False).index]


def pairs(records: Sequence[dict], shared: Mapping[str, int]) -> pd.DataFrame:
    """Compare all systems pair by pair (`pairwise.pairwise`): the seeds of its intervals are those of the pre-trainings."""
    values: dict[str, list[pd.DataFrame]] = {}
    for record in records:
        table = pd.DataFrame({PRIMARY: record["result"]["per_query"]}).sort_index()
        values.setdefault(record["system"], []).append(table)
    return pairwise(values, list(combinations(values, 2)), shared=shared)


def spreads(values: pd.DataFrame) -> tuple[float, float]:
    """Standard deviations of the values (systems, seeds): between the seeds of one system, pooled, and between the systems' means."""
    return float(np.sqrt(values.var(axis=1, ddof=1).mean())), float(values.mean(axis=1).std(ddof=1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.pretraining_seeds", description=__doc__.split("\n")[0])
    parser.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="override one of scale pretrain"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of the pre-trainings (default: %(default)s)")
    parser.add_argument("--then", default="quick", help="the scale whose recipe fine-tunes them (default: quick)")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results" / "pretraining_seeds",
        help="where everything goes (default: results/pretraining_seeds)",
    )
    options = parser.parse_args(arguments)
    try:
        before, then = settle("pretrain", None, parse_parameters(options.parameters)), settle(options.then, None, {})
        study, records = Experiment(options.results, then["collection"], options.then, then["seed"]), []
        with refusals(options.results):
            options.results.mkdir(parents=True, exist_ok=True)
        for seed in dict.fromkeys(options.seeds):
            for system in before["systems"]:
                config = dataclasses.replace(scale_config(before, system), seed=seed)
                after = scale_config(then, system.removesuffix(SCRATCH))
                records.append(tried(options.results, config, before["collection"], after, study, then["top_k"]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = table(records)
    print(found.to_string(float_format="{:.3f}".format))
    if len(before["systems"]) > 1:
        compared = pairs(records, clusters(study.split("dev").qrels)).drop(columns=["effect", "detectable"])
        compared["p_holm"] = compared["p_holm"].map(p_value)
        print("\n" + compared.to_string(index=False, float_format="{:.3f}".format))
        print("p is about other queries; the intervals are about other pre-trainings, too: go by these")
    if len(set(options.seeds)) > 1 and len(before["systems"]) > 1:
        within, between = spreads(found[PRIMARY])
        print(f"\nstandard deviation of {PRIMARY}: {within:.3f} between the seeds of a system, {between:.3f} between systems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
