"""The batch runner is strict: what it does not know or cannot do ends it with one clear sentence and a non-zero exit."""

import nbformat
import pytest

from rankmamba import study
from rankmamba.errors import InputError


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--scale", "huge"], "expected a scale among"),
        (["--scale", "tiny", "--only", "99"], "expected notebook numbers"),
        (["--scale", "tiny", "-p", "max_stepz=3"], "max_stepz"),
        (["--scale", "tiny", "-p", "max_steps"], "expected -p name=value"),
        (["--scale", "tiny", "-p", "max_steps=[1"], "expected a value in YAML"),
        (["--scale", "tiny", "--only", "02", "-p", "top_k=3"], "top_k"),
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
    [("3", 3), ("1e-3", 1e-3), ("true", True), ("[a, b]", ["a", "b"]), ("rankmamba/nq", "rankmamba/nq"), ("{a: 1}", {"a": 1})],
)
def test_a_parameter_means_what_it_looks_like(text, value):
    assert study.parse_parameters([f"name={text}"]) == {"name": value}


def test_a_scale_file_of_another_form_is_refused(tmp_path, monkeypatch):
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "odd.yaml").write_text("parameters: 3\n")
    monkeypatch.setattr(study, "NOTEBOOKS", tmp_path)
    with pytest.raises(InputError, match="two mappings"):
        study.read_scale("odd")
