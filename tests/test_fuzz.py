"""A short run of the fuzzer (tests/fuzz.py) over every target: a result or an `InputError`, and nothing is read wrongly."""

import importlib.util
import math
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutated_inputs_give_a_result_or_an_input_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where an input that breaks a rule is kept
    wanted = math.ceil(300 * fuzz.TARGETS[name].weight)
    inputs, accepted = fuzz.fuzz(name, wanted, math.inf, seed=1)
    assert inputs == wanted and (accepted or wanted < 100)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_is_sound_is_accepted(name, tmp_path):
    assert all(fuzz.check(name, data, tmp_path) for data in fuzz.seeds(name))
