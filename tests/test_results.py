import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from rankmamba import results
from rankmamba.errors import InputError
from rankmamba.reporting import report
from rankmamba.reporting.tables import (
    by_words,
    caption,
    curves,
    final_table,
    format_table,
    measured,
    per_query_values,
    readable,
    readable_seeds,
    seed_by_seed,
    tidy,
)
from rankmamba.results import environment, fingerprint, new_record, read_records, write_record

NOTE = "saw these queries in its own pre-training"


def record(kind="data", system="x", collection="set/test", seed=0, config=None, result=None, timing=None, note="") -> dict:
    return new_record(kind, system, collection, "tiny", seed, config or {}, result or {}, timing, note=note)


def values(seed: int, queries: int = 40, gain: float = 0.0) -> pd.DataFrame:
    reciprocal = 1 / np.random.default_rng(seed).geometric(0.3, queries)
    columns = {measure: np.minimum(1, reciprocal + gain) for measure in ("nDCG@10", "RR@10", "RR@100", "AP@100")}
    return pd.DataFrame(columns, index=pd.Index([f"q{number}" for number in range(queries)], name="query_id"))


def study(folder: Path, seeds: int = 1) -> Path:
    """The records of a small study: bm25, and one system alone and mixed."""
    write_record(folder, record("evaluate", "bm25", result=measured(values(1))))
    for seed in range(seeds):
        trained = {
            "tokens": 2_000_000 * (seed + 1),
            "parameters_outside_embeddings": 3_050_000,
            "curve": [{"step": 1, "loss": 2.1}],
        }
        write_record(
            folder, record("train", "nano-mamba", "set/train", seed, result=trained, timing={"seconds": 90.0}, note=NOTE)
        )
        write_record(folder, record("rerank", "nano-mamba", "set/dev+test", seed, timing={"pairs_per_s": 150 + seed}))
        write_record(folder, record("evaluate", "nano-mamba", seed=seed, result=measured(values(2 + seed, gain=0.2))))
        write_record(folder, record("evaluate", "nano-mamba + bm25", seed=seed, result=measured(values(12 + seed, gain=0.3))))
    return folder


def test_a_record_comes_back_as_it_was_with_every_digit(tmp_path):
    result = {
        "float32": np.float32(0.1),
        "float64": np.float64(1) / 3,
        "count": np.int64(7),
        "flag": np.bool_(True),
        "curve": np.linspace(0, 1, 3),
        "pair": (1, None, "ü"),
        "folder": Path("a/b"),
    }
    path = write_record(tmp_path, record(result=result))
    assert path == tmp_path / "records" / "data-x-set-test-seed0.json"
    (back,) = read_records(tmp_path)
    assert back["result"] == {
        "float32": float(np.float32(0.1)),
        "float64": 1 / 3,
        "count": 7,
        "flag": True,
        "curve": [0.0, 0.5, 1.0],
        "pair": [1, None, "ü"],
        "folder": str(Path("a/b")),
    }
    assert fingerprint(back) == fingerprint(record(result=result))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
some_json = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(st.characters(), max_size=5), some_json, max_size=4))
def test_any_json_survives_but_nan_and_infinity_are_refused(tmp_path_factory, result):
    folder = tmp_path_factory.mktemp("records")
    if all(map(math.isfinite, numbers(result))):
        write_record(folder, record(result=result))
        assert read_records(folder)[0]["result"] == result
    else:
        with pytest.raises(InputError, match="finite numbers"):
            write_record(folder, record(result=result))
        assert not list(folder.rglob("*.json"))


