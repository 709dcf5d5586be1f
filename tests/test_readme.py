"""The README promises only what is there: its table comes from committed records, its commands and files exist."""

import re

import pytest

import run
from rankmamba.results import read_records
from rankmamba.study import NOTEBOOKS, ROOT
from rankmamba.tables import final_table, format_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("study", ["quick", "study"])
def test_the_tables_are_those_that_the_committed_records_give(study):
    assert format_table(final_table(read_records(ROOT / "data" / study))) in README


def test_every_command_of_run_py_in_it_exists():
    commands = set(re.findall(r"python3 run\.py (\w+)", README))
    assert {"study", "test"} <= commands <= {*run.MODULE, "doctor"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)|`((?:data|notebooks|rankmamba)/[\w./]+)`", README))))
def test_every_file_it_names_exists(path):
    assert (ROOT / (path[0] or path[1])).exists()


def test_every_notebook_is_in_its_list():
    for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"):
        assert f"`{path.stem}`" in README
