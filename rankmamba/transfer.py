"""Trained systems on collections, domains and document lengths that they were not trained on."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from .backbones import find
from .collection import digest_of, load
from .data.embedded import answer_starts
from .errors import InputError
from .evaluate import PRIMARY, mean_interval, per_query
from .experiment import Experiment
from .interpolation import interpolate
from .pairwise import SCAN, are_shown, mixers, pairwise
from .reporting.tables import measured, per_query_table
from .reranker import Reranker
from .results import environment, find_record, fingerprint, leave_record, read_records, remove_record

DOMAINS = 8  # more first words of query ids than these are no domains
STARTS = (0, 128, 256, 512, 1024)  # words of a document before the paragraph that answers the query


def reading(max_length: int, max_passages: int = 1) -> str:
    """Name how a document is read: its beginning (FirstP, LongP), or the best of several passages (MaxP)."""
    return f"{max_length} tokens" if max_passages == 1 else f"MaxP, {max_passages} x {max_length} tokens"


def transfer(
    experiment: Experiment,
    system: str,
    collection: str,
    max_length: int,
    max_passages: int = 1,
    n_queries: int | None = None,
    top_k: int = 20,
) -> dict:
    """Rerank the candidates of another collection with a system of the study, as trained, and measure it; returns the record.

    The record's system is "X, 512 tokens" (`reading`); its result holds the measures and, under "first_stage", those of the
    candidates. The same transfer done before with the same trained model is found again.

    Raises:
        InputError: the system was not trained, the collection has no candidates, or max_length is beyond the system's positions.
    """
    name = f"{system}, {reading(max_length, max_passages)}"
    config = {"max_length": max_length, "max_passages": max_passages, "n_queries": n_queries, "top_k": top_k}
    config |= {"trained": fingerprint(experiment.trained(system))} | digest_of([collection])
    if record := find_record(experiment.folder, "transfer", system=name, collection=collection, config=config):
        return record
    test = load(collection).sample(n_queries)
    candidates = test.candidates
    if candidates is None:
        raise InputError(
            f"expected a collection that comes with candidates, got none in {collection}; add a candidates.run to it"
        )
    reranker = Reranker.from_pretrained(experiment.model_path(system), max_length=max_length)
    run = reranker.rerank(candidates, test, top_k, show_progress_bar=True, max_passages=max_passages)
    result = measured(per_query(interpolate(run, candidates, 1.0), test.qrels))
    result["first_stage"] = measured(per_query(candidates, test.qrels))
    timing = {"seconds": reranker.cost.seconds, "pairs_per_s": reranker.cost.pairs / reranker.cost.seconds}
    ran, scale, seed = environment() | reranker.setup, experiment.scale, experiment.seed
    for before in read_records(experiment.folder, "transfer"):
        alike = all(before["config"].get(key) == config.get(key) for key in ("n_queries", "top_k", "files"))
        if before["collection"] == collection and not alike:  # tables compare what was read of a collection in several ways
            remove_record(experiment.folder, before)
    return leave_record(experiment.folder, "transfer", name, collection, scale, seed, config, result, timing, ran)


def everywhere(
    experiment: Experiment,
    systems: Sequence[str],
    collections: Sequence[str],
    readings: Sequence[tuple[int, int]],
    n_queries: int | None,
    top_k: int,
) -> dict[str, list[dict]]:
    """Transfer every system to every collection, read in every way (max_length, max_passages): {collection: its records}.

    Readings of more tokens than a system has positions for are left out.
    """
    return {
        collection: [
            transfer(experiment, system, collection, max_length, max_passages, n_queries, top_k)
            for max_length, max_passages in readings
            for system in systems
            if max_length <= (find(system).max_length or max_length)
        ]
        for collection in collections
    }


def tables(transfers: Mapping[str, Sequence[dict]], measure: str = PRIMARY) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each collection with its table `by_domain`, and for squad-long also `by_start`."""
    for collection, records in transfers.items():
        yield collection, by_domain(records, measure)
        if collection.startswith("rankmamba/squad-long/"):
            starts = answer_starts(collection.removeprefix("rankmamba/").removesuffix("/test"))
            yield collection, by_start(records, starts, measure)


