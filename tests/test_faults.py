"""What goes wrong outside (a full or read-only disk, damaged files, a dead kernel, a clock that jumps, Ctrl-C) ends in one clear
error that names the file and what to do, and loses nothing."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import torch

from rankmamba import study
from rankmamba.batch import parameters
from rankmamba.collection import load
from rankmamba.data.formats import write_documents, write_qrels, write_queries
from rankmamba.data.runs import write_run
from rankmamba.errors import InputError
from rankmamba.experiment import Experiment
from rankmamba.files import replacing, write_text
from rankmamba.reranker import Reranker
from rankmamba.reranking.resumable import Journal
from rankmamba.results import fingerprint, new_record, read_records, write_record
from rankmamba.states import DocumentStates
from rankmamba.train import TrainConfig

DOCUMENTS = {f"d{n}": f"document {n} tells of rivers" for n in range(40)}


@pytest.fixture(scope="module")
def reranker():
    torch.manual_seed(0)
    return Reranker.from_pretrained("tiny-mamba", dtype=torch.float32, max_length=64, max_query_length=16)


@pytest.fixture(scope="module")
def collection():
    return load("rankmamba/tiny/test")


# ------------------------------------------------------------------------------------------------- disks that take no more


@contextmanager
def mounted(folder: Path, options: str):
    """A small file system of its own, or None where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full_disk(tmp_path: Path):
    """A folder whose disk holds 64 kB; without the right to mount one, no file may grow beyond 4 kB."""
    with mounted(tmp_path / "full", "size=64k") as folder:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if folder is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            yield folder or tmp_path / "full"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def read_only_disk(tmp_path: Path):
    """A folder that nobody may write to, root neither; without the right to mount one, by its permissions."""
    with mounted(tmp_path / "read-only", "size=64k") as folder:
        if folder is None:
            if os.geteuid() == 0:
                pytest.skip("root ignores permissions, and may not mount here")
            folder = tmp_path / "read-only"
            folder.chmod(0o555)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        try:
            yield folder
        finally:
            folder.chmod(0o755) if os.access(folder, os.W_OK) else None


BIG = "x" * 200_000


def long_ids(table):
    return table.assign(query_id=table["query_id"] + "x" * 5_000)


