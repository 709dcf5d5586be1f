"""What an experiment says of its runs."""

import copy
import shutil
import threading

import ir_measures
import pandas as pd
import pytest

from rankmamba import study
from rankmamba.collection import Collection, load
from rankmamba.data.formats import write_documents, write_qrels, write_queries
from rankmamba.data.runs import read_run, write_run
from rankmamba.errors import InputError
from rankmamba.evaluate import clusters, per_query
from rankmamba.experiment import Experiment
from rankmamba.interpolation import interpolate_tuned, weight_values
from rankmamba.reporting.tables import measured
from rankmamba.reranker import Reranker
from rankmamba.results import read_records
from rankmamba.states.trials import trial
from rankmamba.train import TrainConfig

TINY = dict(max_steps=1, group_size=2, batch_size=2, max_length=64, max_query_length=16)


@pytest.mark.parametrize(
    "places, counted", [((1, 3, 2, None), (1, 1, 1, 1)), ((2, 2, 2, None), (0, 3, 0, 0)), ((1, None, 2, None), (1, 2, 0, 1))]
)
def test_a_query_has_moved_as_its_first_relevant_document_has_and_keeps_its_place_behind_those_reranked(
    places, counted, tmp_path
):
    experiment = Experiment(tmp_path, "rankmamba/tiny", "tiny", 0, 4, 12)
    test = experiment.split("test")
    relevant = test.qrels[test.qrels["relevance"] > 0].groupby("query_id")["doc_id"].first()

    def run(where):
        rows = []
        for (query_id, doc_id), place in zip(relevant.items(), where, strict=False):
            others = [other for other in test.documents if other not in set(test.qrels["doc_id"])][:2]
            documents = [*others[: place - 1], doc_id, *others[place - 1 :]] if place else others
            rows += [(query_id, document, 1.0 - rank, rank) for rank, document in enumerate(documents, 1)]
        return pd.DataFrame(rows, columns=["query_id", "doc_id", "score", "rank"])

    for system, where in (("bm25", (2, 2, 2, None)), ("tiny-mamba", places)):
        path = experiment.run_path(system, "test")
        path.parent.mkdir(exist_ok=True)
        write_run(path, run(where), system)
    moves = experiment.moves(["tiny-mamba"])
    assert tuple(moves.loc["tiny-mamba"]) == counted and tuple(moves.loc["bm25"]) == (0, 3, 0, 0)


def own(folder, rotated=0):
    """The tiny collection as a folder of one's own, each query with the judgements of another where `rotated`."""
    for part in ("train", "dev", "test"):
        tiny = load(f"rankmamba/tiny/{part}")
        (folder / part).mkdir(parents=True)
        texts = list(tiny.queries.values())
        write_documents(folder / part / "documents.jsonl", tiny.documents.pairs())
        write_queries(folder / part / "queries.tsv", dict(zip(tiny.queries, texts[rotated:] + texts[:rotated], strict=True)))
        write_qrels(folder / part / "qrels.txt", tiny.qrels)
    return str(folder)


def test_a_folder_of_results_is_for_one_collection(tmp_path, capsys):
    Experiment(tmp_path / "results", own(tmp_path / "mine"), "tiny").first_stage("bm25", 0.9, 0.4)
    with pytest.raises(InputError, match="expected results of rankmamba/tiny in .*, got those of .*mine; give another folder"):
        Experiment(tmp_path / "results", "rankmamba/tiny", "tiny")
    before = tmp_path / "results" / "notebooks" / "01_data.ipynb"
    before.parent.mkdir()
    before.write_text("as executed on mine")
    assert study.main(["--scale", "tiny", "--only", "01", "--results", str(tmp_path / "results")]) == 1
    assert "got those of" in capsys.readouterr().err and before.read_text() == "as executed on mine"


