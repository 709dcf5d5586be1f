"""The learning rate of every system, by the same search for each: `python -m rankmamba.learning_rates --scale quick`.

Every system of the scale is trained with every rate, otherwise by the scale's own recipe, and ranks the dev queries; no test query is
touched. The best rate is the one with the lowest loss over the last quarter of the steps: in the first pass over the training queries each
step's groups are new to the model, all rates see the same ones, and thousands of documents tell rates apart that a few hundred dev
queries cannot. Search over as many steps as the training will have: fewer favour higher rates. A search that was stopped
resumes where it was.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .batch.parameters import ROOT, parse_parameters, settle
from .candidates import candidates_of
from .collection import Collection, digest_of
from .errors import InputError
from .evaluate import PRIMARY, mean_interval, per_query
from .experiment import Experiment, progress
from .files import refusals
from .reranker import Reranker
from .results import environment, find_record, leave_record
from .train import TrainConfig, scale_config

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)


def last_quarter(curve: Sequence[dict]) -> float:
    """The mean loss over the last quarter of the steps."""
    losses = [row["loss"] for row in curve]
    return float(np.mean(losses[-max(1, len(losses) // 4) :]))


def measured_on(dev: Collection, reranker: Reranker, top_k: int) -> dict:
    """Rerank the `top_k` candidates of each query, BM25's where the collection has none: {"measure", "mean", "per_query"}."""
    run = reranker.rerank(candidates_of(dev), dev, top_k, show_progress_bar=True)
    values = per_query(run, dev.qrels, [PRIMARY])[PRIMARY]
    return {"measure": PRIMARY, "mean": float(values.mean()), "per_query": values.to_dict()}


def tried(experiment: Experiment, config: TrainConfig, top_k: int) -> dict:
    """Train with one rate and measure every dev query on the reranked `top_k`; returns the record, found again if done before.

    If the training diverged, its result is {"diverged": the reason}.
    """
    dev = experiment.split("dev")
    settings = config.settings() | {"top_k": top_k, "n_dev": len(dev.queries)}
    settings |= digest_of(f"{experiment.collection}/{part}" for part in ("train", "dev"))
    if record := find_record(experiment.folder, "learning_rate", system=config.system, collection=dev.name, config=settings):
        return record
    made = experiment.folder, "learning_rate", config.system, dev.name, experiment.scale, config.seed
    try:
        with progress(f"{config.system}, {config.learning_rate:g}") as on_step:
            loss = last_quarter(experiment.train(config, on_step)["result"]["curve"])
    except FloatingPointError as error:  # too high a rate is an answer too
        return leave_record(*made, settings, {"diverged": str(error)}, {}, environment())
    reranker = Reranker.from_pretrained(experiment.model_path(config.system))
    result = {"loss": loss} | measured_on(dev, reranker, top_k)
    return leave_record(*made, settings, result, {"seconds": reranker.cost.seconds}, environment() | reranker.setup)


def table(records: Sequence[dict]) -> pd.DataFrame:
    """One row per system and rate: the loss at the end, the mean on dev with its 95% interval, and whether it is the system's best.

    NaN where the training diverged.
    """
    rows = []
    for record in records:
        result, row = record["result"], (record["system"], record["config"]["learning_rate"])
        if "diverged" in result:
            rows.append((*row, *[math.nan] * 4))
        else:
            rows.append((*row, result["loss"], *mean_interval(np.array(list(result["per_query"].values())))))
    found = pd.DataFrame(rows, columns=["system", "learning rate", "loss", PRIMARY, "low", "high"])
    found["best"] = found["loss"] == found.groupby("system")["loss"].transform("min")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.learning_rates", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", default="quick", help="whose systems and recipe (default: quick)")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="override a parameter")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="where everything goes (default: results/<scale>)")
    options = parser.parse_args(arguments)
    try:
        given = settle(options.scale, None, parse_parameters(options.parameters))
        folder = (options.results or ROOT / "results" / options.scale) / "learning_rates"
        with refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
        records = []
        for rate in options.rates:
            experiment = Experiment(folder / f"{rate:g}", given["collection"], options.scale, given["seed"], n_dev=given["n_dev"])
            for system in given["systems"]:
                config = dataclasses.replace(scale_config(given, system), learning_rate=rate)
                records.append(tried(experiment, config, given["top_k"]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        table(records)
        .sort_values(["system", "learning rate"])
        .to_string(index=False, float_format="{:.5g}".format, na_rep="diverged")
    )
    print(
        f"\nbest: by loss, the mean over the last quarter of the steps. {PRIMARY} of {given['n_dev']} dev queries at most, "
        "with its 95% interval, in which each query counts as independent."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