def values(records: Sequence[dict], measure: str = PRIMARY) -> dict[str, pd.Series]:
    """{system: value of each query, the mean over seeds} of the transfers to one collection, the first stage's as "bm25"."""
    found: dict[str, list[pd.Series]] = {}
    for record in records:
        found.setdefault("bm25", []).append(pd.Series(record["result"]["first_stage"]["per_query"][measure]))
        found.setdefault(record["system"], []).append(pd.Series(record["result"]["per_query"][measure]))
    return {system: pd.concat(series, axis=1).mean(axis=1) for system, series in found.items()}


def by_domain(records: Sequence[dict], measure: str = PRIMARY) -> pd.DataFrame:
    """Mean and 95% interval by domain, the part of a query's id before its first "-"; ids without "-", or of more than `DOMAINS`, are
    of one domain, "all".

    Columns: domain, queries, reading (how documents were read; empty for the first stage), system, mean, low, high.
    """
    found = values(records, measure)
    domains = {
        query_id: query_id.partition("-")[0] if "-" in query_id else "all"
        for series in found.values()
        for query_id in series.index
    }
    if len(set(domains.values())) > DOMAINS:  # ids of one's own collection, such as a UUID
        domains = dict.fromkeys(domains, "all")
    return _by(found, domains.get, "domain")


def by_start(records: Sequence[dict], starts: Mapping[str, int], measure: str = PRIMARY) -> pd.DataFrame:
    """Mean and 95% interval by where the answering paragraph starts: "words before the answer", then as in `by_domain`.

    starts: {query_id: words of the document before it} (`embedded.answer_starts`).
    """
    names = [f"{low} to {high - 1}" for low, high in zip(STARTS, STARTS[1:], strict=False)] + [f"{STARTS[-1]} and more"]
    title = "words before the answer"
    table = _by(values(records, measure), lambda query_id: np.searchsorted(STARTS, starts[query_id], side="right") - 1, title)
    return table.assign(**{title: table[title].map(names.__getitem__)})


def by_reading(records: Sequence[dict], measure: str = PRIMARY) -> pd.DataFrame:
    """Mean and 95% interval by how documents were read: what reading more gains or costs.

    Columns: collection, reading, tokens read of a document's beginning (NaN for MaxP and for the first stage, "bm25", which is
    repeated beside every reading), system, mean, low, high. Shorter readings come first.
    """
    rows = []
    # by the name's length: squad, squad-long/600, squad-long/1500
    for collection in sorted({record["collection"] for record in records}, key=lambda name: (len(name), name)):
        here = [record for record in records if record["collection"] == collection]
        here.sort(key=lambda record: (record["config"]["max_passages"], record["config"]["max_length"], record["system"]))
        tokens = {r["system"]: r["config"]["max_length"] for r in here if r["config"]["max_passages"] == 1}
        found = values(here, measure)
        first_stage = mean_interval(found.pop("bm25").to_numpy())
        for name, series in found.items():
            system, _, read = name.partition(", ")
            rows.append((collection, read, tokens.get(name, np.nan), system, *mean_interval(series.to_numpy())))
        readings = dict.fromkeys(name.partition(", ")[2] for name in found)
        rows += [(collection, read, np.nan, "bm25", *first_stage) for read in readings]
    return pd.DataFrame(rows, columns=["collection", "reading", "tokens", "system", "mean", "low", "high"])