def test_a_collection_of_ones_own_that_was_edited_is_ranked_anew(tmp_path):
    once = Experiment(tmp_path / "results", own(tmp_path / "mine"), "tiny").first_stage("bm25", 0.9, 0.4)
    again = Experiment(tmp_path / "results", str(tmp_path / "mine"), "tiny").first_stage("bm25", 0.9, 0.4)
    assert again == once
    Experiment(tmp_path / "results", str(tmp_path / "mine"), "tiny").train(TrainConfig("tiny-mamba", **TINY))
    shutil.rmtree(tmp_path / "mine")
    edited = Experiment(tmp_path / "results", own(tmp_path / "mine", rotated=1), "tiny")
    with pytest.raises(InputError, match="as it is now, got one of before an edit; run 01_data again"):
        edited.evaluate("bm25")
    with pytest.raises(InputError, match="as it is now, got one of before an edit; run 02_train again"):
        edited.trained("tiny-mamba")
    assert edited.first_stage("bm25", 0.9, 0.4)["config"] != once["config"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    experiment = Experiment(tmp_path_factory.mktemp("study"), "rankmamba/tiny", "tiny", 0, 2, 8)
    experiment.first_stage("bm25", 0.9, 0.4)
    experiment.train(TrainConfig("tiny-mamba", **TINY))
    experiment.rerank("tiny-mamba", "bm25", 3, False)
    return experiment


def test_a_system_is_measured_with_the_first_stages_order_behind_what_it_reranked_and_mixed_by_the_weights_of_dev(trained):
    test, dev = trained.split("test"), trained.split("dev")
    ours, first = trained.run("tiny-mamba", "test"), trained.run("bm25", "test")
    whole = per_query(pd.concat([ours, first[first["rank"] > 3]]), test.qrels)
    assert not whole.equals(per_query(ours, test.qrels))
    assert trained.evaluate("tiny-mamba")["result"] == measured(whole, clusters(test.qrels))
    values = weight_values(trained.run("tiny-mamba", "dev"), trained.run("bm25", "dev"), dev.qrels, "nDCG@10")
    mixed, weights = interpolate_tuned(ours, first, test.qrels, values, "nDCG@10")
    record = trained.evaluate("tiny-mamba", "bm25", "nDCG@10")
    assert record["result"]["per_query"] == measured(per_query(mixed, test.qrels))["per_query"]
    assert record["result"]["weights"] == weights and record["system"] == "tiny-mamba + bm25"
    table = trained.weight_tables(["tiny-mamba", "tiny-bert"])["tiny-mamba"]
    assert table["value"].tolist() == values.mean().tolist() and table["weight"].tolist() == list(values)
    assert record["result"]["dev"]["alone"]["nDCG@10"] == table["value"].iloc[-1]


def test_the_run_behind_a_row_of_the_table_gives_other_tools_the_values_of_the_row(trained):
    qrels = trained.split("test").qrels
    for record in (trained.evaluate("bm25"), trained.evaluate("tiny-mamba"), trained.evaluate("tiny-mamba", "bm25")):
        ours = {name: measure["mean"] for name, measure in record["result"]["measures"].items()}
        run = list(ir_measures.read_trec_run(str(trained.run_path(record["system"], "evaluated"))))
        theirs = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in ours], qrels, run)
        assert {str(measure): value for measure, value in theirs.items()} == pytest.approx(ours)


def test_equal_scores_keep_their_places_in_other_tools(trained, tmp_path):
    experiment = copy.copy(trained)
    experiment.folder = tmp_path / "copy"
    shutil.copytree(trained.folder, experiment.folder)
    path = experiment.run_path("tiny-mamba", "test")
    write_run(path, read_run(path).assign(score=0.0), "tied")
    record = experiment.evaluate("tiny-mamba")
    ours = {name: measure["mean"] for name, measure in record["result"]["measures"].items()}
    kept = list(ir_measures.read_trec_run(str(experiment.run_path("tiny-mamba", "evaluated"))))
    theirs = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in ours], experiment.split("test").qrels, kept)
    assert {str(measure): value for measure, value in theirs.items()} == pytest.approx(ours)


def test_side_by_side_are_the_documents_of_the_query_that_is_ranked_most_differently_and_the_relevant_ones_have_a_tick(trained):
    test, systems = trained.split("test"), ["bm25", "tiny-mamba"]
    text, table = trained.side_by_side(systems, top=3)
    (query_id,) = (query_id for query_id, query in test.queries.items() if query == text)
    relevant = test.qrels[test.qrels["relevance"] > 0]
    runs = {system: trained.run(system, "test") for system in systems}
    best = {
        system: 1 / run.merge(relevant, on=["query_id", "doc_id"]).groupby("query_id")["rank"].min()
        for system, run in runs.items()
    }
    differences = (best["bm25"] - best["tiny-mamba"]).abs()
    assert differences[query_id] == differences.max() > 0
    judged = set(relevant.loc[relevant["query_id"] == query_id, "doc_id"])
    places = runs["bm25"][runs["bm25"]["query_id"] == query_id].set_index("doc_id")["rank"]
    for system, run in runs.items():
        for doc_id, rank in run[run["query_id"] == query_id].head(3)[["doc_id", "rank"]].itertuples(index=False):
            cell = table.loc[rank, system]
            assert cell.startswith("✓ ") == (doc_id in judged) and cell.endswith(f"(bm25: {places[doc_id]})")
            assert test.documents[doc_id][:20] in cell