def numbers(value):
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"loss": np.float32("nan")}, "got nan as 'result.loss'"),
        ({"curve": [{"loss": 1.0}, {"loss": math.inf}]}, r"got inf as 'result.curve\[1\].loss'"),
        ({"when": object()}, "got object as 'result.when'"),
        ({"by_number": {1: 2}}, "got dict as 'result.by_number'"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(tmp_path, part, message):
    with pytest.raises(InputError, match=message):
        write_record(tmp_path, record(result=part))


def test_collections_at_the_end_of_long_paths_have_records_of_their_own(tmp_path):
    collections = [f"/{'folder/' * 60}{name}/test" for name in ("mine", "yours")]
    for collection in collections:
        write_record(tmp_path, record(collection=collection))
    assert [found["collection"] for found in read_records(tmp_path, "data")] == sorted(collections)


def test_the_fingerprint_is_of_config_and_result_alone():
    first = record(config={"learning_rate": 1e-3}, result={"loss": 0.5}, timing={"seconds": 1.0})
    later = {**first, "timing": {"seconds": 9.0}, "environment": {"cpu": "other"}, "created": "2030-01-01T00:00:00+00:00"}
    assert fingerprint(first) == fingerprint(later)
    assert fingerprint(first) == fingerprint({**first, "result": {"loss": np.float64(0.5)}})
    assert fingerprint(first) != fingerprint({**first, "result": {"loss": math.nextafter(0.5, 1)}})
    assert fingerprint(first) != fingerprint({**first, "config": {"learning_rate": 2e-3}})
    assert fingerprint(first) != fingerprint({**first, "seed": 1})


def test_a_later_record_of_the_same_run_replaces_it_and_another_run_never_does(tmp_path):
    write_record(tmp_path, record(system="a/b", result={"value": 1}))
    write_record(tmp_path, record(system="a/b", result={"value": 2}))
    assert [found["result"]["value"] for found in read_records(tmp_path)] == [2]
    with pytest.raises(InputError, match="another name than data-a-b-set-test-seed0.json"):
        write_record(tmp_path, record(system="a-b"))
    (tmp_path / "records" / "data-a-b-set-test-seed0.json").write_text("{")
    write_record(tmp_path, record(system="a/b", result={"value": 3}))
    assert read_records(tmp_path)[0]["result"]["value"] == 3


def test_every_truncation_of_a_record_is_an_input_error_that_names_the_file(tmp_path):
    path = write_record(tmp_path, record("evaluate", result=measured(values(1, queries=2))))
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=path.name):
            read_records(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("system", None, "expected the key 'system'"),
        ("seed", "0", "expected a whole number as 'seed', got '0'"),
        ("seed", True, "expected a whole number as 'seed', got True"),
        ("config", [], "expected an object as 'config'"),
        ("note", 3, "expected text as 'note'"),
        ("result", {}, "expected the key 'result.measures'"),
        ("result", {"measures": {}, "per_query": 1}, "expected an object as 'result.per_query'"),
        (
            "result",
            {"measures": {}, "per_query": {"RR": {"q": "high"}}},
            "expected a number as 'result.per_query.RR.q', got 'high'",
        ),
        ("result", {"measures": {"RR": 1}, "per_query": {}}, "expected an object as 'result.measures.RR'"),
    ],
)
def test_a_missing_key_or_a_wrong_type_is_named_with_its_file(tmp_path, key, value, message):
    path = write_record(tmp_path, record("evaluate", result=measured(values(1))))
    content = json.loads(path.read_text())
    if value is None:
        del content[key]
    else:
        content[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read_records(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"3", b"\xff\xfe", b"NaN", b'{"kind": NaN}', b"[" * 100_000, b"null", b"1" * 5000])
def test_a_foreign_file_is_an_input_error(tmp_path, content):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "notes.json").write_bytes(content)
    with pytest.raises(InputError, match="notes.json"):
        read_records(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_not_read_either(tmp_path, number):
    path = write_record(tmp_path, record(result={"loss": 0.125}))
    path.write_text(path.read_text().replace("0.125", number))
    with pytest.raises(InputError, match="is not a finite number"):
        read_records(tmp_path)


@pytest.mark.parametrize("kind", ["first_stage", "train", "rerank"])
def test_a_folder_of_another_collection_is_refused_whatever_was_done_in_it(tmp_path, kind):
    results.check_collection(tmp_path / "new", "mine")
    done = {"train": {"tokens": 1, "parameters_outside_embeddings": 1, "curve": []}}.get(kind, {})
    write_record(tmp_path, record(kind, collection="theirs/test", result=done, timing={"seconds": 1.0, "pairs_per_s": 1.0}))
    results.check_collection(tmp_path, "theirs")
    with pytest.raises(InputError, match="expected results of mine in .*, got those of theirs"):
        results.check_collection(tmp_path, "mine")


def test_a_removed_record_is_gone_gzipped_or_not(tmp_path):
    path = write_record(tmp_path, record())
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    results.remove_record(tmp_path, record())
    assert read_records(tmp_path) == []


def test_a_copy_under_another_name_does_not_count_twice(tmp_path):
    path = write_record(tmp_path, record())
    path.with_name("data-x copy.json").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="expected data-x-set-test-seed0.json"):
        read_records(tmp_path)


