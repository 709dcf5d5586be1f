"""The batch runner is strict: what it does not know or cannot do ends it with one clear sentence and a non-zero exit."""

import subprocess
import sys
import threading

import nbformat
import papermill
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, MambaConfig, MambaModel

from rankmamba import files, study
from rankmamba.batch import parameters
from rankmamba.data.packages import package_folder
from rankmamba.errors import InputError
from rankmamba.files import alone
from rankmamba.reranking.saved import WEIGHTS
from rankmamba.results import read_records
from rankmamba.systems import MINILM


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--scale", "huge"], "expected a scale among"),
        (["--scale", "tiny", "--only", "99"], "expected notebook numbers"),
        (["--scale", "tiny", "-p", "max_stepz=3"], "max_stepz"),
        (["--scale", "tiny", "-p", "max_steps"], "expected -p name=value"),
        (["--scale", "tiny", "-p", "max_steps=[1"], "expected YAML"),
        (["--scale", "tiny", "--only", "02", "-p", "top_k=3"], "top_k"),
        (["--scale", "tiny", "-p", "max_steps=200"], "a value of type dict for max_steps, got 200"),
        (["--scale", "tiny", "-p", "results=elsewhere"], "expected parameters among"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_runs(arguments, says, tmp_path, capsys):
    assert study.main([*arguments, "--results", str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_record_ends_the_run_and_says_how_to_make_it(tmp_path, capsys):
    assert study.main(["--scale", "tiny", "--only", "03", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "03_rerank.ipynb failed" in said and "run 02_train" in said and "Traceback" not in said


def test_a_failing_cell_keeps_the_copy_up_to_there(tmp_path, capsys):
    assert study.main(["--scale", "tiny", "--only", "01", "-p", "collection=rankmamba/none", "--results", str(tmp_path)]) == 1
    assert "rankmamba/none" in capsys.readouterr().err
    cells = nbformat.read(tmp_path / "notebooks" / "01_data.ipynb", as_version=4).cells
    assert [cell for cell in cells if cell.get("execution_count")] and [
        output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"
    ]


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("[a, b]", ["a", "b"]),
        ("no", "no"),
        ("{a: 1e-3}", {"a": 1e-3}),
        ("rankmamba/nq", "rankmamba/nq"),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_a_parameter_means_what_it_looks_like(text, value):
    assert study.parse_parameters([f"name={text}"]) == {"name": value}


def test_a_scale_file_of_another_form_is_refused(tmp_path, monkeypatch):
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "odd.yaml").write_text("parameters: 3\n")
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path)
    with pytest.raises(InputError, match="two mappings"):
        parameters.read_scale("odd")


@pytest.mark.parametrize("path", parameters.notebooks(), ids=lambda path: path.stem)
def test_parameters_are_read_as_papermill_reads_them(path):
    theirs = {name: parameter["inferred_type_name"] for name, parameter in papermill.inspect_notebook(path).items()}
    assert {name: kind for name, (kind, _) in parameters.declared(path).items()} == theirs


def test_a_finished_study_leaves_a_record_of_what_it_ran_with(tmp_path):
    settings = parameters.settle("tiny", "01", {"n_test": 5})
    study.leave_record(tmp_path, "tiny", "01", settings, 1.5)
    (record,) = read_records(tmp_path, "study")
    assert record["config"]["notebooks"] == ["01_data"] and record["config"]["parameters"]["n_test"] == 5
    assert record["config"]["parameters"]["systems"] == parameters.read_scale("tiny")["parameters"]["systems"]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"systems": []}, "at least one system"),
        ({"seed": -1}, "seed from 0 to 4294967295, got -1"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"learning_rates": {"default": "fast"}}, "learning_rate of at least 0, got 'fast'"),
        ({"learning_rates": {"default": 1e-3, "tiny-brt": 0.1}}, "in learning_rates, got tiny-brt"),
        ({"max_steps": {"tiny-bert": 3}}, "a value for default in max_steps"),
        ({"systems": ["tiny-bert", 1]}, "names of systems, got 1"),
        ({"n_test": 0}, "n_test of at least 1, got 0"),
        ({"first_stage": "BM25"}, "bm25 or given as first_stage, got 'BM25'"),
        ({"measure": "P@5"}, "a measure among nDCG@10, RR@10, RR@100, AP@100, got 'P@5'"),
        ({"top_k": 0}, "top_k of at least 1, got 0"),
        ({"max_passages": 0}, "max_passages of at least 1, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_would_fail_in_the_midst_of_a_study_is_refused_before_it_begins(wrong, said):
    with pytest.raises(InputError, match=said):
        parameters.settle("tiny", None, wrong)


def test_a_folder_named_from_the_current_one_is_found_from_the_notebooks_and_an_id_stays_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine/test", "rankmamba/tiny/test", "models/mamba", "tiny-bert"):
        (tmp_path / name).mkdir(parents=True)
    given = {"collection": "mine", "transfer_collections": ["rankmamba/tiny/test", "./rankmamba/tiny/test", "mine/test"]}
    given |= {"systems": ["tiny-bert", "models/mamba"], "max_steps": {"models/mamba": 3, "default": 2}}
    settings = parameters.settle("tiny", None, given)
    assert settings["systems"] == ["tiny-bert", str(tmp_path / "models/mamba")]
    assert settings["max_steps"] == {str(tmp_path / "models/mamba"): 3, "default": 2}
    assert settings["collection"] == str(tmp_path / "mine")
    assert settings["transfer_collections"] == [
        "rankmamba/tiny/test",
        str(tmp_path / "rankmamba/tiny/test"),
        str(tmp_path / "mine/test"),
    ]


def test_a_results_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert study.main(["--scale", "tiny", "--results", str(tmp_path / "notes")]) == 1
    assert "choose a folder that is not a file" in capsys.readouterr().err and (tmp_path / "notes").read_text() == "mine"


def test_two_studies_in_one_folder_go_one_after_another(tmp_path, monkeypatch):
    order, waits = [], threading.Event()
    monkeypatch.setattr(files, "print", lambda text, **_: text == "waits" and waits.set(), raising=False)

    def other():
        with alone(tmp_path / ".lock", "waits"):
            order.append("other")

    with alone(tmp_path / ".lock", "waits"):
        thread = threading.Thread(target=other)
        thread.start()
        assert waits.wait(60)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


@pytest.mark.parametrize(
    "command", [["rankmamba.study", "--help"], ["rankmamba.study", "-p", "nothing=3"], ["rankmamba.results", "--help"]]
)
def test_a_command_line_answers_without_importing_what_takes_seconds(command):
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code, *command], capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "rankmamba.errors" in imported and not imported & {"torch", "transformers", "papermill", "pandas", "scipy"}


