"""Architecture against architecture: every pair of systems that were trained alike, and what the pairs show about the paper's claim."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from .evaluate import PRIMARY, Tables, by_seed, clustered, compare, detectable_difference, holm, seeds_of

RECIPE = ("batch_size", "group_size", "epochs", "warmup", "weight_decay", "max_length", "max_query_length", "loss", "teacher")
LARGER = 2.0  # at most this many times the other's parameters
MARGIN = 0.01  # a difference within it counts as ranking equally well
SCAN, ATTENTION, HYBRID = "scan", "attention", "both"  # what mixes the tokens of a state-space model, a Transformer, a hybrid


def trained_alike(records: Sequence[dict]) -> list[tuple[str, str]]:
    """Pairs of systems trained alike: with one recipe except for the learning rate, for as many steps, on the same collection, in all
    their seeds, and which rerank alike.

    They start alike, too: neither has a note that the other lacks, and the larger has at most `LARGER` times the parameters.
    """
    trained, ways = {}, {}
    for record in records:
        if record["kind"] == "train" and not record["result"]["partial"]:
            trained[record["system"]] = record
            recipe = *(record["config"][name] for name in RECIPE), record["result"]["steps"], record["collection"], record["note"]
            ways.setdefault(record["system"], set()).add(recipe)
    for record in records:
        if record["kind"] == "rerank" and record["system"] in ways:
            ways[record["system"]].add(tuple(record["config"].get(name, 1) for name in ("first_stage", "top_k", "max_passages")))

    def sizes(*both: dict) -> list[int]:
        return sorted(record["result"]["parameters_outside_embeddings"] for record in both)

    return [
        (first, second)
        for (first, ours), (second, theirs) in combinations(sorted(trained.items()), 2)
        if ways[first] == ways[second] and sizes(ours, theirs)[1] <= LARGER * sizes(ours, theirs)[0]
    ]


def across(pairs: Sequence[tuple[str, str]], records: Sequence[dict]) -> list[tuple[str, str]]:
    """Those of the pairs that the paper's claim is about: a state-space model and a Transformer. A hybrid of both is neither.

    The claim says that they are level, and a correction for pairs that it is not about would favour it. records: of the trainings.
    """
    kinds = mixers(records)
    return [pair for pair in pairs if {kinds[system] for system in pair} == {SCAN, ATTENTION}]


def mixers(records: Sequence[dict]) -> dict[str, str]:
    """{system: what mixes its tokens} as its training's record says it. The name says nothing: it may be a folder's."""
    ran = {record["system"]: record["environment"] for record in records if record["kind"] == "train"}
    scans = {system: found["scan"] != "none" for system, found in ran.items()}
    attends = {system: not found["attention"].startswith("none") for system, found in ran.items()}
    return {system: HYBRID if scans[system] and attends[system] else SCAN if scans[system] else ATTENTION for system in ran}


def pairwise(
    values: Mapping[str, Tables],
    pairs: Sequence[tuple[str, str]],
    measure: str = PRIMARY,
    shared: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """Compare the systems of each pair: system, other, difference (system minus other), low, high, effect, p_holm, seeds, detectable.

    values, shared: as in `evaluate.compare`; pairs of which a system is missing there are left out. p_holm: of the paired t-test
    over queries, corrected for the number of pairs. seeds: over all pairs of one training of each system, how often the first has
    the better mean, as "5 of 6". detectable: the smallest true difference that a test with this correction detects with 80% power:
    how far apart systems must be for these queries to tell. The better system of a pair comes first.
    """
    rows, pairs = [], [pair for pair in pairs if set(pair) <= set(values)]
    for first, second in pairs:
        both = {first: values[first], second: values[second]}
        (row,) = compare(both, second, measure, shared=shared).to_dict("records")
        if row["difference"] < 0:
            first, second = second, first
            row |= {"difference": -row["difference"], "low": -row["high"], "high": -row["low"], "effect": -row["effect"]}
        ours, theirs = (by_seed(values[system], measure) for system in (first, second))
        ahead = ours.mean(axis=0)[:, None] > theirs.mean(axis=0)
        cluster = clustered(seeds_of(values[first])[0].index, shared)
        detectable = detectable_difference(ours.mean(axis=1) - theirs.mean(axis=1), alpha=0.05 / len(pairs), cluster=cluster)
        rows.append(row | {"system": first, "other": second, "seeds": f"{ahead.sum()} of {ahead.size}", "detectable": detectable})
    table = pd.DataFrame(rows, columns=["system", "other", "difference", "low", "high", "effect", "p", "seeds", "detectable"])
    table.insert(6, "p_holm", holm(table.pop("p")))
    return table.sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def are_shown(pairs: pd.DataFrame) -> pd.Series:
    """Which differences of `pairwise` are shown: p speaks of other queries, the interval of other seeds, too."""
    return (pairs["p_holm"] < 0.05) & (pairs["low"] > 0)


def claim(pairs: pd.DataFrame, records: Sequence[dict], measure: str = PRIMARY) -> str:
    """Say in Markdown what the pairs of `across`, compared by `pairwise`, show about "Mamba ranks as well". records: as there."""
    if pairs.empty:
        return "No state-space model and Transformer were trained alike here."
    found = are_shown(pairs)
    level = ~found & (pairs["low"] > -MARGIN) & (pairs["high"] < MARGIN)
    shown, kinds = pairs[found], mixers(records)
    ahead, behind = (shown[shown["system"].map(kinds) == better] for better in (SCAN, ATTENTION))
    lines = [
        f"**Does Mamba rank as well as a Transformer trained alike?** (The paper's claim 1.) {_against_the_best(pairs, shown, kinds)}\n\n"
        f"Of {len(pairs)} pairs of a state-space model and a Transformer that were trained alike (a hybrid is neither), on {measure}, "
        "p corrected for these pairs:"
    ]
    for title, rows in (
        ("the Transformer is better", behind),
        ("it is open", pairs[~found & ~level]),
        (f"they are level (the interval within ±{MARGIN:g})", pairs[level]),
        ("the state-space model is better", ahead),
    ):
        listed = ", ".join(
            f"{row.system} over {row.other} ({row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            + (")" if row.seeds.endswith(" of 1") else f", in {row.seeds} pairs of seeds)")
            for row in rows.itertuples()
        )
        lines.append(f"- {title} in {len(rows)}" + (f": {listed}." if len(rows) else "."))
    lines.append(
        f"\nWith these queries a true difference of about {pairs['detectable'].median():.3f} is found four times in five, a smaller one "
        "less often. The intervals speak of other queries and, where there are several seeds, of other seeds of the training; with one "
        "seed another training may give another order. None speaks of another pre-training."
    )
    return "\n".join(lines)


def _against_the_best(pairs: pd.DataFrame, shown: pd.DataFrame, kinds: Mapping[str, str]) -> str:
    """Say how each state-space model stands to the Transformer that, over all of them together, is furthest ahead."""
    turned = pairs["other"].map(kinds) == SCAN  # the Transformer of the pair is the better one
    sided = pd.DataFrame(
        {
            "model": pairs["system"].mask(turned, pairs["other"]),
            "transformer": pairs["other"].mask(turned, pairs["system"]),
            "difference": pairs["difference"].mask(turned, -pairs["difference"]),
            "shown": pairs.index.isin(shown.index),
        }
    )
    best = sided.groupby("transformer")["difference"].sum().idxmin()
    standing = [
        f"{row.model} is {('ahead' if row.difference > 0 else 'behind') if row.shown else 'not told apart'} ({row.difference:+.3f})"
        for row in sided[sided["transformer"] == best].itertuples()
    ]
    once = " With one seed each this is only a first look." if pairs["seeds"].str.endswith(" of 1").all() else ""
    return f"Against the best Transformer here, {best}: {', '.join(standing)}.{once}"
