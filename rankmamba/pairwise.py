"""Architecture against architecture: every pair of systems that were trained alike, and what the pairs say about the paper's claim."""

from collections.abc import Mapping
from itertools import combinations

import pandas as pd

from .evaluate import PRIMARY, Tables, by_seed, compare, detectable_difference, holm
from .style import mixed

NANO = ("nano-", "tiny-")
STATE_SPACE = ("mamba", "hybrid")


def trained_alike(values: Mapping[str, Tables]) -> dict[str, Tables]:
    """Of all measured systems, those of the nano family, alone (not mixed with a first stage)."""
    return {system: tables for system, tables in values.items() if system.startswith(NANO) and not mixed(system)}


def pairwise(values: Mapping[str, Tables], measure: str = PRIMARY) -> pd.DataFrame:
    """Compare every pair: a row each, system, other, difference (system minus other), low, high, effect, p_holm, detectable.

    values: {system: per_query table, or one of them for each seed}. p_holm: of the paired t-test over queries, corrected for the
    number of pairs. seeds: of all pairs of a training of the one and a training of the other, in how many the first system has the
    better mean, as "5 of 6". detectable: the smallest true difference that a test with this correction finds with 80% power; two
    systems that are closer cannot be told apart with so many queries. The better system of a pair comes first.
    """
    rows, pairs = [], list(combinations(values, 2))
    for first, second in pairs:
        (row,) = compare({first: values[first], second: values[second]}, second, measure).to_dict("records")
        if row["difference"] < 0:
            first, second = second, first
            row |= {"difference": -row["difference"], "low": -row["high"], "high": -row["low"], "effect": -row["effect"]}
        ours, theirs = (by_seed(values[system], measure) for system in (first, second))
        ahead = ours.mean(axis=0)[:, None] > theirs.mean(axis=0)
        detectable = detectable_difference(ours.mean(axis=1) - theirs.mean(axis=1), alpha=0.05 / len(pairs))
        rows.append(row | {"system": first, "other": second, "seeds": f"{ahead.sum()} of {ahead.size}", "detectable": detectable})
    table = pd.DataFrame(rows, columns=["system", "other", "difference", "low", "high", "effect", "p", "seeds", "detectable"])
    table.insert(6, "p_holm", holm(table.pop("p")))
    return table.sort_values("difference", ascending=False, kind="stable", ignore_index=True)


def claim(pairs: pd.DataFrame, measure: str = PRIMARY) -> str:
    """Say in Markdown what the pairs of a state-space model and a Transformer show about "Mamba ranks as well"."""
    state_space = pairs["system"].map(_state_space), pairs["other"].map(_state_space)
    across = pairs[state_space[0] != state_space[1]]
    if across.empty:
        return "No state-space model and Transformer were trained alike here."
    found = (across["p_holm"] < 0.05) & (across["low"] > 0)  # p speaks of other queries, the interval of other seeds, too
    shown, open_ = across[found], across[~found]
    ahead, behind = (shown[shown["system"].map(_state_space) == wanted] for wanted in (True, False))
    lines = [f"Of {len(across)} pairs of a state-space model and a Transformer that were trained alike, on {measure}:"]
    for title, rows in (
        ("the state-space model is better", ahead),
        ("the Transformer is better", behind),
        ("no difference is shown", open_),
    ):
        listed = ", ".join(
            f"{row.system} over {row.other} ({row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            + (")" if row.seeds.endswith(" of 1") else f", in {row.seeds} pairs of seeds)")
            for row in rows.itertuples()
        )
        lines.append(f"- {title} in {len(rows)}" + (f": {listed}." if len(rows) else "."))
    lines.append(
        f"\nWith these queries a difference has to be about {across['detectable'].median():.3f} to be found four times in five; what is "
        "smaller stays open, whichever way it points. The intervals speak of other queries"
        " and, where there are several seeds, of other seeds; with one seed another training may give another order."
    )
    return "\n".join(lines)


def _state_space(system: str) -> bool:
    return any(word in system for word in STATE_SPACE)
