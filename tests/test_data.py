"""data/: the published figures with their sources."""

from pathlib import Path

import pytest

from rankmamba.reporting.published import beside_ours, published
from rankmamba.results import read_records
from rankmamba.systems import SYSTEMS

ROOT = Path(__file__).resolve().parent.parent


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