def test_a_kind_is_read_without_the_others(tmp_path):
    study(tmp_path)
    (tmp_path / "records" / "train-broken.json").write_text("{")
    assert {found["kind"] for found in read_records(tmp_path, "evaluate")} == {"evaluate"}
    assert read_records(tmp_path / "records") == []
    with pytest.raises(InputError, match="expected a results folder"):
        read_records(tmp_path / "nowhere")


def test_the_environment_is_plain_and_names_the_machine():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert (
        found["cpu"] and found["threads"] >= 1 and {"python", "torch", "transformers", "device", "cpu_capability"} <= set(found)
    )


def test_the_final_table_has_the_numbers_of_the_records(tmp_path):
    table = final_table(read_records(study(tmp_path))).set_index("system")
    assert list(table.index) == ["bm25", "nano-mamba", "nano-mamba + bm25"]
    row = table.loc["nano-mamba"]
    assert row["RR@100"] == pytest.approx(values(2, gain=0.2)["RR@100"].mean())
    assert row["RR@100 low"] < row["RR@100"] < row["RR@100 high"]
    p = [stats.ttest_rel(values(seed, gain=gain)["RR@100"], values(1)["RR@100"]).pvalue for seed, gain in ((2, 0.2), (12, 0.3))]
    assert row["p"] == pytest.approx(p[0]) and row["p_holm"] == pytest.approx(max(p[0], 2 * min(p)))
    assert (row["queries"], row["seeds"], row["parameters"], row["tokens"], row["minutes"]) == (40, 1, 3_050_000, 2_000_000, 1.5)
    assert row["pairs_per_s"] == table.loc["nano-mamba + bm25", "pairs_per_s"] == 150
    assert math.isnan(table.loc["bm25", "p"]) and math.isnan(table.loc["bm25", "tokens"])


def test_seeds_are_averaged_and_counted(tmp_path):
    table = final_table(read_records(study(tmp_path, seeds=3))).set_index("system")
    row = table.loc["nano-mamba"]
    mean = sum(values(2 + seed, gain=0.2)["RR@100"] for seed in range(3)) / 3
    assert (row["seeds"], row["tokens"], row["pairs_per_s"]) == (3, 4_000_000, 151)
    assert row["RR@100"] == pytest.approx(mean.mean())
    assert row["p"] == pytest.approx(stats.ttest_rel(mean, values(1)["RR@100"]).pvalue)
    assert table.loc["bm25", "seeds"] == 1


def test_a_system_of_one_seed_among_others_of_several_is_named_below_the_table(tmp_path):
    write_record(study(tmp_path, seeds=2), record("evaluate", "nano-bert", result=measured(values(5))))
    assert "Of one seed" not in caption(final_table(read_records(tmp_path)))  # no training of it is recorded, as of a first stage
    trained = {"tokens": 1, "parameters_outside_embeddings": 1, "curve": []}
    write_record(tmp_path, record("train", "nano-bert", "set/train", result=trained, timing={"seconds": 1.0}))
    assert "Of one seed, so that what another would give is not in the intervals: nano-bert." in caption(
        final_table(read_records(tmp_path))
    )


def test_the_command_compares_by_the_measure_that_the_study_chose_its_mixtures_by(tmp_path, capsys):
    write_record(
        study(tmp_path),
        record("evaluate", "nano-mamba + bm25", result=measured(values(12)) | {"measure": "nDCG@10", "weights": []}),
    )
    assert results.main([str(tmp_path)]) == 0 and "paired t-test on nDCG@10 against bm25" in capsys.readouterr().out


def test_times_of_several_devices_have_no_mean_and_the_caption_says_whose_they_are(tmp_path):
    records = read_records(study(tmp_path, seeds=3))
    for one in records:
        one["environment"]["device"] = "cpu"
    assert "that ran on" not in caption(final_table(records))
    for one in records:  # the device of most trainings counts, not that of most records
        one["environment"]["device"] = "cpu" if one["seed"] == 2 or one["kind"] == "evaluate" else "NVIDIA H200"
        if one["seed"] == 2 and "pairs_per_s" in one["timing"]:
            one["timing"]["pairs_per_s"] = 7
    table = final_table(records)
    assert table.set_index("system").loc["nano-mamba", ["seeds", "pairs_per_s"]].tolist() == [3, 150.5]
    assert caption(table).endswith(f"Minutes and pairs/s: of the seeds that ran on NVIDIA H200.\n[1] {NOTE}")


