"""What the records of notebook 05 say: speed against length, crossovers, the paper's claim on this machine, where the time goes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..reporting.style import order
from . import MODES
from .measurements import TOKENS
from .shapes import size_of

READABLE = [
    ("gflops", "GFLOP a pair", "{:,.3g}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("pairs_per_s", "pairs/s", "{:,.1f}"),
    ("latency_ms", "ms for 100", "{:,.0f}"),
    ("peak_mib", "peak MiB", "{:,.0f}"),
    ("share", "share", "{:.0%}"),
    ("turns", "turns", "{}"),
]
# relative differences in speed: below LEVEL they are level; below ESTIMATED not told apart, if only some layers or one pass ran
LEVEL, ESTIMATED = 0.03, 0.2
UNTOLD = "not told apart"
BUSY = 1.25  # factor by which the reference product may vary on an otherwise idle machine


def speed_table(records: Sequence[dict]) -> pd.DataFrame:
    """One row per system, length, batch and mode. size: the systems it is compared with. scan: whether it has one.

    tokens_per_s with its quartiles low and high, pairs_per_s, latency_ms (of a query with 100 documents), peak_mib, share (of the
    machine's peak), turns (the number of passes that the median is of), gflops (of one pair), layers and depths; NaN where memory ran out.
    """
    rows = []
    for record in records:
        if not record["collection"].endswith(TOKENS):
            continue
        result, config = record["result"], record["config"]
        row = {"system": record["system"], "size": size_of(record["system"]), "scan": record["environment"]["scan"] != "none"}
        row |= {name: config[name] for name in ("length", "batch")} | {name: result[name] for name in ("parameters", "layers")}
        row["depths"] = " and ".join(map(str, result["depths"] or []))  # None would become NaN, which is true
        for mode in (mode for mode in MODES if mode in record["timing"] or mode in result["out_of_memory"]):
            nothing = dict.fromkeys(("tokens_per_s", "low", "high", "pairs_per_s", "latency_ms", "peak_mib", "share"), np.nan)
            numbers = {name: record["timing"].get(mode, nothing)[name] for name in nothing}
            numbers["turns"] = len(record["timing"].get(mode, {"seconds": []})["seconds"])
            rows.append(row | {"mode": mode, **numbers, "gflops": result["flops"][mode] / config["batch"] / 1e9})
    return pd.DataFrame(rows)


def crossover(lengths: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The length at which `ours` (tokens/s) overtakes `theirs`: the last upward crossing, interpolated in the logarithms.

    None if it does not within the measured lengths: it is ahead from the first or behind to the last.
    """
    gains = np.log(np.asarray(ours, float) / np.asarray(theirs, float))
    places = np.log(np.asarray(lengths, float))
    for left in range(len(gains) - 2, -1, -1):
        if gains[left] < 0 <= gains[left + 1]:
            share = -gains[left] / (gains[left + 1] - gains[left])
            return float(np.exp(places[left] + share * (places[left + 1] - places[left])))
    return None


def against_transformers(table: pd.DataFrame) -> pd.DataFrame:
    """Every Mamba against the fastest Transformer of its size: one row per size, mode, system and length.

    rival: that Transformer, at this length. ratio: tokens/s over the rival's. standing: slower, faster, level (within `LEVEL`) or not
    told apart (quartiles overlap, or within `ESTIMATED`). one_pass: whether a speed is of a single pass. overtakes: the crossover
    length over the lengths of more passes, NaN unless it is slower at some of these and faster at others.
    """
    table = one_batch(table).dropna(subset="tokens_per_s")
    rows = []
    for (size, mode), part in table.groupby(["size", "mode"], sort=False):
        rivals = part[~part["scan"]].sort_values("tokens_per_s").drop_duplicates("length", keep="last").set_index("length")
        for system, ours in part[part["scan"]].groupby("system", sort=False):
            ours = ours[ours["length"].isin(rivals.index)].sort_values("length")
            theirs = rivals.loc[ours["length"]]
            standings = [_standing(*both) for both in zip(ours.itertuples(), theirs.itertuples(), strict=True)]
            one_pass = np.minimum(ours["turns"].to_numpy(), theirs["turns"].to_numpy()) < 2
            sure = ~one_pass
            meeting = crossover(ours["length"][sure], ours["tokens_per_s"][sure], theirs["tokens_per_s"][sure])
            if not {"slower", "faster"} <= set(np.array(standings)[sure]):
                meeting = None  # curves that are not told apart cross by chance
            for row, rival, standing, single in zip(ours.itertuples(), theirs.itertuples(), standings, one_pass, strict=True):
                rows.append({"size": size, "mode": mode, "system": system, "length": row.length, "rival": rival.system})
                rows[-1] |= {"ratio": row.tokens_per_s / rival.tokens_per_s, "standing": standing, "one_pass": bool(single)}
                rows[-1]["overtakes"] = np.nan if meeting is None else meeting
    columns = ["size", "mode", "system", "length", "rival", "ratio", "standing", "one_pass", "overtakes"]
    return pd.DataFrame(rows, columns=columns)


def _standing(ours, theirs) -> str:
    ratio = ours.tokens_per_s / theirs.tokens_per_s
    estimated = min(ours.turns, theirs.turns) < 2 or ours.depths or theirs.depths
    if not estimated and abs(ratio - 1) < LEVEL:
        return "level"
    if (estimated and abs(ratio - 1) < ESTIMATED) or (ours.low <= theirs.high and theirs.low <= ours.high):
        return UNTOLD
    return "faster" if ratio > 1 else "slower"


def one_batch(table: pd.DataFrame) -> pd.DataFrame:
    """Of each system, length and mode the row with the largest batch; small systems and training come first."""
    largest = table.sort_values("batch").drop_duplicates(["system", "length", "mode"], keep="last")
    largest = largest.assign(weight=largest.groupby("size")["parameters"].transform("max"), place=largest["system"].map(order))
    by = ["weight", "mode", "place", "length"]
    return largest.sort_values(by, ascending=[True, False, True, True]).drop(columns=["weight", "place"])


def headline(records: Sequence[dict]) -> str:
    """Say in Markdown, in a sentence or two, whether the paper's claim (2) holds by the records of one machine."""
    compared = against_transformers(speed_table(records))
    machine = records[0]["environment"]
    on_cpu = machine["device"] == "cpu"
    name = machine["cpu"] if on_cpu else machine["device"]
    if compared.empty:
        return f"On {name} no Mamba was measured beside a Transformer of its size, so there is nothing to compare."
    how = f"{machine['dtype']}, {machine['threads']} threads" if on_cpu else machine["dtype"]
    training = compared.loc[compared["mode"] == "training", "standing"]
    slower = training.eq("slower")
    holds = "holds" if slower.all() else "does not hold" if not slower.any() else "holds in part"
    holds = "is not decided" if training.eq(UNTOLD).all() else holds
    return f"{busy(records)}On {name} ({how}) the claim that Mamba trains slower **{holds}**."


def verdict(records: Sequence[dict]) -> str:
    """Say in Markdown what the records of one machine answer to the paper's claim (2), that Mamba trains slower than Transformers
    with an efficient attention (arXiv 2403.18276)."""
    lines = [headline(records), ""]
    for (mode, _, system), part in against_transformers(speed_table(records)).groupby(["mode", "size", "system"], sort=False):
        kind = part["standing"] + part["one_pass"].map({True: "; one pass", False: ""})
        standings = [_standings(rows) for _, rows in part.groupby((kind != kind.shift()).cumsum())]
        meeting = part["overtakes"].iloc[0]
        end = "" if np.isnan(meeting) else f"; it overtakes at about **{rounded(meeting)} tokens**"
        lines.append(f"- {mode}, {system} against the fastest Transformer of its size: {', '.join(standings)}{end}.")
    return "\n".join(lines)


def busy(records: Sequence[dict]) -> str:
    """A sentence if the reference product itself was much slower at some times, else nothing."""
    peaks = [record["timing"]["peak_gflops"] for record in records if "peak_gflops" in record["timing"]]
    varied = max(peaks, default=1) / min(peaks, default=1)
    if varied <= BUSY:
        return ""
    return f"This machine was busy while it measured (its reference product varied by {varied:.1f} times): take these speeds as rough. "


def rounded(length: float) -> str:
    """A crossover length as text, to the two digits that an interpolation is worth."""
    return f"{float(f'{length:.2g}'):,.0f}"


def _standings(rows: pd.DataFrame) -> str:
    """Neighbouring lengths of one standing as text."""
    once = "; one pass" if rows["one_pass"].iloc[0] else ""
    return f"{rows['standing'].iloc[0]} at {_lengths(rows)} tokens ({_span(rows['ratio'])}{once})"


def _lengths(rows: pd.DataFrame) -> str:
    lengths = [f"{length:,}" for length in rows["length"]]
    return lengths[0] if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"


def _span(ratios: pd.Series) -> str:
    low, high = ratios.min(), ratios.max()
    return f"{low:.2f} times its tokens/s" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} times its tokens/s"


