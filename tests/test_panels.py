"""The panels without a browser: jobs that stop and never die in silence, what is shown of them, and hostile text."""

import dataclasses
import re
import threading
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ipywidgets.widgets.widget import _instances

from rankmamba import panels
from rankmamba.collection import load
from rankmamba.data.formats import write_documents, write_qrels, write_queries
from rankmamba.errors import InputError
from rankmamba.evaluate import BASELINE
from rankmamba.experiment import Experiment
from rankmamba.panels.controls import CSS, Controls, ink
from rankmamba.panels.curves import Run, learning_curves
from rankmamba.panels.job import Job
from rankmamba.panels.pages import document_html, lists_html
from rankmamba.panels.training import TrainingPanel, runs_table
from rankmamba.reporting.style import FAMILIES, look
from rankmamba.results import read_records
from rankmamba.search import Ranking, Search, query_words, sentences
from rankmamba.states import trials
from rankmamba.train import TrainConfig

TINY = TrainConfig("tiny-bert", learning_rate=1e-2, batch_size=2, group_size=4, max_steps=4, max_length=96, max_query_length=24)
HOSTILE = '<img src=x onerror="alert(1)"></style><script>alert(2)</script> & "quoted" ]]> <svg onload=alert(3)>'


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def patient(job: Job) -> str:
    """Work that goes on until it is stopped."""
    for step in range(1, 100_000):
        job.report(step, 100_000)
        if job.stop.wait(0.01):
            return f"stopped at {step}"
    raise AssertionError


def test_a_job_stops_within_a_second_and_keeps_what_it_has():
    job = Job(patient, lambda job: None).start()
    wait_for(lambda: job.done > 3)
    assert job.state == "running" and job.remaining > 1
    asked = time.monotonic()
    job.cancel()
    assert time.monotonic() - asked < 1 and job.state == "stopped" and job.result.startswith("stopped at")


def test_what_a_resumed_job_finds_done_does_not_shorten_the_time_that_is_left(monkeypatch):
    job, now = Job(patient, lambda job: None), 0.0
    monkeypatch.setattr("rankmamba.panels.job.time.monotonic", lambda: now)
    for done in range(1, 1001):
        job.report(done, 2000)
    for second in range(1, 31):
        now = float(second)
        job.report(1000 + second, 2000)
    assert job.remaining == pytest.approx(970)


def test_an_error_in_a_thread_is_shown_in_place_and_the_button_works_again(capsys):
    calls = []

    def work(job: Job) -> str:
        calls.append(job)
        if len(calls) == 1:
            raise InputError(f"expected a length below 512, got 600 {HOSTILE}; choose a shorter one")
        return "done"

    controls = Controls("Go", work, lambda job: None)
    controls.begin()
    wait_for(lambda: not controls.start.disabled)
    assert "expected a length below 512" in controls.error.value and 'role="alert"' in controls.error.value
    assert tags(controls.error.value) == {"div", "b", "details", "summary", "pre"}
    controls.begin()
    wait_for(lambda: not controls.start.disabled)
    assert controls.error.value == "" and controls.job.result == "done"
    assert capsys.readouterr() == ("", "")


def test_an_error_in_drawing_stops_the_work_and_is_shown():
    controls = Controls("Go", patient, lambda job: 1 / 0)
    controls.begin()
    wait_for(lambda: not controls.start.disabled)
    assert "ZeroDivisionError" in controls.error.value and controls.job.result.startswith("stopped at")


def test_the_second_press_of_a_double_click_starts_nothing():
    controls = Controls("Go", patient, lambda job: None)
    for _ in range(2):
        controls.start.click()
    job = controls.job
    wait_for(lambda: job.done)
    assert not job.stop.is_set()
    controls.cancel()
    controls.start.click()
    assert controls.job is not job
    controls.cancel()


def test_starting_again_ends_the_job_before_it_begins():
    running = []

    def work(job: Job) -> str:
        running.append(job)
        assert [other for other in running if not other.ended.is_set()] == [job]
        return patient(job)

    controls = Controls("Go", work, lambda job: None)
    for _ in range(3):
        controls.begin()
        wait_for(lambda: controls.job in running)
    controls.cancel()
    assert [job.error for job in running] == [None] * 3 and len(running) == 3