RECORD = new_record("data", "x", "set/test", "tiny", 0, {}, {"text": BIG})
WRITERS = {
    "text": lambda path, **_: write_text(path / "file", BIG),
    "record": lambda path, **_: write_record(path, RECORD),
    "journal": lambda path, **_: Journal(path / "file", {}).add({"text": BIG}),
    "documents": lambda path, **_: write_documents(path / "file", [("d", BIG)]),
    "queries": lambda path, **_: write_queries(path / "file", {"q": BIG}),
    "run": lambda path, collection, **_: write_run(path / "file", long_ids(collection.candidates), "bm25"),
    "qrels": lambda path, collection, **_: write_qrels(path / "file", long_ids(collection.qrels)),
    "model": lambda path, reranker, **_: reranker.save_pretrained(path / "file"),
    "states": lambda path, reranker, **_: DocumentStates.build(reranker, DOCUMENTS, path / "file"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("disk", [full_disk, read_only_disk], ids=lambda disk: disk.__name__)
def test_a_disk_that_takes_no_more_is_one_error_with_the_path_and_a_remedy(writer, disk, reranker, collection, tmp_path):
    with disk(tmp_path) as folder:
        with pytest.raises(InputError, match=r"expected .*write|disk for the states") as error:
            WRITERS[writer](folder, reranker=reranker, collection=collection)
        assert str(folder) in str(error.value)
        assert any(remedy in str(error.value) for remedy in ("free some space", "limit on file sizes", "choose a folder"))
        left = [path for path in folder.rglob("*") if path.is_file()]
        assert not left or writer in ("journal", "states")


def test_a_full_disk_loses_nothing_and_with_room_again_the_work_goes_on(tmp_path, reranker):
    with full_disk(tmp_path) as folder:
        write_text(folder / "kept", "before")
        journal = Journal(folder / "journal", {"of": 1})
        journal.add({"piece": 1})
        with pytest.raises(InputError, match="free some space|limit on file sizes"):
            write_text(folder / "kept", BIG)
        with pytest.raises(InputError, match="free some space|limit on file sizes"):
            journal.add({"piece": BIG})
        assert (folder / "kept").read_text() == "before"
        again = Journal(folder / "journal", {"of": 1})
        assert again.pieces == [{"piece": 1}]
        again.add({"piece": 2})
        assert Journal(folder / "journal", {"of": 1}).pieces == [{"piece": 1}, {"piece": 2}]


def test_another_error_inside_a_write_keeps_its_class_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text((tmp_path / "absent").read_text())
    assert not list(tmp_path.iterdir())


def test_a_file_never_takes_the_place_of_a_folder_and_a_folder_in_a_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "folder" / "precious", "years of work")
    with pytest.raises(InputError, match="the folder .*; name a file in it"):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(InputError, match="choose a folder that is not a file"):
        write_text(tmp_path / "folder" / "precious" / "new", "text")
    assert (tmp_path / "folder" / "precious").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_killed_processes_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("in the making")
        left_over = tmp_path / temporary.parent.name.replace(f"-{os.getpid()}-", f"-{int(dead.stdout)}-")
        same_number = tmp_path / f"{temporary.parent.name.rpartition('-')[0]}-before"  # where a container was started again
        left_over.mkdir(), same_number.mkdir()
        write_text(tmp_path / "file", "another writer's")
        assert not left_over.exists() and not same_number.exists() and temporary.is_file()
    assert (tmp_path / "file").read_text() == "in the making"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_private_is_private_when_it_has_been_replaced(tmp_path):
    for name, mode, make in (("queries.tsv", 0o600, Path.touch), ("model", 0o700, Path.mkdir)):
        make(tmp_path / name)
        (tmp_path / name).chmod(mode)
        with replacing(tmp_path / name) as temporary:
            make(temporary)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_where_modes_cannot_be_changed_files_are_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    for text in ("old", "new"):
        write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("name", ["model", "replaced"])
def test_a_folder_is_still_there_after_a_kill_or_an_error_between_its_two_renames(tmp_path, monkeypatch, name):
    old, path = {"weights": "old"}, tmp_path / name

    def contents():
        return {file.name: file.read_text() for file in path.iterdir()}

    def write(text):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(text)

    write("old")
    killed = f"""
import os
from rankmamba.files import replacing
os.replace = lambda *paths: os.kill(os.getpid(), 9)
with replacing({str(path)!r}) as temporary:
    temporary.mkdir()
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -signal.SIGKILL and not path.exists()
    with pytest.raises(ZeroDivisionError), replacing(path):
        assert contents() == old  # the next writer gave it back before anything else
        raise ZeroDivisionError
    assert contents() == old
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write("new")
    assert contents() == old and [left.name for left in tmp_path.iterdir()] == [name]


# ------------------------------------------------------------------------------------------------------------ damaged files


def test_a_journal_drops_what_was_cut_or_altered_and_a_foreign_one_is_begun_anew(tmp_path):
    journal = Journal(tmp_path / "j", {"of": 1})
    for piece in range(3):
        journal.add({"piece": piece})
    whole = journal.path.read_bytes()
    pieces = [{"piece": piece} for piece in range(3)]
    header = whole.index(b"\n") + 1
    for end in range(len(whole)):
        journal.path.write_bytes(whole[:end])
        found = Journal(journal.path, {"of": 1}).pieces
        assert found == pieces[: max(0, whole[:end].count(b"\n") - 1)]
        assert whole.startswith(journal.path.read_bytes()) and journal.path.stat().st_size >= header
    for place in range(header, len(whole)):
        journal.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = Journal(journal.path, {"of": 1}).pieces
        assert found == pieces[: whole[:place].count(b"\n") - 1]
    assert Journal(journal.path, {"of": 2}).pieces == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study with a first stage and a trained system."""
    experiment = Experiment(tmp_path_factory.mktemp("study"), "rankmamba/tiny", "tiny")
    experiment.first_stage("bm25", 0.9, 0.4)
    experiment.train(TrainConfig("tiny-mamba", max_steps=1, group_size=2, batch_size=2, max_length=64, max_query_length=16))
    experiment.rerank("tiny-mamba", "bm25", top_k=5, show_progress=False)
    return experiment


def test_a_run_that_was_cut_at_a_line_is_noticed_by_its_record(trained):
    for system in ("bm25", "tiny-mamba"):
        path = trained.run_path(system, "test")
        whole = path.read_text()
        path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
        try:
            with pytest.raises(
                InputError, match=r"expected \d+ results, got \d+ .*delete the file and run its step again"
            ) as error:
                trained.run(system, "test")
            assert str(path) in str(error.value)
        finally:
            path.write_text(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "missing"])