def test_each_seed_is_compared_alone_and_corrected_within_itself(tmp_path):
    records = read_records(study(tmp_path, seeds=3))
    table = seed_by_seed(records).set_index(["seed", "system"])
    for seed in range(3):
        p = [
            stats.ttest_rel(values(first + seed, gain=gain)["RR@100"], values(1)["RR@100"]).pvalue
            for first, gain in ((2, 0.2), (12, 0.3))
        ]
        row = table.loc[(seed, "nano-mamba")]
        assert row["difference"] == pytest.approx((values(2 + seed, gain=0.2) - values(1))["RR@100"].mean())
        assert row["p"] == pytest.approx(p[0]) and row["p_holm"] == pytest.approx(max(p[0], 2 * min(p)))
    assert list(readable_seeds(table.reset_index()).columns) == ["seed 0", "seed 1", "seed 2"]
    better = (table["p_holm"] < 0.01).groupby("system").sum()
    assert better["nano-mamba"] < better["nano-mamba + bm25"]
    listed = ", ".join(f"{system} with {better[system]} of 3" for system in ("nano-mamba", "nano-mamba + bm25"))
    assert report.seeds(table.reset_index()).endswith(f": {listed}.")
    assert report.seeds(seed_by_seed(read_records(study(tmp_path / "one")))).startswith("One seed")


@given(words=st.lists(st.integers(0, 90), min_size=8, max_size=40), parts=st.integers(1, 5))
@example(words=[*range(20)], parts=4)
def test_by_words_every_query_counts_once_and_the_parts_make_up_the_whole_difference(words, parts):
    base, system = values(1, len(words)), values(2, len(words), gain=0.2)
    given = dict(zip(base.index, words, strict=True))
    table = by_words({"bm25": [base], "x": [system, system]}, given, parts=parts)
    assert table["queries"].sum() == len(words) and len(table) <= parts and (table["queries"] > 0).all()
    if len(set(words)) == len(words):
        assert len(table) == parts and np.ptp(table["queries"]) <= 1
    whole = (system - base)["RR@100"].mean()
    assert (table["difference"] * table["queries"]).sum() / len(words) == pytest.approx(whole)
    for bounds, difference, own in zip(
        table["words"].str.split(" to "), table["difference"], table["of the baseline"], strict=True
    ):
        low, high = map(int, bounds)
        inside = [query for query, count in given.items() if low <= count <= high]
        assert difference == pytest.approx((system - base).loc[inside, "RR@100"].mean())
        assert own == pytest.approx(base.loc[inside, "RR@100"].mean())


def test_the_printed_table_fits_120_columns_and_says_the_test_and_the_number_of_queries(tmp_path):
    for seeds in (1, 3):
        text = format_table(final_table(read_records(study(tmp_path, seeds))))
        assert max(map(len, text.splitlines())) <= 125 and text.isascii()
        assert "40 queries" in text and "paired t-test on RR@100 against bm25" in text and "2 systems (Holm)" in text
        assert "nano-mamba + bm25 [1]" in text and f"[1] {NOTE}" in text
        assert ("seeds" in text.splitlines()[0]) == ("over queries and seeds" in text) == (seeds > 1)
        assert ("what another seed would give is not in them" in text) == (seeds == 1)


def test_notebooks_get_the_same_table_as_text(tmp_path):
    table = final_table(read_records(study(tmp_path)))
    row, numbers_ = readable(table).loc["nano-mamba [1]"], table.set_index("system").loc["nano-mamba"]
    low, high = numbers_["RR@100 low"], numbers_["RR@100 high"]
    assert row["RR@100"] == f"{numbers_['RR@100']:.3f} [{low:.3f}, {high:.3f}]"
    assert row["params (M)"] == "3.05" and readable(table).loc["bm25", "params (M)"] == ""
    assert readable(table)["p (Holm)"].tolist() == ["", *("<0.001" if p < 0.001 else f"{p:.3f}" for p in table["p_holm"][1:])]
    assert NOTE in caption(table)


