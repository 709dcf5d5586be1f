"""data/: the defects that are guarded by tests that exist, the published figures with their sources."""

import ast
import re
from pathlib import Path

import pytest

from rankmamba.reporting.published import beside_ours, published
from rankmamba.results import read_records
from rankmamba.systems import SYSTEMS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "data" / "README.md").read_text(encoding="utf-8")


def test_every_defect_of_the_original_code_names_a_test_that_exists():
    section = README.partition("## What we do differently")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| in the original")]
    assert len(rows) >= 15
    for row in rows:
        file, _, name = re.search(r"`(test_\w+\.py)::(test_\w+)`", row)[0].strip("`").partition("::")
        functions = [
            node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(node, ast.FunctionDef)
        ]
        assert name in functions, row


def test_every_file_that_the_readme_of_the_data_names_exists():
    for path in re.findall(r"`(rankmamba/\w+\.py)`", README):
        assert (ROOT / path).is_file(), path


def test_every_published_figure_has_a_source_says_how_sure_it_is_and_stands_once():
    table = published()
    assert set(table["sure"]) == {"read", "second hand", "contradicted"}
    assert (table[["system", "collection", "measure", "source"]] != "").all().all()
    assert not table.duplicated(["system", "collection", "measure", "source"]).any()
    assert (table["value"] > 0).all() and (table.loc[table["measure"].str.contains("@"), "value"] < 1).all()
    pins = table[table["source"].str.contains("2403.18276")].set_index("system")["value"]
    assert pins.to_dict() == {"bert-base": 0.4126, "mamba-130m": 0.4089, "mamba-370m": 0.425, "roberta-large": 0.4334}
    assert set(pins.index) <= set(SYSTEMS) and not (table.loc[table["system"].isin(pins.index), "sure"] == "read").any()


def test_a_study_on_another_collection_shows_the_published_figures_alone():
    table = beside_ours(read_records(ROOT / "data" / "quick"))
    assert len(table) > 20 and table["ours"].isna().all() and table["collection"].str.startswith("msmarco-document/").all()
    dev = table[(table["collection"] == "msmarco-document/dev") & (table["measure"] == "RR@100")]
    assert dev["value"].is_monotonic_decreasing and dev.iloc[0]["value"] == pytest.approx(0.512)