def test_a_querys_words_are_those_of_its_longest_relevant_document(tmp_path):
    write_documents(
        tmp_path / "own/test/documents.jsonl", {"d1": "one two", "d2": "one two three", "d3": "one " * 9, "d4": "one"}
    )
    write_queries(tmp_path / "own/test/queries.tsv", {"q1": "x", "q2": "x", "q3": "x"})
    rows = [("q1", "d1", 1), ("q1", "d2", 2), ("q1", "d3", 0), ("q2", "d1", 1), ("q3", "d4", 1)]
    write_qrels(tmp_path / "own/test/qrels.txt", pd.DataFrame(rows, columns=["query_id", "doc_id", "relevance"]))
    result = Experiment(tmp_path / "results", str(tmp_path / "own"), "tiny").describe_queries()["result"]
    assert result["words"] == {"q1": 3, "q2": 2, "q3": 1}
    assert result["clusters"]["q1"] == result["clusters"]["q2"] != result["clusters"]["q3"]


def test_seeds_have_first_stages_models_and_runs_of_their_own(trained):
    other = Experiment(trained.folder, "rankmamba/tiny", "tiny", 1, 2, 8)
    assert trained.first_stages() == ["bm25"] and other.first_stages() == []
    for call in (lambda: other.run("bm25", "test"), lambda: other.trained("tiny-mamba")):
        with pytest.raises(InputError, match="seed1.* found none"):
            call()


def test_a_trial_takes_as_many_steps_as_it_is_given_and_replaces_nothing(trained):
    before, stop = trained.trained("tiny-mamba"), threading.Event()
    queries = len(trained.split("train").queries)
    config = TrainConfig("tiny-mamba", **TINY | {"max_steps": queries, "learning_rate": 1e-3})
    assert trained.trial(config, lambda row: stop.set(), stop)["result"]["partial"]
    record = trained.trial(config)
    assert record["result"]["steps"] == queries and trained.trained("tiny-mamba") == before
    assert not record["result"]["partial"] and trained.trial(config) == record
    assert trained.trial(TrainConfig("tiny-mamba", **TINY)) == before
    assert [found["result"]["steps"] for found in trained.runs()] == [1, queries]


def test_another_first_stage_or_training_is_reranked_anew_and_nothing_is_measured_on_the_run_before_it(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "study")
    experiment = Experiment(tmp_path / "study", "rankmamba/tiny", "tiny", 0, 2, 8)

    def reranked():
        record, run = experiment.rerank("tiny-mamba", "bm25", 3, False), experiment.run("tiny-mamba", "test")
        head = experiment.run("bm25", "test").query("rank <= 3")
        assert set(zip(run["query_id"], run["doc_id"], strict=True)) == set(zip(head["query_id"], head["doc_id"], strict=True))
        return record

    def evaluated():
        return {record["system"] for record in read_records(experiment.folder, "evaluate")}

    once = reranked()
    assert reranked() == once
    for system, mixed_with in (("bm25", None), ("tiny-mamba", None), ("tiny-mamba", "bm25")):
        experiment.evaluate(system, mixed_with)
    experiment.first_stage("bm25", 0.9, 0.4)
    assert evaluated() == {"bm25", "tiny-mamba", "tiny-mamba + bm25"}
    experiment.first_stage("bm25", 5.0, 1.0)
    for train_anew in (False, True):
        if train_anew:
            experiment.train(TrainConfig("tiny-mamba", **TINY | {"learning_rate": 1e-2}))
        assert evaluated() == ({"bm25"} if train_anew else set())
        with pytest.raises(InputError, match="from the candidates of bm25 as they are now.* run 03_rerank again"):
            experiment.evaluate("tiny-mamba")
        once, before = reranked(), once
        assert once["config"] != before["config"]
        experiment.evaluate("tiny-mamba")
        experiment.evaluate("bm25")
    experiment.rerank("tiny-mamba", "bm25", 2, False)
    assert evaluated() == {"bm25"}