def test_a_damaged_model_folder_is_one_error_that_names_it(name, damage, reranker, tmp_path):
    folder = tmp_path / "model"
    reranker.save_pretrained(folder)
    whole = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff\x00" + whole[::-1]}[damage])
    if (name, damage) == ("tokenizer_config.json", "missing"):
        return  # tokenizer.json says it all
    with pytest.raises(InputError, match=str(folder)):
        Reranker.from_pretrained(folder)


def rewrite(folder: Path, change) -> None:
    """Change the tensors {name: tensor} of a model folder in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("score.weight"),
        lambda tensors: tensors.update({"score.weight": torch.zeros(1, 3)}),
        lambda tensors: tensors.update({"score.weight": torch.full_like(tensors["score.weight"], float("nan"))}),
    ],
    ids=["a missing tensor", "another shape", "NaN"],
)
def test_weights_that_do_not_fit_are_refused_and_never_started_from_random(change, reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", change)
    with pytest.raises(InputError, match="score.weight"):
        Reranker.from_pretrained(tmp_path / "model")


def test_a_model_folder_with_pickled_weights_is_refused_and_nothing_in_it_runs(reranker, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    reranker.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"score.weight": Trap()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        Reranker.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("model_type", ["rankmamba", "unheard-of"])
def test_code_in_a_model_folder_is_never_run(model_type, reranker, tmp_path, monkeypatch):
    reranker.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "trap.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    if model_type == "rankmamba":
        Reranker.from_pretrained(tmp_path / "model")
    else:
        with pytest.raises(InputError, match="code"):
            Reranker.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "sprung").exists()


def resealed(folder: Path, change) -> None:
    """Change the manifest of a store of states as somebody would who knows its checksum."""
    from rankmamba.states.reader import sealed

    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    change(manifest)
    (folder / "manifest.json").write_text(sealed(manifest))


@pytest.mark.parametrize("name", ["../outside.bin", "{outside}", "sub/../../outside.bin"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(name, reranker, tmp_path):
    DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s")
    (tmp_path / "outside.bin").write_text("secret")
    (tmp_path / "s" / "sub").mkdir()
    name = name.format(outside=tmp_path / "outside.bin")
    resealed(tmp_path / "s", lambda manifest: manifest["sha256"].update({name: "0" * 64}))
    with pytest.raises(InputError, match=r"the checksums of table\.bin"):
        DocumentStates.open(tmp_path / "s", reranker)


@pytest.mark.parametrize("name", ["states.bin", "table.bin", "ids.bin", "lookup.bin"])
def test_a_file_of_a_store_cannot_be_a_link_to_elsewhere(name, reranker, tmp_path):
    DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s")
    (tmp_path / "s" / name).rename(tmp_path / name)
    (tmp_path / "s" / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}, found none in that folder"):
        DocumentStates.open(tmp_path / "s", reranker)


def test_states_are_never_written_through_a_link(reranker, tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "states.bin").symlink_to(tmp_path / "thesis")
    with pytest.raises(InputError, match=r"or one of states, got .*states\.bin in it"):
        DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s")
    assert (tmp_path / "thesis").read_text() == "years of work"


# -------------------------------------------------------------------------------------------------------- clock and kernel


def test_a_clock_that_jumps_changes_no_result_and_no_time_taken(trained, tmp_path, monkeypatch):
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + (-1) ** next(jumps) * 3e8)  # ten years to and fro
    experiment = Experiment(tmp_path, "rankmamba/tiny", "tiny")
    experiment.first_stage("bm25", 0.9, 0.4)
    experiment.train(TrainConfig("tiny-mamba", max_steps=1, group_size=2, batch_size=2, max_length=64, max_query_length=16))
    record = experiment.rerank("tiny-mamba", "bm25", top_k=5, show_progress=True)
    assert [fingerprint(found) for found in read_records(tmp_path)] == [fingerprint(r) for r in read_records(trained.folder)]
    for found in read_records(tmp_path):
        assert all(0 < value < 1e6 for value in found["timing"].values())
    later = record | {"created": "1970-01-01T00:00:00+00:00"}  # the clock went back
    write_record(tmp_path, later)
    assert read_records(tmp_path, "rerank") == [later]


DECLARED = 'scale: str = ""\nresults: str = ""\ninteractive: bool = False\ncollection: str = "rankmamba/tiny"'


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder of notebooks of its own; called with the code of cells, it writes 01_test."""
    folder = tmp_path / "notebooks"
    (folder / "scales").mkdir(parents=True)
    (folder / "scales" / "test.yaml").write_text("parameters: {}\nminutes: {}\n")
    monkeypatch.setattr(parameters, "NOTEBOOKS", folder)
    monkeypatch.setattr(study, "NOTEBOOKS", folder)

    def write(*code: str) -> Path:
        declared = nbformat.v4.new_code_cell(DECLARED)
        declared.metadata["tags"] = ["parameters"]
        cells = [declared, *map(nbformat.v4.new_code_cell, code)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "01_test.ipynb")
        return folder

    return write


