"""Fuzzing, by hand: malformed inputs by the million must give a result or an `InputError`; never a crash, a hang or a wrong reading.

    python tests/fuzz.py [TARGET ...] [--seconds 60] [--inputs 1000000] [--seed 0]
    python tests/fuzz.py --atheris run -max_total_time=60        (needs: pip install atheris)

What a reader accepts is compared with an independent reading of the same bytes and must survive being written and read again. An
input that breaks this is kept as fuzz-<target>-<digest> in the current folder; a mutation depends on nothing but seed and number.
"""

import argparse
import atexit
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ir_measures  # noqa: E402

from rankmamba import results
from rankmamba.batch import sweep
from rankmamba.batch.parameters import load_yaml, parse_parameters  # noqa: E402
from rankmamba.data import formats, lines, runs, token_store
from rankmamba.errors import InputError  # noqa: E402
from rankmamba.evaluate import parse_measure  # noqa: E402
from rankmamba.reporting import tables  # noqa: E402
from rankmamba.reranking.resumable import Journal  # noqa: E402
from rankmamba.states import reader as state_reader
from rankmamba.states import store as state_store
from rankmamba.training.config import read_config  # noqa: E402

HANG = 10  # seconds that no input may take


class Target(NamedTuple):
    """What is fuzzed: check(path, bytes) reads the file at `path`, which holds the bytes, and raises if a rule is broken."""

    check: Callable[[Path, bytes], object]
    seeds: Callable[[], list[bytes]]  # sound inputs
    words: list[bytes]
    weight: float = 1.0  # share of the inputs


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")


def check_run(path: Path, data: bytes) -> None:
    run = runs.read_run(path)
    theirs = {(row.query_id, row.doc_id): row.score for row in ir_measures.read_trec_run(io.StringIO(_text(data)))}
    assert {(q, d): s for q, d, s in zip(run["query_id"], run["doc_id"], run["score"], strict=True)} == theirs
    runs.write_run(path, run, "again")
    assert runs.read_run(path).equals(run)


def check_qrels(path: Path, data: bytes) -> None:
    qrels = formats.read_qrels(path)
    theirs = [(row.query_id, row.doc_id, row.relevance) for row in ir_measures.read_trec_qrels(io.StringIO(_text(data)))]
    assert list(qrels.itertuples(index=False, name=None)) == theirs
    formats.write_qrels(path, qrels)
    assert formats.read_qrels(path).equals(qrels)


def check_queries(path: Path, data: bytes) -> None:
    queries = formats.read_queries(path)
    rows = [line.rstrip("\r").split("\t") for line in _text(data).split("\n") if line.rstrip("\r")]
    assert [(query_id, text.strip()) for query_id, text in rows] == list(queries.items())
    formats.write_queries(path, queries)
    assert formats.read_queries(path) == queries


def check_documents(path: Path, data: bytes) -> None:
    documents = dict(formats.JsonlDocuments(path).pairs())
    for line in _text(data).split("\n"):
        if line.rstrip("\r"):
            row = json.loads(line)
            assert documents[row["doc_id"]] == (f"{row['title']} {row['text']}" if row.get("title") else row["text"])
    formats.write_documents(path, documents.items())
    assert dict(formats.JsonlDocuments(path).pairs()) == documents


def _plain(value: object) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def check_yaml(path: Path, data: bytes) -> None:
    value = load_yaml(data.decode(errors="replace"), path)
    assert _plain(value), value
    text = json.dumps(value, ensure_ascii=False)
    assert not text.isprintable() or load_yaml(text, path) == value


def check_parameter(path: Path, data: bytes) -> None:
    assert all(map(_plain, parse_parameters([data.decode(errors="replace")]).values()))


KNOWN = {"seed": ("int", 0), "learning_rate": ("float", 1e-3), "systems": ("list", [])}


def check_sweep(path: Path, data: bytes) -> None:
    sets = sweep.read_sweep(path, KNOWN)
    assert sets and all(set(values) <= set(KNOWN) and _plain(values) for values in sets)
    assert len({json.dumps(values, sort_keys=True) for values in sets}) == len(sets)


def check_record(path: Path, data: bytes) -> None:
    folder = path.parent / "study"
    try:
        name = results._file_name(json.loads(data))
    except Exception:
        name = "x.json"  # whatever is wrong with it, the reader shall say it
    name = name if len(name) < 200 else "x.json"
    path = folder / "records" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        read = results.read_records(folder)
        _tables(read)
        results.write_record(folder, read[0])
        assert results.read_records(folder) == read
    finally:
        path.unlink()


