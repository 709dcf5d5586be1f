"""The tables of the study, made from records (`results`): per-query values, the final table, and how it is printed."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

from ..errors import InputError
from ..evaluate import BASELINE, PRIMARY, Tables, by_seed, clustered, compare, summarise
from .style import base, order


def measured(table: pd.DataFrame, shared: Mapping[str, int] | None = None) -> dict:
    """The `result` of an "evaluate" record from a `per_query` table: means with 95% intervals, and every query's value.

    shared: the `evaluate.clusters` of the queries.
    """
    values = {measure: table[measure].to_dict() for measure in table.columns}
    return {"measures": summarise(table, shared=shared), "per_query": values}


def per_query_values(records: list[dict], collection: str | None = None) -> dict[str, Tables]:
    """{system: [its `per_query` table, one per seed]} from "evaluate" records; what `evaluate.compare` and `plots` take.

    collection: whose queries; None if there is only one.

    Raises:
        InputError: there are no such records, or several collections and none is chosen.
    """
    found = [record for record in records if record["kind"] == "evaluate" and collection in (None, record["collection"])]
    collections = sorted({record["collection"] for record in found})
    if len(collections) != 1:
        there = ", ".join(collections) or "no record of kind evaluate"
        remedy = "name one, or give each a results folder of its own" if collections else "run 04_evaluate"
        raise InputError(f"expected one evaluated collection ({collection or 'any'}), got {there}; {remedy}")
    values: dict[str, Tables] = {}
    for record in sorted(found, key=lambda record: (order(record["system"]), record["seed"])):
        values.setdefault(record["system"], []).append(per_query_table(record))
    return values


def per_query_table(record: dict) -> pd.DataFrame:
    """What `evaluate.per_query` gave when the record was made."""
    return pd.DataFrame(record["result"]["per_query"], dtype=np.float64).rename_axis("query_id").sort_index()


def shared_documents(records: list[dict], collection: str | None = None) -> dict[str, int] | None:
    """The `evaluate.clusters` of a collection's queries from its record of kind "queries"; None if there is none.

    collection: None if only one was evaluated.
    """
    found = [record for record in records if record["kind"] == "queries" and collection in (None, record["collection"])]
    return found[0]["result"]["clusters"] if found else None


def tidy(records: list[dict]) -> pd.DataFrame:
    """The means of all "evaluate" records: system, seed, collection, measure, value."""
    rows = [
        (record["system"], record["seed"], record["collection"], measure, interval["mean"])
        for record in records
        if record["kind"] == "evaluate"
        for measure, interval in record["result"]["measures"].items()
    ]
    return pd.DataFrame(rows, columns=["system", "seed", "collection", "measure", "value"])


def seed_by_seed(records: list[dict], measure: str = PRIMARY) -> pd.DataFrame:
    """Compare with the baseline once for each seed alone: collection, seed, and the columns of `evaluate.compare`.

    p_holm is corrected within a seed. Where the baseline has no record of that seed, its first seed's is used.
    """
    parts = []
    evaluated = [record for record in records if record["kind"] == "evaluate"]
    for collection in sorted({record["collection"] for record in evaluated}):
        here = [record for record in evaluated if record["collection"] == collection]
        reference, shared = per_query_values(here).get(BASELINE), shared_documents(records, collection)
        for seed in sorted({record["seed"] for record in here}):
            values = per_query_values([record for record in here if record["seed"] == seed])
            if reference is not None and set(values) != {BASELINE}:
                found = compare({BASELINE: reference[0]} | values, BASELINE, measure, shared=shared)
                parts.append(found.assign(collection=collection, seed=seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["collection", "seed", "system", "p_holm"])


def readable_seeds(seeds: pd.DataFrame) -> pd.DataFrame:
    """The table of `seed_by_seed` as text: one row per system, one column per seed, cells such as "+0.044 [+0.032, +0.057], p <0.001"."""
    cells = [f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}], p {p_value(row.p_holm)}" for row in seeds.itertuples()]
    index = ["collection", "system"] if seeds["collection"].nunique() > 1 else "system"
    return (
        seeds.assign(cell=cells, system=pd.Categorical(seeds["system"], sorted(set(seeds["system"]), key=order)))
        .pivot(index=index, columns="seed", values="cell")
        .add_prefix("seed ")
        .rename_axis(columns=None)
        .fillna("")
    )


def by_words(
    values: dict[str, Tables],
    words: dict[str, int],
    measure: str = PRIMARY,
    parts: int = 4,
    shared: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """Compare with the baseline separately for short and long relevant documents: words, queries, and columns of `evaluate.compare`.

    words: {query_id: words of its relevant document}; the queries are cut into `parts` of about equal size. The column words reads
    "45 to 75", the shortest first; "of the baseline" is the baseline's own mean. shared: as in `evaluate.compare`.
    """
    counts = pd.Series(words)
    bounds = np.quantile(counts, np.linspace(0, 1, parts + 1)[1:-1])
    compared = []
    for _, part in counts.groupby(np.searchsorted(bounds, counts)):
        here = {system: [table[table.index.isin(part.index)] for table in given] for system, given in values.items()}
        title = f"{part.min()} to {part.max()}"
        own = by_seed(here[BASELINE], measure).mean()
        found = compare(here, BASELINE, measure, shared=shared)
        compared.append(found.assign(words=title, queries=len(part), **{"of the baseline": own}))
    return pd.concat(compared, ignore_index=True)


def curves(records: list[dict]) -> dict[str, list[pd.DataFrame]]:
    """{system: [its training curve, one per seed]} from "train" records; what `plots.training_curves` takes."""
    found: dict[str, list[pd.DataFrame]] = {}
    for record in sorted(records, key=lambda record: (order(record["system"]), record["seed"])):
        if record["kind"] == "train":
            found.setdefault(record["system"], []).append(pd.DataFrame(record["result"]["curve"]))
    return found


def final_table(records: list[dict], measure: str = PRIMARY, baseline: str = BASELINE) -> pd.DataFrame:
    """The study's table, one row per collection and system, the baseline first. Numbers only: see `readable` and `format_table`.

    Columns: collection, system, queries, seeds, parameters (outside embeddings); of every measure the mean, "<measure> low" and
    "<measure> high"; difference, low, high, effect, p and p_holm of `measure` against `baseline` (NaN without one); tokens and minutes
    of training; pairs_per_s, pairs_per_s_from_states; note; clusters (`evaluate.clustered`, how many; 0 if not recorded) and apart (they
    would be too few, so each query is one); timed_on; measure; baseline.
    Means over seeds, 95% intervals. A system "X + Y" is X mixed with Y and has X's size and costs. Where seeds ran on several
    devices, times are of the device with most trainings, `timed_on`; otherwise that is empty.

    Raises:
        InputError: there are no "evaluate" records, or the systems of a collection were measured on different queries.
    """
    rows, devices = [], _devices(records)
    for collection in sorted({record["collection"] for record in records if record["kind"] == "evaluate"}) or [None]:
        values, shared = per_query_values(records, collection), shared_documents(records, collection)
        differences = pd.DataFrame()
        if baseline in values:
            differences = compare(values, baseline, measure, shared=shared).set_index("system")
        for system in sorted(values, key=lambda name: (name != baseline, order(name))):
            row = {"collection": collection, "system": system, "queries": len(values[system][0]), "seeds": len(values[system])}
            for name, interval in summarise(values[system], shared=shared).items():
                row |= {name: interval["mean"], f"{name} low": interval["low"], f"{name} high": interval["high"]}
            for name in ("difference", "low", "high", "effect", "p", "p_holm"):
                row[name] = differences[name].get(system, math.nan) if name in differences else math.nan
            row |= _costs(records, system, collection, devices[0] if devices else None)
            query_ids = values[system][0].index
            row |= {"clusters": 0 if shared is None else len(set(clustered(query_ids, shared)))}
            row |= {"apart": row["clusters"] > len({(shared or {}).get(query_id, query_id) for query_id in query_ids})}
            rows.append(row | {"timed_on": devices[0] if len(devices) > 1 else "", "measure": measure, "baseline": baseline})
    return pd.DataFrame(rows)


def chosen_measure(records: list[dict]) -> str:
    """The measure that a study's differences are about: the one that its newest mixture was chosen by."""
    mixtures = [record for record in records if record["kind"] == "evaluate" and "measure" in record["result"]]
    return max(mixtures, key=lambda record: record["created"])["result"]["measure"] if mixtures else PRIMARY