def executed(results: Path) -> list:
    return [cell for cell in nbformat.read(results / "notebooks" / "01_test.ipynb", as_version=4).cells if "source" in cell]


def test_a_dead_kernel_ends_the_study_with_a_message_and_keeps_the_copy(notebooks, tmp_path, capsys):
    notebooks("print('done before')", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "print('never')")
    assert study.main(["--scale", "test", "--results", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "01_test.ipynb" in said and "died" in said and "memory" in said and "Traceback" not in said
    assert str(tmp_path / "out" / "notebooks" / "01_test.ipynb") in said
    outputs = [output.get("text") for cell in executed(tmp_path / "out") for output in cell.get("outputs", [])]
    assert outputs == ["done before\n"]


def test_the_notebooks_themselves_are_never_overwritten_by_executed_copies(notebooks, tmp_path, monkeypatch, capsys):
    source = notebooks("print(1)") / "01_test.ipynb"
    before = source.read_bytes()
    monkeypatch.chdir(tmp_path)
    for results in (".", "", str(tmp_path)):
        assert study.main(["--scale", "test", "--results", results]) == 1
        assert f"expected a folder of its own for the results, got {tmp_path}" in capsys.readouterr().err
    assert source.read_bytes() == before and not (tmp_path / ".lock").exists()


def test_ctrl_c_ends_the_study_within_two_seconds_and_leaves_everything_consistent(notebooks, tmp_path):
    folder = notebooks(
        "from rankmamba.results import new_record, write_record\n"
        "for n in range(3):\n    write_record(results, new_record('data', f'x{n}', 'set/test', scale, 0, {}, {}))",
        "import os, pathlib, time\npathlib.Path(results, 'busy').write_text(str(os.getpid()))\n"
        "while True:\n    sum(range(10**6))",
    )
    program = (
        f"import pathlib, sys\nfrom rankmamba import study\nfrom rankmamba.batch import parameters\n"
        f"parameters.NOTEBOOKS = study.NOTEBOOKS = pathlib.Path({str(folder)!r})\nsys.exit(study.main(sys.argv[1:]))"
    )
    results = tmp_path / "out"
    command = [sys.executable, "-c", program, "--scale", "test", "--results", str(results)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not (results / "busy").is_file() or not (results / "busy").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        kernel = int((results / "busy").read_text())
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
        busy = max(1, os.getloadavg()[0] / len(os.sched_getaffinity(0)))  # so many others want each processor
        assert time.monotonic() - started < 2 * busy
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert len(read_records(results)) == 3
    assert executed(results)[1]["execution_count"] == 1 + 1
    with pytest.raises(ProcessLookupError):  # the kernel is gone too
        os.kill(kernel, 0)


def test_a_study_that_nobody_may_write_says_so(notebooks, tmp_path, capsys):
    notebooks("print(1)")
    with read_only_disk(tmp_path) as folder:
        assert study.main(["--scale", "test", "--results", str(folder / "out")]) == 1
        assert str(folder) in (said := capsys.readouterr().err) and "choose a folder" in said and "Traceback" not in said