def test_a_new_panel_ends_the_job_of_the_one_before_it():
    def panel():
        return TrainingPanel({"tiny-bert": TINY}, lambda config, on_step, stop: stop.wait(60) and None, list)

    first = panel()
    first.controls.begin()
    job = first.controls.job
    second = panel()
    assert job.state == "stopped" and first.comm is None
    second.controls.begin()
    panels.close()
    assert second.controls.job.state == "stopped" and second.comm is None


def test_a_closed_panel_leaves_no_widget_that_would_keep_its_models(experiment):
    search = Search(experiment.split("test"), {"tiny-bert": experiment.model_path("tiny-bert")}, experiment.folder / "states")
    before = set(_instances)
    panel = panels.RankingPanel(search, ["a query"])
    assert len(_instances) > len(before) + 10
    panel.close()
    assert set(_instances) <= before


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    experiment = Experiment(tmp_path_factory.mktemp("study"), "rankmamba/tiny", "tiny")
    experiment.train(TINY)
    return experiment


def test_a_panel_trains_beside_the_study_and_marks_what_was_stopped_as_partial(experiment, capsys):
    study = read_records(experiment.folder)
    panel = TrainingPanel({"tiny-bert": TINY, "tiny-neox": TINY}, experiment.trial, experiment.runs)
    panel.steps.value, panel.seed.value = 2_000, 3
    panel.controls.begin()
    wait_for(lambda: panel.controls.job.done >= 3)
    asked = time.monotonic()
    panel.controls.stop.click()
    wait_for(lambda: not panel.controls.start.disabled)
    assert time.monotonic() - asked < 3  # 1 s on an idle machine
    assert panel.controls.error.value == "" and "(partial)" in panel.table.value and "marked partial" in panel.said.value
    trial = experiment.runs()[-1]
    assert trial["result"]["partial"] and trial["config"]["seed"] == 3 and trial["config"]["max_steps"] == 2_000
    assert read_records(experiment.folder) == study
    assert capsys.readouterr() == ("", "")


def test_a_new_training_panel_has_the_run_that_it_ended(experiment):
    configs = {"tiny-bert": TINY}
    before = TrainingPanel(configs, experiment.trial, experiment.runs)
    before.steps.value, before.seed.value = 2_000, 5
    before.controls.begin()
    wait_for(lambda: before.controls.job.done >= 3)
    table = TrainingPanel(configs, experiment.trial, experiment.runs).table.value
    panels.close()
    assert table == runs_table(experiment.runs()) and table.count("<td>5</td>") == 1


def test_settings_that_were_trained_before_are_found_and_not_trained_again(experiment):
    before = [record["created"] for record in experiment.runs()]
    assert experiment.trial(TINY)["created"] == before[0]
    assert [record["created"] for record in experiment.runs()] == before


def tags(html: str) -> set[str]:
    """The elements that a browser would make of it; no attribute may start a script."""
    found = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.add(tag)
            assert not [name for name, value in attributes if name.startswith("on")]

    Reader().feed(html)
    return found


def test_text_of_strangers_never_becomes_html():
    ranking = Ranking(["d1", "d2"], [2.0, 1.0], 0.1)
    lists = {"bm25": ranking, f"x{HOSTILE}": Ranking(["d2", "d1"], [3.0, 0.0], 0.1)}
    shown = lists_html(lists, {"d1": HOSTILE, "d2": HOSTILE}, {"d1": 1}, query_words(HOSTILE), read="d1")
    parts = pd.DataFrame({"sentence": [HOSTILE], "difference": [0.5], "read": [True]})
    shown += document_html(parts, query_words(HOSTILE), HOSTILE)
    assert tags(shown) <= set("style div section h4 ol li b br span mark sup".split())
    assert "&lt;img" in shown and "&lt;script" in shown


def test_the_lists_say_how_far_each_document_moved():
    lists = {"bm25": Ranking(list("abcd"), [4, 3, 2, 1], 0.1), "tiny-bert": Ranking(list("dbca"), [9, 8, 7, 6], 0.1)}
    shown = lists_html(lists, dict.fromkeys("abcd", "text"), {"d": 1}, set())
    _, reranked = shown.split("<section>")[1:]
    assert [piece in reranked for piece in ("▲3", "▼3", "=", "✓ relevant", "first relevant: 1")] == [True] * 5
    assert "first relevant: 4" in shown