def test_what_remains_is_the_plan_on_this_machine_and_what_was_done_before_shortens_nothing():
    assert study.remaining(0, [], [60, 120]) == 180
    assert study.remaining(90, [60], [120]) == 180  # half as fast again as planned
    assert study.remaining(1, [60], [120]) == 120  # the first was found finished


def test_a_checkpoint_in_a_folder_and_a_saved_reranker_run_through_the_study_and_nothing_lands_outside_its_results(tmp_path):
    folder, results = tmp_path / "checkpoints" / "mamba", tmp_path / "results"
    tokenizer = AutoTokenizer.from_pretrained(package_folder(MINILM[0]) / MINILM[1])
    tokenizer.save_pretrained(folder)
    MambaModel(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)).save_pretrained(folder)
    study.run("tiny", "01,02,03,04,06", {"systems": [str(folder)]}, results)
    assert [path.name for path in folder.parent.iterdir()] == ["mamba"]
    assert {record["system"] for record in read_records(results, "states")} == {str(folder)}
    assert len(list((results / "models").glob("*mamba*"))) == 1 and len(list((results / "runs").glob("*mamba*.run"))) == 4

    trained, further = next((results / "models").glob("*mamba*")), tmp_path / "further"
    study.run("tiny", "01,02", {"systems": [str(trained)], "learning_rates": {"default": 1e-12}}, further)
    before, after = (load_file(path / WEIGHTS) for path in (trained, next((further / "models").glob("*-seed0"))))
    for name, weight in before.items():
        assert torch.allclose(weight, after[name], atol=1e-7), name


def test_a_name_in_a_record_stays_text_in_the_report(tmp_path):
    name = "nano<meta http-equiv=refresh content='0;url=http://127.0.0.1'><plaintext>"
    outputs = [nbformat.v4.new_output("display_data", {"text/markdown": f"**{name}**"})]
    cells = [nbformat.v4.new_markdown_cell("# A title"), nbformat.v4.new_code_cell("", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "07_report.ipynb")
    study.export_report(tmp_path / "07_report.ipynb", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>A title</title>" in html and "&lt;plaintext" in html
    assert "<plaintext" not in html and "<meta http-equiv=refresh" not in html
