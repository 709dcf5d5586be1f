"""The search for a learning rate: on dev only, the same for every system, nothing done twice."""

import json
import math

import numpy as np
import pytest

from rankmamba import learning_rates, pretraining_seeds
from rankmamba.candidates import BM25
from rankmamba.collection import load
from rankmamba.data.formats import write_documents, write_qrels, write_queries
from rankmamba.evaluate import PRIMARY, per_query
from rankmamba.reranker import Reranker


def search(folder, capsys, *more) -> str:
    code = learning_rates.main(["--scale", "tiny", "-p", "systems=[tiny-mamba, tiny-bert]", "--results", str(folder), *more])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.fixture
def records(tmp_path):
    return lambda: {path: path.read_bytes() for path in tmp_path.rglob("records/learning_rate*.json")}


def test_every_system_is_tried_with_every_rate_on_dev_and_a_second_search_does_nothing_again(tmp_path, capsys, records):
    printed = search(tmp_path, capsys, "--rates", "0.001", "0.01")
    found = {(r["system"], r["config"]["learning_rate"]): r for r in map(json.loads, records().values())}
    assert set(found) == {(system, rate) for system in ("tiny-mamba", "tiny-bert") for rate in (0.001, 0.01)}
    dev = load("rankmamba/tiny/dev")
    assert all(set(r["result"]["per_query"]) == set(dev.queries) and r["collection"].endswith("/dev") for r in found.values())
    (folder,) = (tmp_path / "learning_rates" / "0.01").glob("models/tiny-mamba-*")
    run = Reranker.from_pretrained(folder).rerank(dev.candidates, dev, top_k=10)
    (trained,) = (tmp_path / "learning_rates" / "0.01" / "records").glob("train-tiny-mamba-*")
    losses = [row["loss"] for row in json.loads(trained.read_text())["result"]["curve"]]
    last = losses[-max(1, len(losses) // 4) :]
    assert found["tiny-mamba", 0.01]["result"]["loss"] == pytest.approx(sum(last) / len(last))
    mean = float(per_query(run, dev.qrels, [PRIMARY])[PRIMARY].mean())
    assert found["tiny-mamba", 0.01]["result"]["mean"] == pytest.approx(mean)
    before = records()
    assert search(tmp_path, capsys, "--rates", "0.001", "0.01") == printed and records() == before
    search(tmp_path, capsys, "--rates", "0.01", "-p", "systems=[tiny-mamba]", "-p", "top_k=3")
    assert len({path for path, content in records().items() if content != before[path]}) == 1  # another depth is measured anew


def test_the_best_rate_of_a_system_is_that_of_its_own_least_loss_and_never_one_that_diverged():
    def tried(system, rate, loss, *values):
        result = {"loss": loss, "per_query": dict(enumerate(values))} if values else {"diverged": "at step 1"}
        return {"system": system, "config": {"learning_rate": rate}, "result": result}

    records = [tried("a", 1e-3, 0.5, 0.2, 0.4), tried("a", 1e-2, 0.4, 0.1, 0.3), tried("a", 1, math.nan)]
    table = learning_rates.table([*records, tried("b", 1e-3, 0.2, 1.0, 0.5), tried("b", 1e-2, 0.3, 1.0, 1.0)])
    assert table["best"].tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(table[PRIMARY], [0.3, 0.2, math.nan, 0.75, 1.0])
    assert learning_rates.last_quarter([{"loss": loss} for loss in [9, 9, 9, 9, 9, 9, 1, 2]]) == 1.5
    assert learning_rates.last_quarter([{"loss": 9}, {"loss": 3}]) == 3


def test_a_rate_that_diverges_is_said_and_the_others_are_tried(tmp_path, capsys, records):
    for _ in range(2):
        printed = search(tmp_path, capsys, "-p", "systems=[tiny-mamba]", "--rates", "1e30", "0.01")
        assert [line.split()[2] == "diverged" for line in printed.splitlines()[1:3]] == [False, True]
        assert printed.splitlines()[1].endswith("True") and len(records()) == 2


def test_a_system_that_does_not_exist_is_one_sentence(tmp_path, capsys):
    assert learning_rates.main(["--scale", "tiny", "-p", "systems=[nano-nothing]", "--results", str(tmp_path)]) == 1
    assert "nano-nothing" in capsys.readouterr().err


def test_results_that_are_a_file_are_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in (learning_rates, pretraining_seeds):
        assert command.main(["--results", str(tmp_path / "file")]) == 1
        assert capsys.readouterr().err.startswith(f"error: expected to write {tmp_path / 'file'}")


def test_a_collection_of_ones_own_without_candidates_is_searched_on_those_of_bm25(tmp_path, capsys, records):
    for part in ("train", "dev"):
        split = load(f"rankmamba/tiny/{part}")
        write_documents(tmp_path / "own" / part / "documents.jsonl", split.documents.pairs())
        write_queries(tmp_path / "own" / part / "queries.tsv", split.queries)
        write_qrels(tmp_path / "own" / part / "qrels.txt", split.qrels)
    search(tmp_path, capsys, "-p", "systems=[tiny-mamba]", "-p", f"collection={tmp_path / 'own'}", "--rates", "0.01")
    (found,) = map(json.loads, records().values())
    dev = load(str(tmp_path / "own" / "dev"))
    (folder,) = (tmp_path / "learning_rates" / "0.01").glob("models/tiny-mamba-*")
    run = Reranker.from_pretrained(folder).rerank(BM25.build(dev.documents).search(dev.queries), dev, top_k=10)
    assert found["result"]["per_query"] == pytest.approx(per_query(run, dev.qrels)[PRIMARY].to_dict())