@given(st.text(alphabet="aB. !?\n\"')", max_size=60))
def test_sentences_put_together_are_the_text_again(text):
    assert "".join(sentences(text)) == text


def test_sentences_end_where_a_reader_ends_them():
    text = 'It cost 3.5 million. "Why?" he asked! Nobody knew\nThe end'
    assert [part.strip() for part in sentences(text)] == ["It cost 3.5 million.", '"Why?" he asked!', "Nobody knew", "The end"]


def test_occlusion_is_the_difference_that_a_sentence_makes(experiment):
    search = Search(experiment.split("test"), {"tiny-bert": experiment.model_path("tiny-bert")}, experiment.folder / "states")
    query = next(iter(search.collection.queries.values()))
    first = search.candidates(query, 10)
    ranking = search.rerank("tiny-bert", query, first.doc_ids)
    assert sorted(ranking.doc_ids) == sorted(first.doc_ids) and ranking.scores == sorted(ranking.scores, reverse=True)
    doc_id = ranking.doc_ids[0]
    table = search.occlusion("tiny-bert", query, doc_id)
    text = search.texts([doc_id])[doc_id]
    without_last = text.removesuffix(table["sentence"].iloc[-1])
    score, shorter = search.reranker("tiny-bert").predict([(query, text), (query, without_last)])
    assert ranking.scores[0] == pytest.approx(score, abs=1e-5)
    assert table["difference"].iloc[-1] == pytest.approx(score - shorter, abs=1e-5)


