"""What one pre-training is worth: the published ones are taken as they are, others are made, nothing is done twice."""

import json

import numpy as np
import pandas as pd
import pytest

from rankmamba import pretraining_seeds
from rankmamba.collection import load
from rankmamba.errors import InputError
from rankmamba.evaluate import PRIMARY, per_query
from rankmamba.reranker import Reranker
from rankmamba.systems import CHECKPOINTS

RECIPE = [
    "-p",
    "collection=rankmamba/tiny",
    "-p",
    "max_steps={default: 2}",
    "-p",
    "systems=[nano-mamba-scratch]",
    "--then",
    "tiny",
]


def run(folder, capsys, *more) -> str:
    code = pretraining_seeds.main([*RECIPE, "--results", str(folder), *more])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def test_each_seed_is_pre_trained_and_fine_tuned_alike_and_measured_on_dev_and_a_second_run_does_nothing_again(tmp_path, capsys):
    printed = run(tmp_path, capsys, "--seeds", "1", "2")
    files = {path: path.read_bytes() for path in (tmp_path / "records").glob("pretraining-*.json")}
    one, two = sorted(map(json.loads, files.values()), key=lambda record: record["seed"])
    assert (one["seed"], two["seed"]) == (1, 2) and one["config"]["fine_tuning"] == two["config"]["fine_tuning"]
    assert one["result"]["pretraining_loss"] != two["result"]["pretraining_loss"]
    dev, folder = load("rankmamba/tiny/dev"), tmp_path / "nano-mamba-seed1"
    scores = Reranker.from_pretrained(folder / "fine-tuned").rerank(dev.candidates, dev, one["config"]["top_k"])
    assert one["result"]["per_query"] == pytest.approx(per_query(scores, dev.qrels, [PRIMARY])[PRIMARY].to_dict())
    curve = json.loads((folder / "checkpoints" / "nano-mamba" / "training.json").read_text())["result"]["curve"]
    assert one["result"]["pretraining_loss"] == curve[-1]["loss"]
    assert run(tmp_path, capsys, "--seeds", "1", "2") == printed
    assert {path: path.read_bytes() for path in files} == files
    elsewhere = [part.replace("rankmamba/tiny", "rankmamba/none") for part in RECIPE]
    assert pretraining_seeds.main([*elsewhere, "--results", str(tmp_path), "--seeds", "1"]) == 1  # not the record of another one


def test_a_pre_training_that_is_published_is_taken_and_one_of_another_recipe_is_not(tmp_path):
    given = pretraining_seeds.settle("pretrain", None, {})
    config = pretraining_seeds.scale_config(given, "nano-mamba-scratch")
    assert pretraining_seeds.pretrained(tmp_path, config, given["collection"]) == CHECKPOINTS / "nano-mamba"
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="rankmamba/none"):
        pretraining_seeds.pretrained(tmp_path / "elsewhere", config, "rankmamba/none")
    other = pretraining_seeds.dataclasses.replace(config, max_steps=1)
    assert pretraining_seeds.pretrained(tmp_path, other, "rankmamba/tiny") == tmp_path / "checkpoints" / "nano-mamba"


def test_spreads_tell_seeds_from_systems():
    values = pd.DataFrame({0: [0.5, 0.7], 1: [0.5, 0.7], 2: [0.5, 0.7]})
    assert pretraining_seeds.spreads(values) == pytest.approx((0, 0.02**0.5))
    assert pretraining_seeds.spreads(values.T) == pytest.approx((0.02**0.5, 0))


def test_systems_are_compared_query_by_query_over_all_their_pre_trainings():
    queries, draw = [f"q{n:02d}" for n in range(40)], np.random.default_rng(0)
    records = [
        {"system": system, "result": {"per_query": dict(zip(queries, draw.random(40) * 0.5 + better, strict=True))}}
        for system, better in (("nano-bert", 0.3), ("nano-mamba", 0.0))
        for _ in range(3)
    ]
    (pair,) = pretraining_seeds.pairs(records, {query_id: int(query_id[1:]) // 2 for query_id in queries}).to_dict("records")
    values = {r["system"]: [] for r in records}
    for record in records:
        values[record["system"]].append(np.mean(list(record["result"]["per_query"].values())))
    assert (pair["system"], pair["other"], pair["seeds"]) == ("nano-bert", "nano-mamba", "9 of 9")
    assert pair["difference"] == pytest.approx(np.mean(values["nano-bert"]) - np.mean(values["nano-mamba"]))
    assert pair["low"] < pair["difference"] < pair["high"] and pair["p_holm"] < 0.001


def test_a_system_that_does_not_exist_is_one_sentence(tmp_path, capsys):
    assert pretraining_seeds.main(["-p", "systems=[nano-nothing]", "--results", str(tmp_path)]) == 1
    assert "nano-nothing" in capsys.readouterr().err