def gains(records: Sequence[dict], measure: str = PRIMARY) -> pd.DataFrame:
    """What each system gains, query by query, from its longest reading over its shortest: mean and 95% interval as text.

    One row per system, one column per collection, with the two lengths of a document's beginning; only systems read at several lengths.
    """
    cells = []
    firsts = [record for record in records if record["config"]["max_passages"] == 1]
    for collection in sorted({record["collection"] for record in firsts}, key=lambda name: (len(name), name)):
        here = [record for record in firsts if record["collection"] == collection]
        found = values(here, measure)
        lengths: dict[str, set[int]] = {}
        for record in here:
            lengths.setdefault(record["system"].partition(", ")[0], set()).add(record["config"]["max_length"])
        for system, read in lengths.items():
            short, long = (found[f"{system}, {reading(length)}"] for length in (min(read), max(read)))
            if len(read) > 1:
                mean, low, high = mean_interval((long - short).to_numpy())
                head = f"{collection.removeprefix('rankmamba/')}, {max(read):,} instead of {min(read):,} tokens"
                cells.append((system, head, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"))
    table = pd.DataFrame(cells, columns=["system", "reading", "gain"])
    return table.pivot(index="system", columns="reading", values="gain")[list(dict.fromkeys(table["reading"]))].fillna("")


def verdict(transfers: Sequence[dict], pairs: Sequence[tuple[str, str]], trainings: Sequence[dict], measure: str = PRIMARY) -> str:
    """Say in Markdown, for each collection, how the pairs of a state-space model and a Transformer (`pairwise.across`) stand there.

    Documents are read as short as any record has it, which is what the systems were trained to read, and as long. trainings: the
    records of them.
    """
    kinds, lines = mixers(trainings), []
    for collection in sorted({record["collection"] for record in transfers}, key=lambda name: (len(name), name)):
        here = [r for r in transfers if r["collection"] == collection and r["config"]["max_passages"] == 1]
        lengths = [record["config"]["max_length"] for record in here]
        for length in sorted({min(lengths), max(lengths)}):
            found: dict[str, list[pd.DataFrame]] = {}
            for record in here:
                if record["config"]["max_length"] == length:
                    found.setdefault(record["system"].partition(", ")[0], []).append(per_query_table(record))
            table = pairwise(found, pairs, measure)
            if table.empty:
                continue
            shown = table[are_shown(table)]
            said = ", ".join(
                f"{row.system} over {row.other} {row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in shown.itertuples()
            )
            ahead, tables = int((shown["system"].map(kinds) == SCAN).sum()), next(iter(found.values()))
            lines.append(
                f"- {collection.removeprefix('rankmamba/')}, {length:,} tokens, {len(tables[0])} queries, seeds: {len(tables)}; the "
                f"Transformer is better in {len(shown) - ahead}, the state-space model in {ahead} of {len(table)}"
                + (f": {said}." if said else ".")
            )
    if not lines:
        return ""
    head = (
        f"**Do they stand alike there?** Pairs of a state-space model and a Transformer that were trained alike, on {measure}, "
        "p corrected for the pairs of a line; each query counts as independent:\n\n"
    )
    return head + "\n".join(lines)


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """The means of `by_reading` as text: one row per system, one column per collection and reading."""
    cells = table.assign(cell=table["mean"].map("{:.3f}".format), collection=table["collection"].str.removeprefix("rankmamba/"))
    wide = cells.pivot(index="system", columns=["collection", "reading"], values="cell").fillna("")
    return wide[pd.MultiIndex.from_frame(cells[["collection", "reading"]].drop_duplicates())]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `by_domain` or `by_start` as text: one row per reading and system, one column per group of queries."""
    title = table.columns[0]
    heads = [f"{group} (n={count})" for group, count in zip(table[title], table["queries"], strict=True)]
    cells = [f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in table[["mean", "low", "high"]].itertuples()]
    wide = table.assign(head=heads, cell=cells).pivot(index=["reading", "system"], columns="head", values="cell")
    rows = table[["reading", "system"]].drop_duplicates()
    return wide.loc[pd.MultiIndex.from_frame(rows), list(dict.fromkeys(heads))].rename_axis(columns=title)


def _by(systems: dict[str, pd.Series], group, title: str) -> pd.DataFrame:
    rows = []
    for name, series in systems.items():
        system, _, read = name.partition(", ")
        for place, part in series.groupby(series.index.map(group)):
            rows.append((place, len(part), read, system, *mean_interval(part.to_numpy())))
    table = pd.DataFrame(rows, columns=[title, "queries", "reading", "system", "mean", "low", "high"])
    return table.sort_values(title, kind="stable", ignore_index=True)