def _tables(records: list[dict]) -> None:
    """Whatever the readers of records let pass must not break the tables."""
    tables.tidy(records), tables.curves(records)
    if any(record["kind"] == "evaluate" for record in records):
        tables.format_table(tables.final_table(records))


def check_manifest(path: Path, data: bytes) -> None:
    """A manifest of somebody who knows its checksum."""
    folder = _store()
    try:
        content = json.loads(data)
        content.pop("checksum", None)
        data = state_reader.sealed(content).encode()
    except Exception:
        pass  # then as it is
    manifest = folder / state_reader.MANIFEST
    manifest.write_bytes(data)
    reader = state_reader.Reader(folder)
    assert len(reader.names) == 3 and set(reader.manifest["sha256"]) < set(os.listdir(folder))
    assert [reader.names.find(f"d{n}") for n in range(4)] == [0, 1, 2, None]


def _folder(name: str) -> Path:
    """Make a folder that is gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _store() -> Path:
    """The folder of a small store of states, made at the first call."""
    import numpy as np

    folder = _folder("store")
    writer = state_store.Writer(folder, {"dtype": "float32", "layers": None, "marked": False, "weights": "0" * 64})
    names = [f"d{n}" for n in range(3)]
    for place, name in enumerate(names):
        writer.has(name, "text", place)
    digest = writer.digest.hexdigest()
    writer.add(names, [5] * 3, [16] * 3, ((n, np.full(64, n, dtype=np.uint8)) for n in range(3)), digest)
    writer.finish(digest)
    return folder


def check_config(path: Path, data: bytes) -> None:
    config, where = read_config(path)
    assert _plain(dataclasses.asdict(config)) and _plain(where)


def check_tokens(path: Path, data: bytes) -> None:
    """The manifest of a store of tokens."""
    folder, _ = _tokens()
    (folder / "manifest.json").write_bytes(data)
    store = token_store.TokenStore(folder)
    assert list(store) == list(TEXTS) and all(len(store[name]) == len(text.split()) for name, text in TEXTS.items())


TEXTS = {"d1": "a river", "d2": "", "d3": "old books and trains"}


@functools.cache
def _tokens() -> tuple[Path, bytes]:
    """The folder of a small store of tokens, made at the first call, and its manifest."""
    from rankmamba.backbones import load_tokenizer
    from rankmamba.inputs import PairTokenizer
    from rankmamba.systems import SYSTEMS

    folder = _folder("tokens")
    token_store.TokenStore.build(formats.Documents(TEXTS), PairTokenizer(load_tokenizer(SYSTEMS["tiny-bert"]), "encoder"), folder)
    return folder, (folder / "manifest.json").read_bytes()


JOURNAL = [{"run": {"query_id": ["q"], "score": [0.5]}, "number": n} for n in range(3)]


def check_journal(path: Path, data: bytes) -> None:
    found = Journal(path, {"of": 1}).pieces
    assert found == JOURNAL[: len(found)] or not data.startswith(_journal().splitlines()[0])
    assert Journal(path, {"of": 1}).pieces == found


def _journal() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal", {"of": 1})
        for piece in JOURNAL:
            journal.add(piece)
        return journal.path.read_bytes()


def check_measure(path: Path, data: bytes) -> None:
    name = data.decode(errors="replace")
    assert parse_measure(str(parse_measure(name))) == parse_measure(name)


def check_model(path: Path, data: bytes) -> None:
    """A model folder with this config.json, the rest of it sound: it loads and scores, or is refused."""
    from rankmamba.reranker import Reranker

    folder = _model()
    (folder / "config.json").write_bytes(data)
    scores = Reranker.from_pretrained(folder).predict([("a query", "a text"), ("a query", "another text " * 9)])
    assert scores.shape == (2,)


@functools.cache
def _model() -> Path:
    """The folder of a small model, made at the first call."""
    from rankmamba.reranker import Reranker

    folder = _folder("model") / "model"
    Reranker.from_pretrained("tiny-bert", max_length=32, max_query_length=8).save_pretrained(folder)
    return folder


def _record(kind: str, result: dict, timing: dict) -> bytes:
    return json.dumps(results.new_record(kind, "x", "set/test", "tiny", 0, {"top_k": 5}, result, timing)).encode()


INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.75}
RECORDS = [
    _record("evaluate", {"measures": {"RR@100": INTERVAL}, "per_query": {"RR@100": {"q1": 0.5, "q2": 1.0}}}, {}),
    _record("train", {"tokens": 9, "parameters_outside_embeddings": 7, "curve": [{"step": 1, "loss": 2.5}]}, {"seconds": 2.0}),
    _record("rerank", {"pairs": 3}, {"pairs_per_s": 1.5}),
]
JSON_WORDS = [b"null", b"NaN", b"1e999", b"-1", b"[]", b"{}", b'""', b"true", b"\\ud800", b"\\u0000", b'"a": 1,', b"1e5", b"0.1"]
YAML_WORDS = [
    b"*a",
    b"&a",
    b"!!python/object:os.system",
    b"<<: ",
    b"? ",
    b"- ",
    b"2020-01-01",
    b"0x1F",
    b"1_000",
    b".nan",
    b".inf",
]
YAML_WORDS += [b"no", b"~", b"|\n", b">\n", b"!!binary ", b"1e-3", b"%YAML 1.1\n---\n", b"\n", b": ", b"{", b"[", b"'", b'"']
TREC_WORDS = [
    b" ",
    b"\t",
    b"\n",
    b"\r",
    b"\r\n",
    b"nan",
    b"inf",
    b"1_0",
    b"-0",
    b"1e400",
    b"0x1",
    b"\xc2\xa0",
    b"\x1c",
    b"\xef\xbb\xbf",
]
TREC_WORDS += [b"\xe2\x80\xa8", b"\xd9\xa1", b"\x00", b"q1", b"d1", b"99999999999999999999", b"Q0", b"\x85", b"\xed\xa0\x80"]
PATHS = [b"../", b"/etc/passwd"]
MEASURE_WORDS = [b"@", b"(", b")", b"rel=", b"'", b"__", b",", b"1e9"]
SWEEP = b"seed: [0, 1, 2]\nlearning_rate: [1e-3, 2e-3]\n"

CONFIG = b"system: tiny-bert\ncollection: rankmamba/tiny\nfolder: x\nlearning_rate: 1e-3\nbf16: true\nmax_steps: 3\n"

TARGETS = {
    "run": Target(check_run, lambda: [b"q1 Q0 d1 1 2.5 t\nq1 Q0 d2 2 -1e-3 t\nq2 0 d1 1 7 t\n"], TREC_WORDS),
    "qrels": Target(check_qrels, lambda: [b"q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 -1\n"], TREC_WORDS),
    "queries": Target(
        check_queries, lambda: [b"q1\twho wrote hamlet\nq2\tcat\n", b"\xef\xbb\xbfq1\ta b\r\n\r\nq2\tc"], TREC_WORDS, 4
    ),
    "documents": Target(
        check_documents,
        lambda: [b'{"doc_id": "d1", "text": "a"}\n{"doc_id": "d2", "title": "b", "text": ""}\n'],
        JSON_WORDS + TREC_WORDS,
        3,
    ),
    "yaml": Target(
        check_yaml, lambda: [b"parameters:\n  a: 1\n  b: [x, 'y', 1e-3]\nminutes: {c: 2.5}\n", SWEEP], YAML_WORDS, 0.1
    ),
    "parameter": Target(check_parameter, lambda: [b"seed=3", b"a=[1, x]", b"b={c: 1e-3}", b"d=text"], YAML_WORDS + [b"="], 0.2),
    "sweep": Target(check_sweep, lambda: [SWEEP, b"- {seed: 1}\n- {seed: 2, systems: [x]}\n"], YAML_WORDS, 0.1),
    "config": Target(check_config, lambda: [CONFIG], YAML_WORDS, 0.1),
    "record": Target(check_record, lambda: RECORDS, JSON_WORDS),
    "manifest": Target(check_manifest, lambda: [(_store() / state_reader.MANIFEST).read_bytes()], JSON_WORDS + PATHS, 0.3),
    "tokens": Target(check_tokens, lambda: [_tokens()[1]], JSON_WORDS + PATHS, 0.3),
    "journal": Target(check_journal, lambda: [_journal()], JSON_WORDS + [b"\n"]),
    "measure": Target(check_measure, lambda: [b"nDCG@10", b"AP(rel=2)@100", b"P@5"], MEASURE_WORDS, 2),
    "model": Target(check_model, lambda: [(_model() / "config.json").read_bytes()], JSON_WORDS + [b'"mamba"', b"1000000"], 0.02),
}


@functools.cache
def seeds(name: str) -> list[bytes]:
    return TARGETS[name].seeds()


def mutate(name: str, seed: int, number: int) -> bytes:
    """Make input `number` of a target: a sound one with one to six changes."""
    generator, words = random.Random(f"{seed}-{number}"), TARGETS[name].words
    data = bytearray(generator.choice(seeds(name)))
    for _ in range(generator.randint(1, 6)):
        place = generator.randint(0, len(data))
        end = min(len(data), place + generator.choice((1, 1, 2, 4, 8, 64)))
        kind = generator.randrange(8)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[place:end] = generator.randbytes(end - place)
        elif kind == 2:
            del data[place:end]
        elif kind == 3:
            data[place:place] = data[place:end] * generator.choice((1, 1, 2, 500))
        elif kind == 4:
            other = generator.choice(seeds(name))
            start = generator.randint(0, len(other))
            data[place:end] = other[start : start + generator.choice((1, 4, 16, 64))]
        elif kind == 5 and generator.randrange(4) == 0:
            del data[place:]
        elif words:
            word = generator.choice(words)
            data[place : end if kind == 6 else place] = word * generator.choice((*[1] * 20, 2, 3000))
    return bytes(data)


def check(name: str, data: bytes, folder: Path) -> bool:
    """Check one input; whether it was accepted.

    Raises:
        AssertionError: a rule was broken; it is kept in a file.
    """
    path = folder / name
    path.write_bytes(data)
    try:
        TARGETS[name].check(path, data)
        return True
    except InputError as error:
        assert "expected" in str(error)
        return False
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kept = Path(f"fuzz-{name}-{hashlib.sha256(data).hexdigest()[:12]}")
        kept.write_bytes(data)
        raise AssertionError(f"{type(error).__name__}: {error} on {data[:200]!r}, kept as {kept}") from error


def _hang(*_):
    raise TimeoutError(f"no answer within {HANG} s")


def fuzz(name: str, inputs: int, seconds: float, seed: int) -> tuple[int, int]:
    """Check up to so many inputs of a target in up to so many seconds: (inputs, accepted)."""
    accepted = number = 0
    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, _hang)
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    try:
        with tempfile.TemporaryDirectory(prefix="rankmamba-fuzz-", dir=home) as folder:
            while number < inputs and time.monotonic() - started < seconds:
                data = mutate(name, seed, number)
                signal.setitimer(signal.ITIMER_REAL, HANG)
                accepted += check(name, data, Path(folder))
                number += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return number, accepted


def guided(name: str, arguments: list[str]) -> None:
    """Let atheris, which sees what the code does with an input, look for more; it ends the process."""
    import atheris

    for module in (formats, lines, runs, results, state_reader, sweep, token_store, sys.modules["rankmamba.batch.parameters"]):
        for function in filter(inspect.isfunction, vars(module).values()):
            if function.__module__ == module.__name__:
                atheris.instrument_func(function)
    folder = _folder(name)
    (folder / "corpus").mkdir()
    for place, data in enumerate(seeds(name)):
        (folder / "corpus" / str(place)).write_bytes(data)

    def check_one(data: bytes) -> None:
        check(name, data, folder)

    atheris.Setup([sys.argv[0], *arguments, str(folder / "corpus")], check_one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"among {', '.join(TARGETS)}; default all")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each target at most")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--atheris", metavar="TARGET", help="fuzz one target with atheris; what follows is for it")
    options, rest = parser.parse_known_args()
    if options.atheris:
        guided(options.atheris, rest)
    names = options.targets or list(TARGETS)
    weights = sum(TARGETS[name].weight for name in names)
    total, started, failed = 0, time.monotonic(), 0
    for name in names:
        before = time.monotonic()
        wanted = math.ceil(options.inputs * TARGETS[name].weight / weights)
        try:
            number, accepted = fuzz(name, wanted, options.seconds, options.seed)
        except AssertionError as error:
            failed += 1
            print(f"{name}: {error}", flush=True)
            continue
        total += number
        print(f"{name}: {number:,} inputs in {time.monotonic() - before:.0f} s, {accepted:,} accepted", flush=True)
    print(f"{total:,} inputs in {time.monotonic() - started:.0f} s, {failed} targets failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
