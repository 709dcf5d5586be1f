"""Records: one JSON file per run. Every table and figure (`tables`, `plots`) is made from records and from nothing else.

`config` and `result` of a record are deterministic: the same seed gives the same ones. What varies is in `timing`,
`environment` and `created`. `python -m rankmamba.results FOLDER [--baseline SYSTEM | --csv]` prints the final table, or its tidy
numbers. Records may be gzipped (`gzip -9n FOLDER/records/*.json`), as those kept for the long term are.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import platform
import re
import sys
import zlib
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np

from . import __version__
from .errors import InputError
from .files import json_sha256, slug, write_text

IDENTITY = ("kind", "system", "collection", "seed")
FIELDS = {
    **dict.fromkeys(("kind", "system", "collection", "scale", "created", "version"), str),
    **dict.fromkeys(("config", "result", "timing", "environment"), dict),
    "seed": int,
}
# What the tables read from each kind of record; other kinds hold what they like.
NEEDED = {
    "train": {"result": {"tokens": int, "parameters_outside_embeddings": int, "curve": list}, "timing": {"seconds": float}},
    **dict.fromkeys(("rerank", "states"), {"timing": {"pairs_per_s": float}}),
    "evaluate": {"result": {"measures": dict, "per_query": dict}},
}
INTERVAL = ("mean", "low", "high")
# line breaks, codes that command a terminal, changes of direction, and halves of characters, which cannot be printed
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


def environment() -> dict:
    """Describe the machine and the versions that a run used."""
    import torch  # takes seconds to import, and nothing else here needs it

    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "numpy")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "devices": torch.cuda.device_count() if gpu else 1,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def new_record(
    kind: str,
    system: str,
    collection: str,
    scale: str,
    seed: int,
    config: dict,
    result: dict,
    timing: dict | None = None,
    environment: dict | None = None,
    note: str = "",
) -> dict:
    """Make a record of a run that ended just now. note: a footnote to the system in every table."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"kind": kind, "system": system, "collection": collection, "scale": scale, "seed": seed, "note": note}
    record |= {"config": config, "result": result, "timing": timing or {}, "environment": environment or {}}
    return record | {"created": created, "version": __version__}


def write_record(folder: str | Path, record: Mapping) -> Path:
    """Write a record to <folder>/records/<kind>-<system>-<collection>-seed<seed>.json, wholly or not at all, and return the path.

    A later record of the same kind, system, collection and seed replaces an earlier one. NumPy numbers and arrays, tuples and
    paths are written as plain JSON; floats keep all their digits.

    Raises:
        InputError: a key is missing or of the wrong type, a value is NaN, infinite, not JSON or a text that cannot be shown, or another
            run has that file name.
    """
    record = _plain(record, "")
    _check(record, "the record")
    path = Path(folder) / "records" / _file_name(record)
    if path.is_file() or _gzipped(path).is_file():
        try:
            other = json.loads(path.read_bytes() if path.is_file() else gzip.decompress(_gzipped(path).read_bytes()))
            taken = any(other[key] != record[key] for key in IDENTITY)
        except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error):
            taken = False  # a broken file is replaced
        if taken:
            mine, theirs = ([found[key] for key in IDENTITY] for found in (record, other))
            raise InputError(f"expected another name than {path.name} for {mine}, got one that {theirs} has; rename the system")
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    _gzipped(path).unlink(missing_ok=True)
    return path


def leave_record(folder: str | Path, *fields, **named) -> dict:
    """Make a record as `new_record` does, write it as `write_record` does, and return it."""
    record = new_record(*fields, **named)
    write_record(folder, record)
    return record


