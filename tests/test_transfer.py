"""A trained system elsewhere: measured as it is, once, by domain and by where the answer stands."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest

from rankmamba import transfer
from rankmamba.collection import load
from rankmamba.data.formats import write_documents, write_qrels, write_queries
from rankmamba.data.runs import write_run
from rankmamba.errors import InputError
from rankmamba.evaluate import per_query
from rankmamba.experiment import Experiment
from rankmamba.reranker import Reranker
from rankmamba.results import read_records
from rankmamba.train import TrainConfig

CONFIG = TrainConfig("tiny-mamba", 1e-2, batch_size=2, group_size=4, max_steps=2, max_length=64, max_query_length=24)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    experiment = Experiment(tmp_path_factory.mktemp("study"), "rankmamba/tiny", "tiny")
    experiment.train(CONFIG)
    return experiment


def test_a_transfer_is_the_trained_model_at_another_length_on_another_collection(experiment):
    record = transfer.transfer(experiment, "tiny-mamba", "rankmamba/tiny/dev", 96, top_k=1)
    dev, reranker = load("rankmamba/tiny/dev"), Reranker.from_pretrained(experiment.model_path("tiny-mamba"), max_length=96)
    reranked = reranker.rerank(dev.candidates, dev, 1)
    run = pd.concat([reranked, dev.candidates[dev.candidates["rank"] > 1]])  # behind it the first stage's order
    assert not per_query(run, dev.qrels).equals(per_query(reranked, dev.qrels))
    assert record["result"]["per_query"] == per_query(run, dev.qrels).to_dict()
    assert record["result"]["first_stage"]["per_query"] == per_query(dev.candidates, dev.qrels).to_dict()
    assert (record["system"], record["collection"]) == ("tiny-mamba, 96 tokens", "rankmamba/tiny/dev")


def test_a_transfer_is_done_once_and_other_readings_stand_beside_it(experiment, monkeypatch):
    first = transfer.transfer(experiment, "tiny-mamba", "rankmamba/tiny/test", 48, 3, top_k=5)
    assert first["system"] == "tiny-mamba, MaxP, 3 x 48 tokens"
    other = transfer.transfer(experiment, "tiny-mamba", "rankmamba/tiny/test", 48, top_k=5)
    assert other["system"] == "tiny-mamba, 48 tokens"
    monkeypatch.setattr(Reranker, "rerank", lambda *args, **kwargs: pytest.fail("reranked again"))
    again = transfer.transfer(experiment, "tiny-mamba", "rankmamba/tiny/test", 48, 3, top_k=5)
    assert again["result"] == first["result"]
    with pytest.raises(InputError, match="tiny-bert"):
        transfer.transfer(experiment, "tiny-bert", "rankmamba/tiny/test", 48)


def test_a_transfer_with_another_setting_model_or_collection_is_done_anew(experiment, tmp_path, monkeypatch):
    shutil.copytree(experiment.folder, tmp_path / "study")
    copied, calls, own = Experiment(tmp_path / "study", "rankmamba/tiny", "tiny"), [], tmp_path / "own"
    tiny = load("rankmamba/tiny/test")
    write_documents(own / "documents.jsonl", tiny.documents.pairs())
    write_queries(own / "queries.tsv", tiny.queries)
    write_qrels(own / "qrels.txt", tiny.qrels)
    write_run(own / "candidates.run", tiny.candidates, "bm25")

    def rerank(self, *arguments, _rerank=Reranker.rerank, **options):
        calls.append(arguments)
        return _rerank(self, *arguments, **options)

    def done(**settings):
        before = len(calls)
        transfer.transfer(copied, "tiny-mamba", str(own), 48, **{"n_queries": 4, "top_k": 3} | settings)
        return len(calls) > before

    monkeypatch.setattr(Reranker, "rerank", rerank)
    assert done() and not done()
    assert done(top_k=2) and done(n_queries=3) and done()
    copied.train(dataclasses.replace(CONFIG, learning_rate=2e-2))
    assert done() and not done()
    write_queries(own / "queries.tsv", {query_id: f"{text} indeed" for query_id, text in tiny.queries.items()})
    assert done() and not done()


def test_a_collection_without_candidates_is_refused_before_a_model_is_loaded(experiment, tmp_path, monkeypatch):
    tiny = load("rankmamba/tiny/test")
    write_documents(tmp_path / "documents.jsonl", tiny.documents.pairs())
    write_queries(tmp_path / "queries.tsv", tiny.queries)
    write_qrels(tmp_path / "qrels.txt", tiny.qrels)
    monkeypatch.setattr(Reranker, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(InputError, match="add a candidates.run to it"):
        transfer.transfer(experiment, "tiny-mamba", str(tmp_path), 48)


def test_a_system_is_read_only_as_far_as_it_has_positions(monkeypatch):
    monkeypatch.setattr(transfer, "transfer", lambda experiment, *read: read)
    found = transfer.everywhere(None, ["minilm-l6", "nano-mamba"], ["a", "b"], [[512, 4], [1024, 1]], 5, 20)
    for collection in ("a", "b"):
        read = [("minilm-l6", collection, 512, 4), ("nano-mamba", collection, 512, 4), ("nano-mamba", collection, 1024, 1)]
        assert found[collection] == [(*each, 5, 20) for each in read]


def record(system, values, seed=0):
    first = {query_id: 0.5 for query_id in values}
    return {
        "system": system,
        "seed": seed,
        "result": {"per_query": {"RR@100": values}, "first_stage": {"per_query": {"RR@100": first}}},
    }


RECORDS = [
    record("a", {"nyt-1": 1.0, "nyt-2": 0.5, "wiki-1": 0.25, "wiki-2": 0.75}),
    record("a", {"nyt-1": 0.0, "nyt-2": 0.5, "wiki-1": 0.25, "wiki-2": 0.25}, seed=1),
]


def test_domains_are_told_apart_by_the_first_word_of_a_query_id_over_seeds():
    table = transfer.by_domain(RECORDS).set_index(["domain", "system"])
    assert table.loc[("nyt", "a"), "mean"] == pytest.approx(0.5) and table.loc[("wiki", "a"), "mean"] == pytest.approx(0.375)
    assert (table.xs("bm25", level="system")["mean"] == 0.5).all() and (table["queries"] == 2).all()
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).all()
    plain = transfer.by_domain([record("a", {"1037798": 1.0, "1110199": 0.5})])
    assert plain["domain"].tolist() == ["all", "all"] and (plain["queries"] == 2).all()
    many = transfer.by_domain([record("a", {f"{number:08x}-4d2a": 0.5 for number in range(9)})])
    assert many["domain"].tolist() == ["all", "all"] and (many["queries"] == 9).all()


def test_answers_are_binned_by_the_words_before_them_and_every_query_is_in_one_bin():
    starts = {"nyt-1": 0, "nyt-2": 128, "wiki-1": 127, "wiki-2": 5000}
    table = transfer.by_start(RECORDS, starts)
    ours = table[table["system"] == "a"].set_index("words before the answer")
    assert list(ours.index) == ["0 to 127", "128 to 255", "1024 and more"] and ours["queries"].tolist() == [2, 1, 1]
    assert np.allclose(ours["mean"], [(0.5 + 0.25) / 2, 0.5, 0.5])


def test_the_readable_table_has_a_row_a_reading_and_system_and_a_column_a_group():
    values = {"wiki-1": 1.0, "wiki-2": 0.5, "nyt-1": 0.25}
    table = transfer.readable(transfer.by_domain([record("x, 512 tokens", values), record("x, MaxP, 4 x 512 tokens", values)]))
    assert list(table.index) == [("", "bm25"), ("512 tokens", "x"), ("MaxP, 4 x 512 tokens", "x")]
    assert list(table.columns) == ["nyt (n=1)", "wiki (n=2)"]
    assert table.loc[("512 tokens", "x"), "nyt (n=1)"].startswith("0.250 [") and table.notna().all(axis=None)


def test_readings_stand_in_order_beside_the_first_stage_and_only_beginnings_have_tokens():
    def read(collection, tokens, passages=1, value=0.25):
        made = record(f"a, {transfer.reading(tokens, passages)}", {"wiki-1": value, "wiki-2": value})
        return made | {"collection": collection, "config": {"max_length": tokens, "max_passages": passages}}

    long, short = "rankmamba/squad-long/600/test", "rankmamba/squad/test"
    table = transfer.by_reading([read(long, 512, 4, value=0.5), read(long, 1024, value=0.75), read(long, 512), read(short, 512)])
    assert list(dict.fromkeys(table["collection"])) == [short, long]
    ours = table[(table["system"] == "a") & table["tokens"].notna()].set_index(["collection", "tokens"])["mean"].to_dict()
    assert ours == {(short, 512): 0.25, (long, 512): 0.25, (long, 1024): 0.75}
    assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
    wide = transfer.side_by_side(table)
    assert [read for _, read in wide.columns] == ["512 tokens", "512 tokens", "1024 tokens", "MaxP, 4 x 512 tokens"]
    assert wide.loc["a"].tolist() == ["0.250", "0.250", "0.750", "0.500"] and set(wide.loc["bm25"]) == {"0.500"}


def test_gains_are_of_the_same_queries_read_at_both_lengths():
    def read(system, tokens, values, passages=1):
        made = record(f"{system}, {transfer.reading(tokens, passages)}", dict(zip("abcd", values, strict=True)))
        return made | {"collection": "rankmamba/x/test", "config": {"max_length": tokens, "max_passages": passages}}

    records = [read("s", 512, [0.1, 0.2, 0.3, 0.4]), read("s", 1024, [0, 0, 0, 0]), read("s", 2048, [0.35, 0.45, 0.55, 0.65])]
    others = [read("once", 512, [0.1] * 4), read("s", 512, [1.0] * 4, passages=4)]
    table = transfer.gains([*records, *others])
    assert table.to_dict() == {"x/test, 2,048 instead of 512 tokens": {"s": "+0.250 [+0.250, +0.250]"}}
    assert transfer.gains(others).empty


def test_the_verdict_elsewhere_reads_documents_as_in_training_and_as_far_as_was_tried_and_says_who_is_better():
    rng = np.random.default_rng(0)
    systems = {"a-bert": ("none", "sdpa", 0.6), "a-mamba": ("native", "none", 0.4), "b-mamba": ("native", "none", 0.6)}
    trainings = [
        {"kind": "train", "system": system, "environment": {"scan": scan, "attention": attention}}
        for system, (scan, attention, _) in systems.items()
    ]

    def record(system, mean, length, passages=1):
        config = {"max_length": length, "max_passages": passages}
        values = {f"q{i}": value for i, value in enumerate(mean + rng.normal(0, 0.1, 200))}
        result = {"per_query": {"RR@100": values}, "first_stage": {"per_query": {"RR@100": values}}}
        name = f"{system}, {transfer.reading(length, passages)}"
        return {"system": name, "collection": "rankmamba/x", "config": config, "result": result}

    records = [record(system, mean, 64) for system, (_, _, mean) in systems.items()]
    between = [record(system, mean, 128) for system, (_, _, mean) in systems.items()] + [record("a-mamba", 0.9, 32, 4)]
    longer = [record(system, 1 - mean, 1280) for system, (_, _, mean) in systems.items()]
    pairs = [("a-bert", "a-mamba"), ("a-bert", "b-mamba")]
    _, *said = transfer.verdict(records + between + longer, pairs, trainings).splitlines()[1:]
    expected = [
        "- x, 64 tokens, 200 queries, seeds: 1; the Transformer is better in 1, the state-space model in 0 of 2: a-bert over a-mamba",
        "- x, 1,280 tokens, 200 queries, seeds: 1; the Transformer is better in 0, the state-space model in 1 of 2: a-mamba over a-bert",
    ]
    assert [line.partition(" +0.")[0] for line in said] == expected
    assert transfer.verdict(records, [], trainings) == transfer.verdict([], pairs, trainings) == ""


def test_transfers_of_a_collection_are_of_the_same_queries_and_documents_and_others_give_way(experiment, tmp_path):
    shutil.copytree(experiment.folder, tmp_path / "study")
    copied = Experiment(tmp_path / "study", "rankmamba/tiny", "tiny")
    for earlier in (copied.folder / "records").glob("transfer-*"):  # of other tests
        earlier.unlink()

    def left(collection, length, **settings):
        transfer.transfer(copied, "tiny-mamba", f"rankmamba/tiny/{collection}", length, **settings)
        return {(r["collection"].rpartition("/")[2], r["config"]["max_length"]) for r in read_records(copied.folder, "transfer")}

    dev = left("dev", 40, n_queries=4, top_k=3)
    assert left("test", 40, n_queries=4, top_k=3) == dev | {("test", 40)}
    assert left("test", 48, n_queries=4, top_k=3) == dev | {("test", 40), ("test", 48)}
    assert left("test", 48, n_queries=3, top_k=3) == dev | {("test", 48)}
    assert left("test", 40, n_queries=3, top_k=2) == dev | {("test", 40)}


def test_the_verdict_elsewhere_is_of_the_mean_over_all_seeds():
    def read(system, value, seed):
        values = {f"q{place}": value + place % 5 / 50 for place in range(60)}
        made = record(f"{system}, {transfer.reading(64)}", values, seed)
        return made | {"collection": "rankmamba/x", "config": {"max_length": 64, "max_passages": 1}}

    kinds = {"a-bert": ("none", "sdpa"), "a-mamba": ("native", "none")}
    trainings = [
        {"kind": "train", "system": system, "environment": {"scan": scan, "attention": attention}}
        for system, (scan, attention) in kinds.items()
    ]
    records = [read("a-bert", 0.7, 0), read("a-bert", 0.1, 1), read("a-mamba", 0.2, 0), read("a-mamba", 0.2, 1)]
    (said,) = transfer.verdict(records, [("a-bert", "a-mamba")], trainings).splitlines()[2:]
    assert "60 queries, seeds: 2; " in said and "is better in 0, the state-space model in 0 of 1" in said