def test_a_run_of_another_number_of_queries_is_not_measured(trained):
    every = len(load("rankmamba/tiny/test").queries)
    for n_test in (5, every, None):
        other = Experiment(trained.folder, "rankmamba/tiny", "tiny", 0, 2, n_test)
        with pytest.raises(InputError, match=f"of {n_test or every} test queries, got one of 8; run 01_data again"):
            other.evaluate("bm25")
    ranked = Experiment(trained.folder, "rankmamba/tiny", "tiny", 0, 99, 8).run  # 99 are all
    with pytest.raises(InputError, match="dev queries, got one of 2; run 03_rerank again"):
        ranked("tiny-mamba", "dev")
    assert len(ranked("bm25", "test")["query_id"].unique()) == 8


def test_states_are_tried_once_and_anew_with_another_first_stage(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "study")
    experiment = Experiment(tmp_path / "study", "rankmamba/tiny", "tiny", 0, 2, 8)

    def tried():
        return trial(experiment, "tiny-mamba", "bm25", top_k=3, n_queries=2, dtypes=["float32"], lengths=[])

    once = tried()
    assert once["result"]["pairs"] == 6 and once["result"]["formats"]["float32"]["rankings_kept"] == 1 and tried() == once
    experiment.first_stage("bm25", 5.0, 1.0)
    assert tried() != once


@pytest.mark.parametrize("settings", [{"system": "mine"}, {"system": "tiny-mamba", "loss": "distil", "teacher": "mine"}])
def test_a_training_that_begins_from_or_imitates_a_folder_is_done_anew_when_its_weights_are_others(
    settings, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    experiment, saved = Experiment("results", "rankmamba/tiny", "tiny"), Reranker.from_pretrained("tiny-mamba")
    saved.save_pretrained("mine")
    once = experiment.train(TrainConfig(**settings, **TINY))
    assert experiment.train(TrainConfig(**settings, **TINY)) == once
    saved.model.score.weight.data *= -1
    saved.save_pretrained("mine")
    assert experiment.train(TrainConfig(**settings, **TINY))["result"]["weights"] != once["result"]["weights"]


def own_collection(folder, documents, queries=None, qrels=None):
    """The tiny collection's queries and judgements over documents of one's own for each part."""
    for part, texts in documents.items():
        tiny = load(f"rankmamba/tiny/{part}")
        write_documents(folder / part / "documents.jsonl", texts.items())
        write_queries(folder / part / "queries.tsv", queries or tiny.queries)
        write_qrels(folder / part / "qrels.txt", tiny.qrels if qrels is None else qrels)
    return str(folder)


def test_parts_of_other_documents_are_not_ranked_by_the_index_of_one(tmp_path):
    texts = dict(load("rankmamba/tiny/test").documents.pairs())
    others = dict(zip(texts, reversed(texts.values()), strict=True))
    own = own_collection(tmp_path / "own", {"train": texts, "dev": others, "test": texts})
    with pytest.raises(InputError, match="expected the same documents in .*dev.* and .*test"):
        Experiment(tmp_path / "results", own, "tiny").first_stage("bm25", 0.9, 0.4)


def test_a_language_without_spaces_is_said_to_be_none_for_bm25(tmp_path, capsys):
    texts = {doc_id: "火星是太阳系的第四颗行星" for doc_id in load("rankmamba/tiny/test").documents}
    queries = {query_id: "第四颗行星" for part in ("dev", "test") for query_id in load(f"rankmamba/tiny/{part}").queries}
    own = own_collection(tmp_path / "own", dict.fromkeys(("train", "dev", "test"), texts), queries, load("rankmamba/tiny/test").qrels)
    Experiment(tmp_path / "results", own, "tiny").first_stage("bm25", 0.9, 0.4)
    assert f"no document for {len(queries)} of {len(queries)} test queries" in capsys.readouterr().err


def test_a_sample_is_of_queries_that_have_judgements():
    test = load("rankmamba/tiny/test")
    more = {f"unjudged{n}": "a river" for n in range(500)}
    with_more = Collection("mine", test.documents, test.queries | more, test.qrels, test._candidates)
    assert with_more.sample(5).queries == test.sample(5).queries and len(with_more.sample(len(test.queries)).queries) > 500
