"""Text files line by line, read strictly: every error names the file and the line.

Empty lines are skipped. Ids are printable and contain no spaces, which the TREC formats could not represent.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError


def read_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield (line number, byte offset, text without line end) of the lines that are not empty; a byte-order mark is skipped."""
    try:
        handle = open(path, "rb")
    except OSError as error:
        raise InputError(f"expected a readable file, got {error.strerror} ({path})") from error
    with handle:
        offset = 0
        for number, raw in enumerate(handle, 1):
            begin, offset = offset, offset + len(raw)
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw, begin = raw[3:], 3
            try:
                line = raw.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"expected UTF-8 text, got byte 0x{raw[error.start]:02x} at position {error.start + 1} ({path}:{number}); "
                    "convert the file, e.g. with iconv -t UTF-8"
                ) from None
            if line:
                yield number, begin, line


def checked_id(value: str, field: str, where: str | Path) -> str:
    """Check an id: printable, no spaces."""
    if not isinstance(value, str) or not value or " " in value or not value.isprintable():
        raise InputError(f"expected a {field} of printable characters without spaces, got {value!r:.80} ({where})")
    return value


def numbers(texts: list[str], kind: type, expected: str, path: str | Path) -> np.ndarray:
    """Convert a column of a file to int or float; forms that only Python accepts (1_000, nan, inf) are refused.

    The texts are those of the file's non-empty lines, in order, so that the message can name the line of a wrong one.
    """
    values = []
    for text in texts:
        try:
            value = kind(text)
            fits = "_" not in text and (abs(value) < 2**63 if kind is int else math.isfinite(value))
        except ValueError:
            fits = False
        if not fits:
            raise InputError(f"expected {expected}, got {text[:80]!r} ({path}:{_line_of_row(path, len(values))})")
        values.append(value)
    return np.array(values, dtype=np.float64 if kind is float else np.int64)


def _line_of_row(path: str | Path, row: int) -> int:
    """The line number of the non-empty line with index `row`."""
    return next(itertools.islice(read_lines(Path(path)), int(row), None))[0]


def refuse_duplicates(table: pd.DataFrame, what: str, path: str | Path | None = None) -> None:
    """Check that no (query_id, doc_id) occurs twice; `path` is the file whose non-empty lines are the rows."""
    again = np.flatnonzero(table.duplicated(["query_id", "doc_id"]))
    if len(again):
        query_id, doc_id = table.iloc[again[0]][["query_id", "doc_id"]]
        raise InputError(
            f"expected each document once per query in {what}, got {doc_id!r} again for query {query_id!r}"
            + (f" ({path}:{_line_of_row(path, again[0])})" if path else "")
            + f", {len(again)} such rows in all; remove the repeated ones"
        )