def test_collections_are_compared_apart(tmp_path):
    study(tmp_path)
    other = record("evaluate", "bm25", "other/test", result=measured(values(5, queries=7)), note="given with the other")
    write_record(tmp_path, other)
    records = read_records(tmp_path)
    table = final_table(records)
    assert table.loc[table["note"] == "given with the other", "collection"].tolist() == ["other/test"]
    assert table.groupby("collection")["queries"].first().to_dict() == {"other/test": 7, "set/test": 40}
    assert format_table(table).count("system") - caption(table).count("system") == 2
    assert readable(table)["collection"].tolist() == ["other/test"] + ["set/test"] * 3
    found = seed_by_seed(records)
    assert found.loc[0, "p"] == final_table(records).set_index("system").loc["nano-mamba", "p"] and len(found) == 2
    with pytest.raises(InputError, match="one evaluated collection.*other/test, set/test"):
        per_query_values(records)


def test_a_study_without_its_baseline_has_no_differences(tmp_path):
    write_record(tmp_path, record("evaluate", "nano-mamba", result=measured(values(2))))
    table = final_table(read_records(tmp_path))
    assert math.isnan(table.loc[0, "difference"]) and "nano-mamba" in format_table(table)
    assert "bm25 was not evaluated, so nothing is compared with it" in caption(table) and "t-test" not in caption(table)
    with pytest.raises(InputError, match="expected bm25 among the evaluated systems, got nano-mamba"):
        report.answer(table)


def test_every_seed_of_a_system_has_its_training_curve(tmp_path):
    found = curves(read_records(study(tmp_path, seeds=2)))
    assert list(found) == ["nano-mamba"] and [table.to_numpy().tolist() for table in found["nano-mamba"]] == [[[1, 2.1]]] * 2
    assert curves([]) == {}


