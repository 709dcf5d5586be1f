"""The sentences of the report, made from the records and from nothing else."""

import pandas as pd

from ..errors import InputError
from ..evaluate import BASELINE, PRIMARY
from .style import mixed


def answer(table: pd.DataFrame, measure: str = PRIMARY) -> str:
    """Say in Markdown, from the final table of one collection, which systems beat the first stage and how the nano ones compare.

    A difference counts as shown when its Holm-corrected p is below 0.05; anything else is called unresolved.

    Raises:
        InputError: the first stage was not evaluated.
    """
    if BASELINE not in set(table["system"]):
        raise InputError(f"expected {BASELINE} among the evaluated systems, got {', '.join(table['system'])}; run 04_evaluate")
    reference = table.set_index("system").loc[BASELINE]
    lines = [
        f"**Does it beat the first stage?** On {reference['queries']:,} test queries of `{reference['collection']}`, {BASELINE} alone "
        f"reaches {measure} {reference[measure]:.3f}."
    ]
    compared = table[table["difference"].notna()].sort_values("difference", ascending=False)
    groups = {
        "**Better than the first stage**": compared[(compared["p_holm"] < 0.05) & (compared["difference"] > 0)],
        "**Not told apart from it** with this many queries": compared[compared["p_holm"] >= 0.05],
        "**Worse than the first stage**": compared[(compared["p_holm"] < 0.05) & (compared["difference"] < 0)],
    }
    lines += [f"- {title}: {_differences(rows)}." for title, rows in groups.items() if len(rows)]
    nano = table[table["system"].str.startswith(("nano-", "tiny-")) & ~table["system"].map(mixed)]
    if len(nano) > 1:
        best, worst = nano.loc[nano[measure].idxmax()], nano.loc[nano[measure].idxmin()]
        lines.append(
            f"\nAmong the small systems, {measure} goes from {worst[measure]:.3f} ({worst['system']}) to "
            f"{best[measure]:.3f} ({best['system']})"
        )
        if nano["timed_on"].any():  # of many trainings on several devices, beside one another
            lines[-1] += ". Their speeds here are of several machines: *Does it train slower?* has measured ones."
        elif nano["pairs_per_s"].notna().sum() > 1:
            fast, slow = nano.loc[nano["pairs_per_s"].idxmax()], nano.loc[nano["pairs_per_s"].idxmin()]
            lines[-1] += (
                f", and scoring from {slow['pairs_per_s']:,.0f} ({slow['system']}) to {fast['pairs_per_s']:,.0f} documents per second "
                f"({fast['system']})."
            )
        else:
            lines[-1] += "."
    return "\n".join(lines)


def seeds(table: pd.DataFrame) -> str:
    """Say in Markdown, from rows of `tables.seed_by_seed`, which of their systems beats the first stage with how many seeds."""
    if table["seed"].nunique() < 2:
        return "One seed: add another with `-p seed=1` and the same `--results`; it may give another order."
    shown = ((table["p_holm"] < 0.01) & (table["difference"] > 0)).groupby(table["system"]).agg(["sum", "count"])
    listed = ", ".join(f"{system} with {better} of {count}" for system, better, count in shown.itertuples(name=None))
    return f"Seed by seed, better than {BASELINE} (p < 0.01, corrected within the seed): {listed}."


def _differences(rows: pd.DataFrame) -> str:
    return ", ".join(f"{row.system} ({row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}])" for row in rows.itertuples())


def provenance(records: list[dict], scale: str) -> str:
    """Say in Markdown where and how the records came about, and the command that makes them again."""
    # the study as a whole has a record too, which measures nothing
    measured = [record for record in records if record["environment"]]
    trained = [record for record in records if record["kind"] == "train"]
    newest = max(measured, key=lambda record: record["created"])
    lines = [
        f"- made by rankmamba {newest['version']}, finished {newest['created']}",
        f"- seeds: {', '.join(str(seed) for seed in sorted({record['seed'] for record in records}))}",
    ]
    machines: dict[str, list[str]] = {}
    for record in measured:
        ran = record["environment"]
        machine = f"{ran['cpu']} ({ran['cpus']} cores, {ran['cpu_capability']})"
        machine += f", device {ran['device']}, threads: {ran['threads']}, torch {ran['torch']}"
        machines.setdefault(machine, []).append(record["kind"].replace("_", " "))
    lines += [f"- {', '.join(dict.fromkeys(kinds))}: on {machine}" for machine, kinds in machines.items()]
    for record in trained:
        ran, config = record["environment"], record["config"]
        lines.append(
            f"- {record['system']}: {record['result']['steps']} steps of {config['batch_size']} groups of {config['group_size']}, "
            f"learning rate {config['learning_rate']:g}, {config['max_length']} tokens, {ran['precision']}"
            + (f"; scan: {ran['scan']}" if ran["scan"] != "none" else "")
            + (" (**stopped early**)" if record["result"]["partial"] else "")
        )
    again = f"\nAgain: `python3 run.py study --scale {scale}`, with each `-p` that it was given"
    if len({record["seed"] for record in records}) > 1:
        again += ", once for each seed (`-p seed=0` and so on)"
    return "\n".join([*dict.fromkeys(lines), again])  # the seeds of a system give equal lines