def _gzipped(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def read_records(folder: str | Path, kind: str | None = None) -> list[dict]:
    """Read the records of a results folder, in the order of their file names; `kind` picks one kind. No records: an empty list.

    Where a record exists twice, gzipped and plain, the gzipped one is older and is left out.

    Raises:
        InputError: the folder is missing, or a file is truncated, not JSON, lacks a key, has a wrong type, a text that cannot be
            shown or another record's name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"expected a results folder, got {str(folder)!r}, which is not one; run the study first, or check the path"
        )
    pattern = f"{slug(kind)}-*.json" if kind else "*.json"
    plain = set((folder / "records").glob(pattern))
    zipped = {path for path in (folder / "records").glob(pattern + ".gz") if path.with_suffix("") not in plain}
    records = [_read(path) for path in sorted(plain | zipped)]
    return [record for record in records if kind in (None, record["kind"])]


def _read(path: Path) -> dict:
    remedy = "delete it and run its step again"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        record = json.loads(content.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise InputError(f"expected a record, got broken JSON ({path}:{error.lineno}: {error.msg}); {remedy}") from error
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise InputError(f"expected a record, got no JSON ({path}: {error}); {remedy}") from error
    _check(record, str(path))
    if path.name.removesuffix(".gz") != _file_name(record):
        raise InputError(f"expected {_file_name(record)} as this record's file name, got {path}; move copies elsewhere")
    return record


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _check(record: object, where: str) -> None:
    """Check that a record has its keys, each of its type."""
    if not isinstance(record, dict):
        raise InputError(f"expected a record, a JSON object, got {type(record).__name__} ({where})")
    _check_keys(record, FIELDS, "", where)
    for part, needed in NEEDED.get(record["kind"], {}).items():
        _check_keys(record[part], needed, f"{part}.", where)
    if not isinstance(record.get("note", ""), str):
        raise InputError(f"expected text as 'note', got {record['note']!r} ({where})")
    for key in (*(key for key, kind in FIELDS.items() if kind is str), "note"):
        text = record.get(key, "")
        if CONTROL.search(text):  # tables, reports and terminals show it as it is
            raise InputError(f"expected text without control characters as '{key}', got {text!r:.80} ({where})")
    for part in ("measures", "per_query") if record["kind"] == "evaluate" else ():
        measures = record["result"][part]
        _check_keys(measures, dict.fromkeys(measures, dict), f"result.{part}.", where)
        for measure, values in measures.items():
            numbers = [*values, *(INTERVAL if part == "measures" else ())]
            _check_keys(values, dict.fromkeys(numbers, float), f"result.{part}.{measure}.", where)


def _check_keys(values: dict, types: dict, prefix: str, where: str) -> None:
    for key, kind in types.items():
        if key not in values:
            raise InputError(f"expected the key '{prefix}{key}', got a record without it ({where})")
        value = values[key]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise InputError(f"expected {TYPE_NAMES[kind]} as '{prefix}{key}', got {value!r:.80} ({where})")


def _plain(value: object, key: str):
    """The value in JSON's own types; `key` is its place in the record, for messages."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"expected finite numbers in a record, got {value} as {key!r}; find its cause, or leave the key out")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain(item, f"{key}.{name}" if key else name) for name, item in value.items()}
    raise InputError(f"expected numbers, text, lists and objects with text as keys, got {type(value).__name__} as {key!r}")


def _file_name(record: Mapping) -> str:
    name = "-".join(slug(record[key]) for key in IDENTITY[:3])
    if len(name) > 200:  # a collection may be a long path, and file systems end at 255 bytes
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return f"{name}-seed{record['seed']}.json"


def find_record(folder: str | Path, kind: str, **wanted) -> dict | None:
    """Return the record of this kind whose fields are as wanted; None where there is none, or no folder."""
    records = read_records(folder, kind) if Path(folder).is_dir() else []
    return next((record for record in records if all(record[name] == value for name, value in wanted.items())), None)


def check_collection(folder: str | Path, collection: str) -> None:
    """Refuse a results folder of another collection, whose models and runs would have the same names.

    Raises:
        InputError: the folder has a first stage, a training or a reranking on another collection.
    """
    kinds = ("first_stage", "train", "rerank") if Path(folder).is_dir() else ()
    for record in (record for kind in kinds for record in read_records(folder, kind)):
        other = record["collection"].rpartition("/")[0]
        if other != collection:
            raise InputError(
                f"expected results of {collection} in {folder}, got those of {other}; give another folder with --results"
            )


def remove_record(folder: str | Path, record: Mapping) -> None:
    """Remove a record that `write_record` wrote, before the files it describes are replaced."""
    path = Path(folder) / "records" / _file_name(record)
    for place in (path, _gzipped(path)):
        place.unlink(missing_ok=True)


def fingerprint(record: Mapping) -> str:
    """SHA-256 of what is deterministic in a record: its identity, `config` and `result`. Runs with the same seed agree in it."""
    return json_sha256(_plain({key: record[key] for key in (*IDENTITY, "config", "result")}, ""))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.results", description="Print the final table of a results folder.")
    parser.add_argument("folder", help="a folder with records, such as results/quick or data/study")
    parser.add_argument("--csv", action="store_true", help="print system, seed, collection, measure and value instead")
    parser.add_argument("--baseline", metavar="SYSTEM", help="what the others are compared with (default: bm25)")
    options = parser.parse_args(arguments)
    from .evaluate import BASELINE  # importing scipy and pandas takes more than a second
    from .reporting.tables import chosen_measure, final_table, format_table, tidy

    try:
        records = read_records(options.folder)
        if options.csv:
            tidy(records).to_csv(sys.stdout, index=False, lineterminator="\n")
        else:
            table = final_table(records, chosen_measure(records), options.baseline or BASELINE)
            if options.baseline is not None and options.baseline not in set(table["system"]):
                systems = ", ".join(dict.fromkeys(table["system"]))
                raise InputError(f"expected a baseline among {systems}, got {options.baseline!r}")
            print(format_table(table))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