def test_only_what_stands_before_the_cut_counts_as_read(experiment):
    search = Search(experiment.split("test"), {"tiny-bert": experiment.model_path("tiny-bert")}, experiment.folder / "states")
    limit = search.reranker("tiny-bert").inputs.document_limit
    search.texts = lambda doc_ids: {"long": "Ten. " * limit}
    table = search.occlusion("tiny-bert", "a query", "long")
    assert table["read"].sum() == limit // 2  # "ten" and "." are a token each
    assert not table["difference"][~table["read"]].any()
    stop, seen = threading.Event(), []

    def on_scored(done, total):
        seen.append((done, total))
        stop.set()

    assert search.occlusion("tiny-bert", "a query", "long", on_scored, stop) is None and seen == [(15, limit // 2)]


def test_a_stopped_ranking_gives_nothing_and_says_so(experiment):
    search = Search(experiment.split("test"), {"tiny-bert": experiment.model_path("tiny-bert")}, experiment.folder / "states")
    stop = threading.Event()
    stop.set()
    assert search.rerank("tiny-bert", "a query", list(experiment.split("test").documents), stop=stop) is None


def test_the_curves_are_one_well_formed_picture_in_the_colours_of_the_figures():
    curve = [{"step": step, "loss": 2 / step, "accuracy": min(1, step / 900)} for step in range(1, 1001)]
    runs = [Run("nano-bert", curve, False), Run("nano-mamba", curve[:400], True), Run("a<b>&c", curve[:9], False)]
    root = ElementTree.fromstring(learning_curves(runs, 800, 8))
    lines = root.findall(".//polyline")
    assert len({line.get("stroke-dasharray") for line in lines} - {None}) == 3  # one for each system, as in the figures
    assert {line.get("stroke") for line in lines} == {ink(look(run.system).color) for run in runs}
    points = np.array([[float(number) for number in point.split(",")] for line in lines for point in line.get("points").split()])
    width, height = map(float, root.get("viewBox").split()[2:])
    assert ((points >= 0) & (points <= [width, height])).all() and max(len(line.get("points").split()) for line in lines) <= 240
    assert "guessing: ln 8" in {text.text for text in root.iter("text")}
    assert ElementTree.fromstring(learning_curves([], 45, 8)) is not None


def test_every_colour_can_be_read_in_a_dark_theme_and_is_that_of_the_figures_in_a_light_one():
    def luminance(channels):  # of WCAG 2
        shares = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(shares, [0.2126, 0.7152, 0.0722])

    lighter = int(re.search(r'\[data-jp-theme-light="false"\] \.rankmamba { --rm-lighter: (\d+)%; }', CSS)[1]) / 100
    shown = lists_html({"bm25": Ranking([], [], 0.1)}, {}, {}, set()) + " ".join(ink(style.color) for style in FAMILIES.values())
    colors = re.findall(r"color-mix\(in srgb, #(\w{6}), white var\(--rm-lighter, 0%\)\)", shown)
    assert len(colors) == len(FAMILIES) + 4 and shown.count("color: #") == 0
    for color in colors:
        channels = np.array([int(color[at : at + 2], 16) / 255 for at in (0, 2, 4)])
        mixed = (1 - lighter) * channels + lighter
        assert (luminance(mixed) + 0.05) / (luminance([17 / 255] * 3) + 0.05) >= 4.5


def test_the_table_of_runs_has_their_settings_newest_first(experiment):
    first, *_ = experiment.runs()
    other = first | {"created": "later", "config": first["config"] | {"learning_rate": 0.5}, "system": HOSTILE}
    table = runs_table([first, other], now="later")
    assert table.index("0.5") < table.index("0.01") and table.count("rm-now") == 1
    assert tags(table) == set("table thead tbody tr th td i".split())


def test_the_ranking_panel_answers_a_typed_query_from_every_system(experiment):
    search = Search(experiment.split("test"), {"tiny-bert": experiment.model_path("tiny-bert")}, experiment.folder / "states")
    panel = panels.RankingPanel(search, list(search.collection.queries.values()), top_k=10)
    panel.ranking.start.click()
    wait_for(lambda: panel.lists.value == "Pick a query, or type one.")
    panel.query.value = f"the metal of a planet {HOSTILE}"
    wait_for(lambda: panel.text.value)
    assert "<section>" in panel.lists.value and panel.lists.value.count("<section>") == 2
    assert "<img" not in panel.lists.value and panel.document.value in dict(panel.document.options).values()
    panel._answer.lists.clear()  # as while BM25 searches, or where it failed
    panel._open()
    panel.query.value = "zzzz qqqq"
    wait_for(lambda: "No document has a word" in panel.lists.value)
    panel.query.value = "of the and"
    wait_for(lambda: "BM25 looks for none of these" in panel.lists.value)
    panels.close()


def test_while_another_query_is_ranked_no_document_of_the_last_one_stands_below(experiment):
    search = Search(experiment.split("test"), {"tiny-bert": experiment.model_path("tiny-bert")}, experiment.folder / "states")
    panel = panels.RankingPanel(search, [], top_k=5)
    panel.query.value = "the metal of a planet"
    wait_for(lambda: panel.text.value)
    ranks, rerank, displayed = threading.Event(), search.rerank, []

    def waiting(*arguments):
        wait_for(lambda: BASELINE in panel._answer.lists and panel.below.layout.display == "none")
        displayed.append(panel.below.layout.display)
        ranks.set()
        return rerank(*arguments)

    search.rerank = waiting
    panel.query.value = "a river"
    wait_for(ranks.is_set)
    wait_for(lambda: panel.below.layout.display == "" and panel.text.value)
    assert displayed == ["none"]
    panels.close()


def test_the_training_panel_trains_with_the_very_settings_it_was_given_and_every_value_has_a_label_of_its_own():
    short = dataclasses.replace(TINY, learning_rate=2e-4, max_length=160, max_query_length=50)
    configs = {"tiny-bert": short, "tiny-neox": dataclasses.replace(short, system="tiny-neox", learning_rate=1.25e-4)}
    trained = []
    panel = TrainingPanel(configs, lambda config, on_step, stop: trained.append(config), list)
    for system, config in configs.items():
        panel.system.value = system
        panel.controls.begin()
        wait_for(lambda: panel.controls.job.ended.is_set())
        assert trained[-1] == config
    for slider in (panel.learning_rate, panel.max_length):
        assert len(set(slider._options_labels)) == len(slider.options)
    panels.close()


def test_below_lists_that_a_system_failed_to_complete_stands_a_document_of_theirs(experiment, tmp_path):
    experiment.train(dataclasses.replace(TINY, system="tiny-mamba", max_steps=2))
    models = {name: experiment.model_path(name) for name in ("tiny-bert", "tiny-mamba")}
    search = Search(experiment.split("test"), models, tmp_path / "states")
    panel = panels.RankingPanel(search, [], top_k=3)
    panel.query.value = "the metal of a planet"
    wait_for(lambda: panel.text.value and not panel.ranking.start.disabled)
    before = panel.text.value
    search.models["tiny-mamba"], search._rerankers = tmp_path / "gone", {}
    panel.query.value = "the outer bank of a river"
    wait_for(lambda: "run 02_train" in panel.ranking.error.value and not panel.ranking.start.disabled)
    wait_for(lambda: panel.text.value != before)
    assert panel.document.value in panel._answer.texts
    panels.close()


def test_a_search_whose_model_was_deleted_names_the_notebook_that_trains_it(experiment, tmp_path):
    search = Search(experiment.split("test"), {"tiny-mamba": tmp_path / "gone"}, tmp_path / "states")
    for use in (search.storable, lambda: search.reranker("tiny-mamba")):
        with pytest.raises(InputError, match="gone, found none; run 02_train with 'tiny-mamba' among its systems"):
            use()


def test_stored_states_answer_a_query_with_the_scores_of_reading_and_are_made_anew_for_other_weights(experiment, tmp_path):
    experiment.train(dataclasses.replace(TINY, system="tiny-mamba", max_steps=2))
    models = {name: experiment.model_path(name) for name in ("tiny-bert", "tiny-mamba")}
    search = Search(experiment.split("test"), models, tmp_path / "states")
    assert search.storable() == ["tiny-mamba"]
    doc_ids = search.candidates("a river", 10).doc_ids
    read, stop = search.rerank("tiny-mamba", "a river", doc_ids), threading.Event()
    counts = []

    def stop_soon(count):
        counts.append(count)
        stop.set()

    search.store("tiny-mamba", stop_soon, stop)
    assert search.states("tiny-mamba") is None and search.storable()  # stopped: not yet there
    search.store("tiny-mamba", counts.append, threading.Event())
    ranking = search.rerank("tiny-mamba", "a river", doc_ids)
    assert ranking.from_states and not read.from_states and search.storable() == []
    assert ranking.doc_ids == read.doc_ids and np.allclose(ranking.scores, read.scores, atol=1e-2)

    experiment.train(dataclasses.replace(TINY, system="tiny-mamba", max_steps=3))
    anew = Search(experiment.split("test"), models, tmp_path / "states")
    assert anew.storable() == ["tiny-mamba"]
    anew.store("tiny-mamba", counts.append, threading.Event())
    assert len(list((tmp_path / "states").iterdir())) == 1
    assert anew.rerank("tiny-mamba", "a river", doc_ids).scores != ranking.scores


def test_storing_a_systems_states_leaves_those_of_one_whose_name_goes_on(experiment, tmp_path):
    experiment.train(dataclasses.replace(TINY, system="tiny-mamba", max_steps=2))
    models = dict.fromkeys(("nano-mamba", "nano-mamba-scratch"), experiment.model_path("tiny-mamba"))
    search = Search(experiment.split("test"), models, tmp_path / "states")
    for system in ("nano-mamba-scratch", "nano-mamba"):
        search.store(system, lambda count: None, threading.Event())
    assert search.storable() == [] and len(list((tmp_path / "states").iterdir())) == 2


def test_the_ranking_panel_stores_states_and_then_answers_from_them(experiment, tmp_path):
    experiment.train(dataclasses.replace(TINY, system="tiny-mamba", max_steps=2))
    search = Search(experiment.split("test"), {"tiny-mamba": experiment.model_path("tiny-mamba")}, tmp_path / "states")
    panel = panels.RankingPanel(search, [], top_k=10)
    assert f"all {len(search.collection.documents):,} documents with tiny-mamba: how long" in panel.storing_takes.value
    panel.query.value = "the metal of a planet"
    wait_for(lambda: panel.text.value)
    wait_for(lambda: re.search(r"minutes and [\d.e-]+ GB of disk, judged by the last ranking", panel.storing_takes.value))
    assert "from states" not in panel.lists.value and panel.stored.layout.display == ""
    panel.storing.start.click()
    wait_for(lambda: "from states" in panel.lists.value)
    assert panel.stored.layout.display == "none"
    panels.close()


def test_states_of_texts_that_were_edited_since_are_not_answered_from(experiment, tmp_path):
    experiment.train(dataclasses.replace(TINY, system="tiny-mamba", max_steps=2))
    test, own = experiment.split("test"), tmp_path / "own"
    write_queries(own / "queries.tsv", test.queries)
    write_qrels(own / "qrels.txt", test.qrels)
    query, texts = "the metal of a planet", dict(test.documents.pairs())
    edited = texts | {doc_id: f"{query} {text}" for doc_id, text in texts.items()}
    answers = []
    for documents in (texts, edited):
        write_documents(own / "documents.jsonl", documents.items())
        search = Search(load(str(own)), {"tiny-mamba": experiment.model_path("tiny-mamba")}, tmp_path / "states")
        assert search.storable() == ["tiny-mamba"]
        search.store("tiny-mamba", lambda count: None, threading.Event())
        answers.append(search.rerank("tiny-mamba", query, list(texts)))
    assert answers[0].from_states and answers[1].from_states and answers[0].scores != answers[1].scores


def test_the_states_panel_shows_what_the_record_says_of_the_chosen_format(experiment):
    experiment.first_stage("bm25", k1=0.9, b=0.4)
    experiment.train(dataclasses.replace(TINY, system="tiny-mamba", max_steps=2))
    record = trials.trial(experiment, "tiny-mamba", "bm25", 3, 2, ["float32", "int8"], [32])
    panel = panels.StatesPanel([record], 2_000_000)
    seen = {}
    for name in panel.format.options:
        panel.format.value = name
        seen[name] = panel.cards.value
        kilobytes = record["result"]["formats"][name]["bytes_per_document"] / 1000
        assert f"<b>{kilobytes:.1f} kB</b>" in seen[name]
        assert f"<b>{kilobytes * 2:.1f} GB</b><span>2,000,000 documents</span>" in seen[name]
    assert len(set(seen.values())) == len(seen) == 3  # int8 of half of the layers, too


@pytest.mark.parametrize("formats", [["float32", "float16"], ["int4"]], ids=str)
@pytest.mark.parametrize("system", ["tiny-mamba", "tiny-neox"])
def test_states_that_the_disk_has_no_room_for_are_refused_before_any_is_computed(experiment, system, formats, monkeypatch):
    experiment.first_stage("bm25", k1=0.9, b=0.4)
    experiment.train(dataclasses.replace(TINY, system=system, max_steps=2))
    record = trials.trial(experiment, system, "bm25", 3, 2, list(dict.fromkeys(["float32", *formats])), [])
    made = record["result"]["formats"]
    wanted = sum(entry["bytes_per_document"] for entry in made.values()) * record["result"]["documents"]
    monkeypatch.setattr(trials, "DocumentStates", None)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0.9 * wanted}))
    with pytest.raises(InputError, match="for the states of .* documents in . formats, got .* lower n_state_queries or top_k"):
        trials.trial(experiment, system, "bm25", 4, 2, formats, [])


def test_a_measurement_joins_the_table_and_one_that_does_not_fit_says_so():
    def measure(system, length, batch, stop, modes):
        (mode,) = modes
        found = {"flops": {"inference": 8e9, "training": 24e9}, "out_of_memory": ["training"] if length > 512 else []}
        numbers = dict(tokens_per_s=1000.0, low=900.0, high=1100.0, latency_ms=50.0, peak_mib=None, share=0.25)
        return found if mode in found["out_of_memory"] else found | {mode: numbers}

    panel = panels.ProfilePanel(measure, ["nano-mamba", "nano-bert"])
    for length in (512, 8192):
        panel.length.value = length
        panel.controls.begin()
        wait_for(lambda: not panel.controls.start.disabled)
    rows = panel.table.value.split("<tr")[2:]
    assert len(rows) == 4 and panel.controls.error.value == ""
    assert ["does not fit into memory" in row for row in rows] == [True, False, False, False]
    assert "900 to 1,100" in rows[1] and "25%" in rows[1] and "<td>50</td>" in rows[1] and "<td>3</td>" in rows[2]
