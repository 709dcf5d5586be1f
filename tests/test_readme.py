"""The README promises only what is there: its table comes from committed records, its commands and files exist."""

import re
import shlex
import shutil

import pandas as pd
import pytest

import run
from rankmamba import learning_rates, pretraining_seeds, transfer
from rankmamba.evaluate import mean_interval
from rankmamba.pairwise import across, pairwise, trained_alike
from rankmamba.profiling import tables as profile_tables
from rankmamba.reporting.tables import final_table, format_table, per_query_values, shared_documents
from rankmamba.results import read_records
from rankmamba.states import trials
from rankmamba.study import NOTEBOOKS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "data" / "study" / "README.md").read_text(encoding="utf-8")
NAMES = {"BERT": "bert", "GPT-NeoX": "neox", "OPT": "opt", "T5": "t5", "Mamba": "mamba", "Mamba-2": "mamba2", "hybrid": "hybrid"}


@pytest.mark.parametrize("study", ["quick", "study"])
def test_the_tables_are_those_that_the_committed_records_give(study):
    assert format_table(final_table(read_records(ROOT / "data" / study))) in README


def test_the_pairs_of_architectures_in_the_evidence_are_those_of_the_records():
    records = read_records(ROOT / "data" / "study")
    table = pairwise(per_query_values(records), across(trained_alike(records), records), shared=shared_documents(records))
    quoted = {
        (row.system, row.other): f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}], p {row.p_holm:.1g}"
        for row in table.itertuples()
    }
    for ahead in ("BERT", "GPT-NeoX"):
        cells = [quoted[f"nano-{NAMES[ahead]}", f"nano-{NAMES[behind]}"] for behind in ("Mamba", "Mamba-2")]
        assert f"| {ahead} | {' | '.join(cells)} |" in EVIDENCE


def test_the_gains_by_reading_more_in_the_evidence_are_those_of_the_records():
    gains = transfer.gains(read_records(ROOT / "data" / "study", "transfer"))
    for name, system in NAMES.items():
        assert f"| {name} | {gains.loc[f'nano-{system}'].iloc[-1]} |" in EVIDENCE


def test_the_table_of_pretrainings_in_the_evidence_is_that_of_the_records():
    found = pretraining_seeds.table(read_records(ROOT / "data" / "pretraining_seeds"))
    assert found.to_string(float_format="{:.3f}".format) in EVIDENCE


def test_the_tables_of_learning_rates_in_the_evidence_are_those_of_the_records():
    records = [record for folder in (ROOT / "data" / "rates" / "full").iterdir() for record in read_records(folder)]
    found = learning_rates.table(records).sort_values(["system", "learning rate"])
    assert found.to_string(index=False, float_format="{:.5g}".format) in EVIDENCE
    values = {(r["system"], r["config"]["learning_rate"]): pd.Series(r["result"]["per_query"]) for r in records}
    own = found[found["best"]].set_index("system")["learning rate"]

    def cell(ahead: str, behind: str, rates: dict) -> str:
        difference = values[ahead, rates[ahead]] - values[behind, rates[behind]]
        mean, low, high = mean_interval(difference.sort_index())
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"

    for where, rates in (("all at 2e-4", dict.fromkeys(own.index, 2e-4)), ("each at its own", own)):
        for name in ("BERT", "GPT-NeoX"):
            cells = [cell(f"nano-{NAMES[name]}", f"nano-{NAMES[behind]}", rates) for behind in ("Mamba", "Mamba-2")]
            assert f"| {name}, {where} | {' | '.join(cells)} |" in EVIDENCE
    for (system, _), tried in values.items():
        _, low, high = mean_interval(tried - values[system, 2e-4])
        assert low <= 0 <= high


def test_what_is_said_of_paragraphs_of_other_sources_is_what_the_records_say():
    read = transfer.by_reading(read_records(ROOT / "data" / "study", "transfer"))
    read = read.set_index(["collection", "reading", "system"])["mean"].sort_index()
    means, readme = read["rankmamba/squad/test", "512 tokens"], " ".join(README.split())
    said = {name: f"{means[f'nano-{system}']:.3f}" for name, system in NAMES.items()}
    for name, mean in said.items():
        assert re.search(rf"{name}\s{mean}", EVIDENCE)
    for name in ("BERT", "GPT-NeoX", "Mamba", "Mamba-2"):
        assert f"{name} {said[name]}" in readme
    assert f"BM25 {means['bm25']:.3f}" in readme
    for collection, before in (("squad-long/1500", "ahead of GPT-NeoX there, by"), ("squad-long/600", "read whole, by")):
        whole = read[f"rankmamba/{collection}/test", "2048 tokens"]
        first, second = (whole[system] - whole["nano-neox"] for system in ("nano-mamba", "nano-mamba2"))
        assert f"{before} {first:.2f} and {second:.2f}" in readme