def _devices(records: list[dict]) -> list[str]:
    """The devices that trainings ran on, the most frequent first."""
    return [name for name, _ in Counter(r["environment"].get("device") for r in records if r["kind"] == "train").most_common()]


def _costs(records: list[dict], system: str, collection: str, device: str | None) -> dict:
    """Size, training and speed of a system; means over seeds, of times only those on `device`; NaN where nothing was recorded."""
    own = [record for record in records if record["system"] == base(system)]
    # /train, /dev and /test of one collection belong together; a system tested elsewhere was trained where it was trained
    here = [record for record in own if PurePosixPath(record["collection"]).parent == PurePosixPath(collection).parent]
    trained, ranked = ([record for record in here if record["kind"] == kind] for kind in ("train", "rerank"))
    trained = trained or [record for record in own if record["kind"] == "train"]

    def times(found: list[dict], name: str) -> float:
        return _mean([record["timing"][name] for record in found if record["environment"].get("device") == device])

    return {
        "parameters": trained[-1]["result"]["parameters_outside_embeddings"] if trained else math.nan,
        "tokens": _mean([record["result"]["tokens"] for record in trained]),
        "minutes": times(trained, "seconds") / 60,
        "pairs_per_s": times(ranked, "pairs_per_s"),
        "pairs_per_s_from_states": times([record for record in here if record["kind"] == "states"], "pairs_per_s"),
        "note": next((record["note"] for record in (*here, *trained) if record.get("note")), ""),
    }


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The final table as text for a notebook, with cells such as "0.512 [0.498, 0.526]"; `caption` says what they mean."""
    cells = _cells(table, _notes(table)).rename(columns=lambda heading: heading.strip().replace("\n", " "))
    if table["collection"].nunique() > 1:
        cells.insert(0, "collection", [(name,) for name in table["collection"]])
    return cells.map(lambda cell: cell[0] if len(cell) == 1 else f"{cell[0]} [{cell[1]}, {cell[2]}]").set_index("system")


def caption(table: pd.DataFrame) -> str:
    """The text below the final table: queries, intervals, the test, and the notes on systems."""
    lines = []
    for collection, part in table.groupby("collection", sort=False):
        first = part.iloc[0]
        compared = part["p"].notna().sum()
        lines.append(
            f"{collection}: {first['queries']:,} queries. "
            + (
                f"p: paired t-test on {first['measure']} against {first['baseline']}, corrected for {compared} "
                f"system{'s' if compared > 1 else ''} (Holm)."
                if compared
                else f"There is nothing to compare with {first['baseline']}."
                if first["baseline"] in set(part["system"])
                else f"{first['baseline']} was not evaluated, so nothing is compared with it."
            )
        )
        if not first["clusters"]:
            lines.append(
                "Which queries share a relevant document is not recorded (04_evaluate does it): p and the intervals take each alone."
            )
        elif first["apart"]:
            lines.append(
                "Nearly all queries share relevant documents with others, directly or through others, so clusters of them are too few: p "
                "and the intervals take each alone, which holds for other queries about these documents only."
            )
        elif first["clusters"] < first["queries"]:
            lines.append(
                f"Queries that share a relevant document form a cluster ({first['clusters']:,} in all): p and the intervals go by clusters."
            )
    if (table["seeds"] > 1).any():
        lines.append("Intervals: 95%, bootstrap over queries and seeds; p is of the means over these seeds.")
        shown = "Intervals know other seeds, p the number of tests: shown is a difference with p below 0.05 and 0 outside its interval."
        once = table.loc[(table["seeds"] == 1) & table["tokens"].notna(), "system"]  # a first stage has no seeds
        if len(once):
            lines.append(
                f"Of one seed, so that what another would give is not in the intervals: {', '.join(dict.fromkeys(once.map(base)))}."
            )
    else:
        lines.append("Intervals: 95%, bootstrap over queries; what another seed would give is not in them.")
        shown = "Intervals are not corrected for the number of tests, p is: where they disagree, go by p."
    lines.append(shown)
    lines.append(
        "params: outside the embeddings. Tokens and minutes of training, pairs/s: mean over seeds. X + Y: their scores mixed."
    )
    lines += [f"Minutes and pairs/s: of the seeds that ran on {device}." for device in table["timed_on"].unique() if device]
    return "\n".join(lines + [f"[{place}] {note}" for place, note in enumerate(_notes(table), 1)])


def format_table(table: pd.DataFrame) -> str:
    """The final table and its caption for a terminal, collection by collection, intervals below the means."""
    blocks = []
    for _, part in table.groupby("collection", sort=False):
        cells = _cells(part, _notes(table))
        columns = [[tuple(heading.split("\n")), *(_stacked(cell) for cell in cells[heading])] for heading in cells]
        widths = [max(len(text) for pair in column for text in pair) for column in columns]
        lines = []
        for pairs in zip(*columns, strict=True):
            for system, *texts in zip(*pairs, strict=True):
                numbers = (text.rjust(width) for text, width in zip(texts, widths[1:], strict=True))
                lines.append("  ".join([system.ljust(widths[0]), *numbers]).rstrip())
        lines.insert(2, "-" * (sum(widths) + 2 * len(widths) - 2))
        blocks.append("\n".join(line for line in lines if line))
    return "\n\n".join([*blocks, caption(table)])


def _stacked(cell: tuple[str, ...]) -> tuple[str, str]:
    """A cell on two lines: "0.512" above ".498-.526", "+0.071" above "+.050 +.091"."""
    if len(cell) == 1:
        return cell[0], ""
    return cell[0], (" " if cell[0][0] in "+-" else "-").join(bound.replace("0.", ".", 1) for bound in cell[1:])


def _notes(table: pd.DataFrame) -> list[str]:
    return [note for note in dict.fromkeys(table["note"]) if note]


def _cells(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The table as text: one column per heading of two lines, a cell (value,) or (value, low, high)."""
    marks = [f" [{notes.index(note) + 1}]" if note else "" for note in table["note"]]
    cells = {"system\n": [(system + mark,) for system, mark in zip(table["system"], marks, strict=True)]}
    if (table["seeds"] > 1).any():
        cells["seeds\n"] = [(str(count),) for count in table["seeds"]]
    cells["params\n(M)"] = [(_short(count / 1e6),) for count in table["parameters"]]
    for name in (column.removesuffix(" low") for column in table.columns if column.endswith(" low")):
        cells[f"{name}\n"] = _intervals(table[[name, f"{name} low", f"{name} high"]], "")
    cells[f"{table['measure'].iloc[0]}\n- {table['baseline'].iloc[0]}"] = _intervals(table[["difference", "low", "high"]], "+")
    cells["p\n(Holm)"] = [("" if math.isnan(p) else p_value(p),) for p in table["p_holm"]]
    cells["train\ntokens"] = [("" if math.isnan(count) else _short(count / 1e6) + "M",) for count in table["tokens"]]
    cells["train\nmin"] = [(_short(minutes),) for minutes in table["minutes"]]
    cells["pairs/s\n"] = [(_short(rate),) for rate in table["pairs_per_s"]]
    if table["pairs_per_s_from_states"].notna().any():
        cells["pairs/s\nfrom states"] = [(_short(rate),) for rate in table["pairs_per_s_from_states"]]
    return pd.DataFrame(cells)


def _intervals(columns: pd.DataFrame, sign: str) -> list[tuple[str, ...]]:
    rows = columns.itertuples(index=False, name=None)
    return [("",) if math.isnan(row[0]) else tuple(f"{value:{sign}.3f}" for value in row) for row in rows]


def p_value(p: float) -> str:
    """A p as text: three decimals, "<0.001" below."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
