"""The figures of notebook 05: cost against the length of a document, and where the time goes."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from ..plots import Chart, end_labels, line_style, styled
from ..reporting.style import brief, look
from .parts import OTHER
from .tables import against_transformers, one_batch, rounded

# Colour and hatch, from what is specific to a family to what all have. They also differ in greyscale.
PARTS = {
    "scan": ("#D55E00", ""),
    "convolution": ("#E69F00", "///"),
    "attention": ("#0072B2", ""),
    "projections": ("#bdbdbd", ""),
    OTHER: ("#e8e8e8", "..."),
    "optimizer": ("#7f7f7f", "xxx"),
    "tokeniser": ("#009E73", "\\\\\\"),
    "padding": ("#ffffff", "----"),
}


@styled
def throughput(table: pd.DataFrame) -> Figure:
    """Tokens/s against length, a row of panels a size, training left and inference right; pale bars: quartiles.

    A dotted line marks where a Mamba overtakes the fastest Transformer of its size. table: `profiling.tables.speed_table`.
    """
    meetings = against_transformers(table).dropna(subset="overtakes").drop_duplicates(["size", "mode", "system"])

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        axes.vlines(
            part["length"], part["low"], part["high"], [look(system).color for system in part["system"]], linewidth=5, alpha=0.35
        )
        _lines(axes, part, "tokens_per_s", "low", "high")
        here = meetings[(meetings["size"] == part["size"].iloc[0]) & (meetings["mode"] == part["mode"].iloc[0])]
        for place, row in enumerate(here.itertuples()):
            color, where = look(row.system).color, (row.overtakes, 0.03 + 0.09 * place)
            axes.axvline(row.overtakes, color=color, linestyle=":", linewidth=1.8)
            axes.annotate(
                f"{rounded(row.overtakes)}",
                where,
                xytext=(4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=11,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # another's line may be near
            )

    return _panels(table, draw, "tokens/s")


@styled
def memory(table: pd.DataFrame) -> Figure:
    """Peak memory of a pass against length, a row of panels a size, training left and inference right.

    table: `profiling.tables.speed_table`.
    """

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        axes.set(yscale="linear", ylim=(0, 1.15 * part["peak_mib"].max()))  # from 0, so that what hardly changes looks flat
        _lines(axes, part, "peak_mib")

    return _panels(table, draw, "peak memory (MiB)")


def _panels(table: pd.DataFrame, draw, ylabel: str) -> Figure:
    table = one_batch(table)
    sizes, modes = list(dict.fromkeys(table["size"])), list(dict.fromkeys(table["mode"]))
    figure = Chart(figsize=(0.6 + 5.2 * len(modes), 0.6 + 3.4 * len(sizes)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # a title stands below the axis above it
    for row, panels in zip(sizes, figure.subplots(len(sizes), len(modes), squeeze=False), strict=True):
        for mode, axes in zip(modes, panels, strict=True):
            part = table[(table["size"] == row) & (table["mode"] == mode)]
            lengths = sorted(set(part["length"]))
            axes.set(xscale="log", yscale="log", title=f"{row}, {mode}", xlabel="tokens of a pair", ylabel=ylabel)
            room = 1.15 if len(lengths) > 1 else 2
            axes.set_xlim(lengths[0] / room, lengths[-1] * room)
            axes.tick_params(axis="x", labelsize=10)  # lengths may stand close together
            if part["tokens_per_s"].isna().all():
                axes.text(0.5, 0.5, "out of memory", transform=axes.transAxes, ha="center")
                axes.set(xticks=[], yticks=[])
                axes.minorticks_off()
                continue
            draw(axes, part)
            axes.xaxis.set(
                major_locator=FixedLocator(lengths), minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:,.0f}")
            )
            low, high = axes.get_ylim()
            if axes.get_yscale() == "log":
                ticks = LogLocator(subs=(1, 2, 3, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8))
                axes.yaxis.set(major_locator=ticks, minor_locator=NullLocator())
            axes.yaxis.set(major_formatter=StrMethodFormatter("{x:,.0f}"))
    return figure


def _lines(axes: Axes, part: pd.DataFrame, column: str, *others: str) -> None:
    """One line per system, named at its end. others: columns for which there must be room, too."""
    shown = part[[column, *others]]
    ends, low, high = {}, shown.min().min(), shown.max().max()
    if low < np.inf and axes.get_yscale() == "log":
        axes.set_ylim(low / 1.15, high * 1.15)
    for system, rows in part.dropna(subset=column).groupby("system", sort=False):
        rows = rows.sort_values("length")
        axes.plot(rows["length"], rows[column], **line_style(system))
        ends[system] = rows[column].iloc[-1]
    end_labels(axes, ends, 0.085)


@styled
def parts(table: pd.DataFrame) -> Figure:
    """Where the microseconds of a token go, one bar per system, training left and inference right.

    table: `profiling.tables.parts_table`.
    """
    modes, systems, labels = list(dict.fromkeys(table["mode"])), list(dict.fromkeys(table["system"])), []
    figure = Chart(figsize=(1.6 + 4.6 * len(modes), 1.9 + 0.6 * len(systems)), layout="constrained")
    for mode, axes in zip(modes, figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], strict=True):
        wide = table[table["mode"] == mode].pivot(index="system", columns="part", values="us").reindex(systems).fillna(0)
        left = np.zeros(len(systems))
        for part in (part for part in PARTS if part in wide and wide[part].any()):
            color, hatch = PARTS[part]
            axes.barh(
                list(map(brief, systems)),
                wide[part],
                left=left,
                color=color,
                hatch=hatch,
                edgecolor="#444444",
                linewidth=0.8,
                label=part,
            )
            for place, share in enumerate(wide[part] / wide.sum(axis=1)):
                if share > 0.1 and not hatch:
                    width, color = wide[part].iloc[place], "white" if part in ("scan", "attention") else "black"
                    middle = {"ha": "center", "va": "center", "fontsize": 10, "color": color}
                    labels.append((axes, axes.text(left[place] + width / 2, place, f"{share:.0%}", **middle), width))
            left += wide[part].to_numpy()
        axes.set(title=mode, xlabel="microseconds a token")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    figure.draw_without_rendering()  # places everything: only now is it known which label is wider than its bar
    for axes, text, width in labels:
        left, right = axes.transData.transform([(0, 0), (width, 0)])[:, 0]
        if text.get_window_extent().width > right - left:
            text.remove()
    handles = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    shown = [part for part in PARTS if part in handles]
    figure.legend([handles[part] for part in shown], shown, loc="outside upper center", ncols=len(shown), frameon=False, fontsize=10,
                  handlelength=1.4, columnspacing=1.2)  # fmt: skip
    return figure


@styled
def padding(table: pd.DataFrame) -> Figure:
    """Real and padding tokens computed for the same pairs, fixed batches against batches by length, with what both reach in pairs/s.

    table: `profiling.tables.padding_table`.
    """
    systems, ways = list(dict.fromkeys(table["system"])), list(dict.fromkeys(table["batches"]))
    figure = Chart(figsize=(8.5, 1.2 + 0.75 * len(systems)), layout="constrained")
    axes = figure.subplots()
    for row in table.itertuples(index=False):
        place = systems.index(row.system) + 0.2 * (1 if row.batches == ways[0] else -1)
        axes.barh(place, 1, height=0.36, color=look(row.system).color)
        axes.barh(place, row.padded - 1, left=1, height=0.36, color="white", edgecolor=look(row.system).color, hatch="////")
        axes.text(row.padded, place, f"  {row.batches}: {row.pairs_per_s:,.0f} pairs/s", va="center", fontsize=11)
    axes.set(
        yticks=range(len(systems)), yticklabels=map(brief, systems), xlabel="tokens computed for a real token (hatched: padding)"
    )
    axes.set(xlim=(0, 1.5 * table["padded"].max()))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    return figure