def test_the_speeds_on_a_cpu_in_the_evidence_are_those_of_the_records():
    speeds = profile_tables.speed_table(read_records(ROOT / "data" / "quick", "profile"))
    speeds = speeds.set_index(["length", "batch", "mode", "system"]).tokens_per_s.sort_index()
    for length, batch in [(128, 16), (512, 4), (2048, 1), (8192, 1)]:
        cells = []
        for mode in ("training", "inference"):
            of = speeds[length, batch, mode]
            cells += [f"{of[system] / max(of['nano-bert'], of['nano-neox']):.2f}" for system in ("nano-mamba", "nano-mamba2")]
        pattern = " [|] ".join([rf"[|] {length:,} [(]{batch}.*[)]", *map(re.escape, cells)])
        assert re.search(pattern, EVIDENCE)


def test_the_estimates_of_whole_models_are_those_of_the_record():
    speeds = profile_tables.speed_table(read_records(ROOT / "data" / "quick", "profile"))
    speeds = speeds.set_index(["mode", "length", "system"]).tokens_per_s
    short, long = (speeds["training", n, "mamba-130m"] / speeds["training", n, "pythia-160m"] for n in (512, 2048))
    assert f"on two cores, in one run, {short:.2f} and {long:.2f} of Pythia's" in " ".join(README.split())


def test_what_training_and_states_are_said_to_gain_is_what_the_records_say():
    said = " ".join(README.split())
    records = read_records(ROOT / "data" / "quick", "profile")
    speeds = profile_tables.speed_table(records)
    ratio = (
        profile_tables.against_transformers(speeds)
        .set_index(["mode", "system", "length"])["ratio"]
        .sort_index()
        .map("{:.2f}".format)
    )
    mamba, mamba2 = (ratio["training", system] for system in ("nano-mamba", "nano-mamba2"))
    assert (
        f"nano-mamba trains at {mamba[128]} to {mamba[512]} times the fastest nano Transformer's speed at 128 to 512 tokens, nano-mamba2 "
        f"at {mamba2[128]}; at 2,048 they train at {mamba[2048]} and {mamba2[2048]} times, at 8,192 at {mamba[8192]} and {mamba2[8192]} "
        "times"
    ) in said
    assert mamba2[128] == mamba2[512]
    records = read_records(ROOT / "data" / "quick", "states")
    formats, lengths = trials.format_table(records), trials.length_table(records)
    passages = formats[formats["format"] == "float32"].set_index("system")["speed-up"]
    documents = lengths[lengths["tokens"] == 1536].set_index("system")["speed-up"]
    mamba, mamba2, neox = (f"{passages[f'nano-{system}']:.1f}" for system in ("mamba", "mamba2", "neox"))
    assert f"Mamba scores passages {mamba}, Mamba-2 {mamba2} and GPT-NeoX {neox} times as fast" in said
    mamba, mamba2, neox = (f"{documents[f'nano-{system}']:.0f}" for system in ("mamba", "mamba2", "neox"))
    assert f"documents of 1,536 tokens {mamba}, {mamba2} and {neox} times" in said
    paid = trials.outlook(records, 1)
    paid = paid.loc[paid["format"] == "float32", "break-even"].round()
    assert (paid.min(), paid.max()) == (2, 4) and "scored two to four times" in said


def test_every_command_of_run_py_in_it_exists():
    commands = set(re.findall(r"python3 run\.py (\w+)", README))
    assert {"study", "test"} <= commands <= {*run.MODULE, "doctor"}


NAMED = {path for both in re.findall(r"\]\(([^)#:]+)\)|`((?:data|notebooks|rankmamba)/[\w./]+)`", README) for path in both if path}
NAMED |= set(re.findall(r"`(rankmamba/[\w/]+\.py)`", DATA))


@pytest.mark.parametrize("path", sorted(NAMED))
def test_every_file_that_it_and_the_readme_of_the_data_name_exists(path):
    assert (ROOT / path).exists()


def test_every_notebook_is_in_its_list():
    for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"):
        assert f"`{path.stem}`" in README


def test_the_committed_rates_are_printed_by_the_commands_that_are_named_and_nothing_is_trained(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "data" / "rates" / "full", tmp_path / "learning_rates")
    monkeypatch.setattr(learning_rates.Experiment, "train", None)
    commands = [shlex.split(line)[3:] for line in DATA.splitlines() if line.startswith("python -m rankmamba.learning_rates --scale full")]
    for command in commands:
        assert learning_rates.main([*command, "--results", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("nano-")]
    assert len(rows) == 12 and all(row in [line.split() for line in EVIDENCE.splitlines()] for row in rows)