def test_the_command_prints_the_table_tidy_rows_or_what_is_wrong(tmp_path, capsys):
    study(tmp_path)
    assert results.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == format_table(final_table(read_records(tmp_path)))
    assert results.main([str(tmp_path), "--csv"]) == 0
    rows = pd.read_csv(pd.io.common.StringIO(capsys.readouterr().out))
    pd.testing.assert_frame_equal(rows, tidy(read_records(tmp_path)).astype({"seed": "int64"}), check_dtype=False)
    assert list(rows.columns) == ["system", "seed", "collection", "measure", "value"] and len(rows) == 12
    assert results.main([str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("error: expected a results folder")
    assert results.main([str(tmp_path / "records")]) == 1
    assert "run 04_evaluate" in capsys.readouterr().err


def test_gzipped_records_read_as_they_were_and_a_new_record_takes_their_place(tmp_path):
    before = [fingerprint(r) for r in read_records(study(tmp_path))]
    for path in (tmp_path / "records").glob("*.json"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert [fingerprint(r) for r in read_records(tmp_path)] == before
    assert [r["kind"] for r in read_records(tmp_path, "train")] == ["train"]
    newer = record("evaluate", "bm25", result=measured(values(9)))
    path = write_record(tmp_path, newer)
    path.with_name(path.name + ".gz").write_bytes(b"an older one")
    assert fingerprint(newer) in [fingerprint(r) for r in read_records(tmp_path)]
    write_record(tmp_path, newer)
    assert list(path.parent.glob("evaluate-bm25-set*")) == [path]
    path = write_record(tmp_path, record(system="a/b"))
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(InputError, match="another name than data-a-b-set"):
        write_record(tmp_path, record(system="a-b"))


@pytest.mark.parametrize("broken", [b"no gzip", gzip.compress(b"{}")[:-9], gzip.compress(b"\xff")], ids=["other", "cut", "utf8"])
def test_a_broken_gzipped_record_is_named(tmp_path, broken):
    path = write_record(tmp_path, record())
    path.with_name(path.name + ".gz").write_bytes(broken)
    path.unlink()
    with pytest.raises(InputError, match=f"no JSON .*{path.name}.gz"):
        read_records(tmp_path)


def test_the_command_compares_with_the_baseline_that_is_asked_for(tmp_path, capsys):
    study(tmp_path)
    assert results.main([str(tmp_path), "--baseline", "nano-mamba"]) == 0
    printed = capsys.readouterr().out
    assert "RR@100 against nano-mamba" in printed and "- nano-mamba" in printed
    assert results.main([str(tmp_path), "--baseline", "nano-nothing"]) == 1
    assert "expected a baseline among bm25, nano-mamba" in capsys.readouterr().err


def test_the_answer_names_what_beats_the_first_stage_and_speeds_of_one_machine_only(tmp_path):
    write_record(tmp_path, record("evaluate", "nano-bert", result=measured(values(2, gain=-0.3))))
    write_record(tmp_path, record("rerank", "nano-bert", "set/dev+test", timing={"pairs_per_s": 99}))
    table = final_table(read_records(study(tmp_path)))
    said = report.answer(table)
    assert "bm25 alone reaches" in said and "**Better than the first stage**: nano-mamba + bm25 (+0." in said
    assert "**Worse than the first stage**: nano-bert (-0." in said and "scoring from 99 (nano-bert) to 150" in said
    assert "documents per second" not in report.answer(table.assign(timed_on="a GPU"))
    assert report.answer(table.assign(pairs_per_s=math.nan)).endswith("(nano-mamba).")  # rerankings whose records are gone


def test_queries_that_share_a_document_widen_the_final_tables_intervals_and_the_caption_says_so(tmp_path):
    alone = final_table(read_records(study(tmp_path)))
    shared = {query_id: number // 4 for number, query_id in enumerate(values(1).index)}
    write_record(tmp_path, record("queries", "relevant documents", result={"words": {}, "clusters": shared}))
    table = final_table(read_records(tmp_path))
    assert table["clusters"].tolist() == [10] * 3 and alone["clusters"].tolist() == [0] * 3
    assert table["difference"].equals(alone["difference"]) and not table["p"].equals(alone["p"])
    assert "form a cluster (10 in all)" in caption(table) and "cluster" not in caption(alone)
    assert "is not recorded (04_evaluate does it)" in caption(alone) and "not recorded" not in caption(table)
    first = next(iter(shared))  # a query without a relevant document is in no cluster
    apart = {query_id: place for place, query_id in enumerate(shared) if query_id != first}
    write_record(tmp_path, record("queries", "relevant documents", result={"words": {}, "clusters": apart}))
    assert final_table(read_records(tmp_path))["clusters"].tolist() == [40] * 3
    joined = dict.fromkeys(shared, 0)
    write_record(tmp_path, record("queries", "relevant documents", result={"words": {}, "clusters": joined}))
    assert "take each alone" in (said := caption(final_table(read_records(tmp_path)))) and "too few" in said


@pytest.mark.parametrize("text", ["nano\x1b[2Jbert", "nano-bert\u202etxt", "nano\n\n# bert", "nano-\ud800"])
def test_a_name_that_would_command_a_terminal_is_neither_written_nor_read(tmp_path, text):
    for key in ("system", "collection", "scale", "note"):
        with pytest.raises(InputError, match=f"without control characters as '{key}'"):
            write_record(tmp_path, record() | {key: text})
    named = record() | {"system": "mes\u00a0modèles/lr<1e-4\u3000🧑\u200d🔬"}
    assert read_records(write_record(tmp_path / "other", named).parent.parent)[0]["system"] == named["system"]
    path = write_record(tmp_path, record(note="plain"))
    path.write_text(path.read_text().replace('"plain"', json.dumps(text)))
    with pytest.raises(InputError, match=f"control characters.*{path.name}"):
        read_records(tmp_path)


def test_every_interval_and_p_goes_by_the_clusters_of_the_queries_that_are_recorded(tmp_path):
    records, table = read_records(study(tmp_path, seeds=2)), values(1)
    shared = {query_id: number // 4 for number, query_id in enumerate(table.index)}
    known = [*records, record("queries", "relevant documents", result={"words": {}, "clusters": shared})]
    alone, together = (final_table(found).set_index("system") for found in (records, known))
    for name in ("RR@100 low", "RR@100 high", "low", "p"):
        assert alone.loc["nano-mamba", name] != together.loc["nano-mamba", name], name
    alone, together = (seed_by_seed(found) for found in (records, known))
    assert (alone["p"] != together["p"]).all() and (alone["low"] != together["low"]).all()
    given = {"bm25": [table], "x": [values(2)]}, dict(zip(table.index, range(40), strict=True))
    alone, together = by_words(*given, parts=2), by_words(*given, parts=2, shared=shared)
    assert (alone["low"] != together["low"]).all()
    alone, together = (measured(table, clusters)["measures"]["RR@100"] for clusters in (None, shared))
    assert alone["mean"] == together["mean"] and alone["low"] != together["low"]