def parts_table(records: Sequence[dict]) -> pd.DataFrame:
    """One row per system, mode and part: its microseconds per real token (`profiling.parts.breakdown`)."""
    rows = [
        {"system": record["system"], "mode": mode, "part": part, "us": 1e6 * seconds / record["result"]["tokens"]}
        for record in records
        if "parts" in record["timing"]
        for mode, parts in record["timing"]["parts"].items()
        for part, seconds in parts.items()
    ]
    return pd.DataFrame(rows)


def padding_table(records: Sequence[dict]) -> pd.DataFrame:
    """One row per system and way to batch: padded (tokens computed per real token) and pairs_per_s."""
    rows = []
    for record in (record for record in records if "parts" in record["timing"]):
        seconds, result = record["timing"]["seconds"], record["result"]
        for name in seconds:
            rows.append({"system": record["system"], "batches": name, "padded": result["padded_tokens"][name] / result["tokens"]})
            rows[-1]["pairs_per_s"] = record["config"]["n_pairs"] / seconds[name]
    return pd.DataFrame(rows)


def fastest_attention(table: pd.DataFrame) -> pd.DataFrame:
    """Of each Transformer measured with several attentions, keep the fastest at the longest length that it reached."""
    reached = one_batch(table).dropna(subset="tokens_per_s").sort_values(["length", "tokens_per_s"])
    name = reached["system"].str.split(" (", regex=False).str[0]
    return table[table["system"].isin(reached["system"].groupby([name, reached["mode"]]).last())]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The speed table as text for a notebook."""
    cells = pd.DataFrame({"system": table["system"], "tokens": table["length"].map("{:,}".format), "pairs": table["batch"]})
    cells["params (M)"] = (table["parameters"] / 1e6).map("{:.3g}".format)
    cells["layers run"] = [
        f"{depths} of {layers:.0f}" if depths else "all" for depths, layers in zip(table["depths"], table["layers"], strict=True)
    ]
    for name, heading, form in READABLE:
        cells[heading] = table[name].map(form.format)
    return cells.set_index("system")
