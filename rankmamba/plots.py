"""The figures: pure functions from tables to a figure, in one style, with one colour, marker and line for a family of systems.

Figures are unknown to pyplot: none has to be closed, none leaks between cells. A system mixed with the first stage ("X + bm25")
has X's colour and an open marker.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from .errors import InputError
from .evaluate import BASELINE, PRIMARY, Tables, by_seed, seeds_of, summarise
from .files import replacing
from .reporting.style import STYLE, base, brief, look, mixed, order


def in_style():
    """The context that figures are drawn and written in: matplotlib's own settings and ours, none of the user's."""
    return matplotlib.style.context(["default", STYLE])


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate what draws a figure: in the one style; who cannot see it is told the first sentence of the function's docstring."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        with in_style():
            figure = draw(*args, **kwargs)
        figure.alt = (draw.__doc__ or "").partition("\n")[0]
        return figure

    return drawn


class Chart(Figure):
    """A figure that notebooks show by themselves (IPython knows plain ones only once pyplot has chosen its backend)."""

    alt = ""  # what it shows, in words

    def _repr_png_(self) -> tuple[bytes, dict]:
        buffer = io.BytesIO()
        with in_style():
            self.savefig(buffer, format="png", dpi=160)
        width, height = self.get_size_inches()
        return buffer.getvalue(), {"width": round(80 * width), "height": round(80 * height), "alt": self.alt}


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write <folder>/<name>.png (150 dots per inch) and .svg, each wholly or not at all; returns the path of the PNG."""
    for kind in ("svg", "png"):
        path = Path(folder) / f"{name}.{kind}"
        with replacing(path) as temporary, in_style():
            figure.savefig(temporary, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return path


@styled
def forest(
    values: Mapping[str, Tables],
    measures: str | Sequence[str] = PRIMARY,
    shared: Mapping[str, int] | None = None,
) -> Figure:
    """Mean and 95% interval of every system, one panel per measure; the baseline's as a line and a band across.

    values: {system: its `per_query` table, or one for each seed}. A system and its mixture share a row; ticks are single seeds.
    shared: as in `evaluate.summarise`.
    """
    measures = [measures] if isinstance(measures, str) else list(measures)
    means = {system: summarise(tables, shared=shared) for system, tables in values.items()}
    ticks = "; ticks: single seeds" if any(len(seeds_of(tables)) > 1 for tables in values.values()) else ""
    rows = sorted({base(system) for system in values}, key=lambda system: (system != BASELINE, order(system)))
    figure = Chart(figsize=(2.5 + 4.5 * len(measures), 1.4 + 0.55 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        if BASELINE in means:
            low, high, middle = (means[BASELINE][measure][key] for key in ("low", "high", "mean"))
            axes.axvspan(low, high, color=look(BASELINE).color, alpha=0.12, linewidth=0)
            axes.axvline(middle, color=look(BASELINE).color, linestyle=look(BASELINE).line, linewidth=1.5)
        for system, tables in values.items():
            twins = sum(base(other) == base(system) for other in values) > 1
            place = rows.index(base(system)) + (0 if not twins else 0.17 if mixed(system) else -0.17)
            interval = means[system][measure]
            axes.plot([interval["low"], interval["high"]], [place, place], color=look(system).color)
            if len(seeds_of(tables)) > 1:
                axes.plot([table[measure].mean() for table in tables], [place] * len(tables), "k|", markersize=9)
            axes.plot(interval["mean"], place, **marker_style(system))
            axes.annotate(f" {interval['mean']:.3f}", (1, place), xycoords=("axes fraction", "data"), va="center", fontsize=11)
        label = f"{measure}: mean, 95% interval of each alone{ticks}\nsystems that overlap may differ: they share queries"
        label += f"\ngrey band: the interval of {BASELINE}" if BASELINE in means else ""
        axes.set(xlabel=label, yticks=range(len(rows)), yticklabels=map(brief, rows), ylim=(len(rows) - 0.5, -0.5))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    _key(figure, values)
    return figure


@styled
def cost(table: pd.DataFrame, measure: str = PRIMARY) -> Figure:
    """Effectiveness against speed on a logarithmic axis, from one collection's final table; without a speed, a line across.

    A thin line joins a system to its mixture.
    """
    by, labels = "pairs_per_s", {}
    figure, axes = one_panel(ylabel=f"{measure} (bar: a typical 95% interval)", xlabel="documents scored per second, logarithmic")
    for system, part in table.groupby(table["system"].map(base), sort=False):
        if part[by].isna().all():
            axes.axhline(part[measure].iloc[0], color=look(system).color, linestyle=look(system).line, linewidth=1.5)
        axes.plot(part[by], part[measure], color=look(system).color, linewidth=1)
        for row in reversed(part.to_dict("records")):  # the mixture first: its open marker would hide the system's own
            axes.plot(row[by], row[measure], **marker_style(row["system"]))
        labels[system] = part[measure].iloc[0]
    half = (table[f"{measure} high"] - table[f"{measure} low"]).median() / 2
    low, high = table[by].min() / 1.6, table[by].max() * 1.6
    axes.errorbar(low * 1.15, table[measure].mean(), yerr=half, color="black", capsize=4, linewidth=1.5)
    if low < high:
        axes.set(xscale="log", xlim=(low, high))
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter=EngFormatter())
    end_labels(axes, labels)
    _key(figure, table["system"])
    return figure


@styled
def training_curves(curves: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]], group_size: int | None = None) -> Figure:
    """Training loss of every system, smoothed over a tenth of the run, 15 steps at least.

    Faint behind: the raw values, or the range of the seeds.

    curves: {system: table with step and loss (nats), or one for each seed}. group_size draws the loss of guessing, ln(group size).
    """
    figure, axes = one_panel(xlabel="training steps", ylabel="LCE loss (nats)")
    ends, stops, top = {}, {}, 0.0 if group_size is None else math.log(group_size)
    for turn, (system, given) in enumerate(curves.items()):
        style = look(system)
        tables = [table.reset_index(drop=True) for table in seeds_of(given)]
        every = max(1, len(tables[0]) // 8)  # markers, those of each system at other steps
        smooth = pd.concat([table["loss"].ewm(span=max(15, len(table) / 10)).mean() for table in tables], axis=1)
        places = pd.concat([table["step"] for table in tables], axis=1).mean(axis=1)
        if len(tables) == 1:
            axes.plot(places, tables[0]["loss"], color=style.color, linewidth=0.6, alpha=0.15)
        axes.fill_between(places, smooth.min(axis=1), smooth.max(axis=1), color=style.color, alpha=0.25, linewidth=0)
        line = {"linewidth": 1.8, "markevery": (turn * every // len(curves), every), "markersize": 6}
        axes.plot(places, smooth.mean(axis=1), **line_style(system) | line)
        ends[system], stops[system] = float(smooth.iloc[-1].mean()), places.iloc[-1]
        top = max(top, smooth.iloc[len(smooth) // 50 :].mean(axis=1).max())  # the first steps would press the rest together
    if group_size is not None:
        axes.axhline(math.log(group_size), color="black", linestyle=":", linewidth=1.5)
        axes.annotate(f"guessing: ln {group_size}", (0.98, math.log(group_size)), xycoords=("axes fraction", "data"), ha="right",
                      xytext=(0, 4), textcoords="offset points", path_effects=[withStroke(linewidth=4, foreground="white")])  # fmt: skip
    last = max(axes.dataLim.x1, 1)
    for system, value in ends.items():  # a shorter run's end is led to its label
        axes.plot([stops[system], last], [value, value], color=look(system).color, linewidth=1, linestyle=":")
    axes.set(ylim=(0, 1.1 * top), xlim=(0, last))
    axes.xaxis.set(major_locator=MaxNLocator(integer=True), major_formatter=EngFormatter(sep=""))
    end_labels(axes, ends)
    return figure


@styled
def wins_and_losses(values: Mapping[str, Tables], measure: str = PRIMARY, systems: Sequence[str] | None = None) -> Figure:
    """Each query's difference to the baseline, sorted, one panel per system, with the shares of queries won, tied and lost."""
    systems = [system for system in values if system != BASELINE] if systems is None else list(systems)
    if not systems:
        raise InputError(
            f"expected at least one system to compare with {BASELINE}, got none; run 02_train, 03_rerank and 04_evaluate"
        )
    columns = min(3, len(systems))
    rows = math.ceil(len(systems) / columns)
    figure = Chart(figsize=(0.8 + 3.3 * columns, 0.7 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    reference = by_seed(values[BASELINE], measure).mean(axis=1)
    for place, (axes, system) in enumerate(zip(panels, systems, strict=False)):
        differences = np.sort(by_seed(values[system], measure).mean(axis=1) - reference)[::-1]
        edges, color = np.linspace(0, 1, len(differences) + 1), look(system).color
        axes.stairs(np.maximum(differences, 0), edges, fill=True, color=color)
        axes.stairs(np.minimum(differences, 0), edges, fill=True, facecolor="white", edgecolor=color, hatch="////", linewidth=0.8)
        axes.axhline(0, color="#444444", linewidth=0.8)
        won, lost = (differences > 1e-12).mean(), (differences < -1e-12).mean()
        axes.text(0.03, -0.08, f"better\n{won:.0%}", va="top")
        axes.text(0.97, 0.08, f"worse\n{lost:.0%}", ha="right")
        if 1 - won - lost > 0.2:
            axes.text((won + 1 - lost) / 2, 0.08, f"same\n{1 - won - lost:.0%}", ha="center")
        name = brief(system)
        name += ": " if len(name) < 25 else ":\n"
        axes.set(title=f"{name}{differences.mean():+.3f}", ylim=(-1.05, 1.05), xlim=(0, 1), xticks=(0, 0.5, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelbottom=place + columns >= len(systems))
    for axes in panels[len(systems) :]:
        axes.remove()
    figure.get_layout_engine().set(w_pad=0.12)
    figure.supxlabel("queries, sorted by their difference", fontsize=12)
    figure.supylabel(f"{measure} minus {BASELINE}'s", fontsize=12)
    return figure


@styled
def document_lengths(lengths: Sequence[int], limit: int) -> Figure:
    """How many tokens the documents have; those longer than the limit are hatched. The last bar holds the longest hundredth."""
    lengths = np.asarray(lengths)
    whole, end = (lengths <= limit).mean(), max(np.quantile(lengths, 0.99), 1.5 * limit)
    width = math.ceil(end / 40)
    bins = np.arange(limit % width - width, end + width, width) + 0.5  # a bar ends at the limit
    figure, axes = one_panel(xlabel="length of the document (tokens)", ylabel="documents", height=3.8)
    shown = pd.Series(np.minimum(lengths, bins[-1]))
    seaborn.histplot(x=shown[lengths <= limit], bins=bins, ax=axes, color="#0072B2", edgecolor="white", alpha=1)
    seaborn.histplot(x=shown[lengths > limit], bins=bins, ax=axes, color="#fbe3d2", edgecolor="#D55E00", hatch="////", alpha=1)
    top = axes.get_ylim()[1]
    axes.axvline(limit + 0.5, color="black", linestyle="--", linewidth=1.5)
    axes.text(limit + 0.5, 1.2 * top, f"  read whole: {whole:.0%}\n  cut at {limit} tokens: {1 - whole:.0%}", va="top")
    axes.text(bins[-1], (shown > bins[-2]).sum() + 0.02 * top, "longer", ha="right", fontsize=10)
    axes.set(xlim=(0, bins[-1]), ylim=(0, 1.2 * top))
    axes.grid(False, axis="x")
    return figure


@styled
def weight_curves(tables: Mapping[str, pd.DataFrame], measure: str = PRIMARY) -> Figure:
    """A measure on dev against the weight of the model in the mixture with the first stage, the best weight of each marked.

    tables: {system: table weight, value}, as `Experiment.weight_tables` has them.
    """
    figure, axes = one_panel(xlabel="weight of the model (0: first stage alone, 1: model alone)", ylabel=f"{measure} on dev")
    ends = {}
    for system, table in tables.items():
        table = table.sort_values("weight", ignore_index=True)
        axes.plot(table["weight"], table["value"], color=look(system).color, linestyle=look(system).line)
        best = table.loc[table["value"].idxmax()]
        axes.plot(best["weight"], best["value"], **marker_style(system), clip_on=False)
        ends[system] = table["value"].iloc[-1]
    axes.set(xlim=(0, 1))
    end_labels(axes, ends)
    return figure


@styled
def answer_positions(table: pd.DataFrame, measure: str = PRIMARY) -> Figure:
    """A measure by where in its document the answer starts: one panel per reading, one line per system, the first stage's in each.

    table: `transfer.by_start`.
    """
    groups, readings = (list(dict.fromkeys(table[column])) for column in ("words before the answer", "reading"))
    readings = [reading for reading in readings if reading]
    figure = Chart(figsize=(2.4 + 2.9 * len(readings), 4.4), layout="constrained")
    panels = figure.subplots(1, len(readings), sharey=True, squeeze=False)[0]
    for axes, reading in zip(panels, readings, strict=True):
        for system, part in table[table["reading"].isin([reading, ""])].groupby("system", sort=False):
            places = [groups.index(group) for group in part["words before the answer"]]
            axes.plot(places, part["mean"], **line_style(system) | {"linewidth": 1.8}, label=brief(system))
        axes.set(title=reading, xticks=range(len(groups)), xticklabels=[group.split()[0] for group in groups])
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False, handlelength=3)
    half = (table["high"] - table["low"]).median() / 2
    panels[0].errorbar(-0.4, table["mean"].mean(), yerr=half, color="black", capsize=4, linewidth=1.5)
    figure.supxlabel("words before the paragraph that answers, at least", fontsize=12)
    figure.supylabel(f"{measure} (bar: a typical 95% interval)", fontsize=12)
    return figure


@styled
def differences_by_words(table: pd.DataFrame, measure: str = PRIMARY) -> Figure:
    """Each system's difference to the baseline by the words of the relevant document: one line per system.

    table: `tables.by_words`. Below each group of queries stands the baseline's own mean.
    """
    groups = table.drop_duplicates("words")
    half = (table["high"] - table["low"]).median() / 2
    figure, axes = one_panel(
        "words of the relevant document", f"{measure} - {BASELINE}\n(typical 95% interval: ±{half:.2f})", height=4.4
    )
    axes.axhline(0, color=look(BASELINE).color, linestyle=look(BASELINE).line)
    ends = {}
    for system, part in table.groupby("system", sort=False):
        axes.plot(range(len(groups)), part["difference"], **line_style(system))
        ends[system] = part["difference"].iloc[-1]
    ticks = [
        f"{words}\n{queries:,} queries\n{BASELINE} {own:.2f}"
        for words, queries, own in groups[["words", "queries", "of the baseline"]].itertuples(index=False, name=None)
    ]
    axes.set_xticks(range(len(groups)), ticks)
    end_labels(axes, ends)
    return figure


@styled
def reading_lengths(table: pd.DataFrame, measure: str = PRIMARY) -> Figure:
    """A measure by the tokens read of query and document together: one panel per collection, one line per system, the first stage's dotted.

    table: `transfer.by_reading`; its MaxP is left out.
    """
    collections = list(dict.fromkeys(table["collection"]))
    figure = Chart(figsize=(2.4 + 2.9 * len(collections), 4.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    panels = figure.subplots(1, len(collections), sharey=True, squeeze=False)[0]
    for axes, collection in zip(panels, collections, strict=True):
        here = table[(table["collection"] == collection) & (table["tokens"].notna() | (table["system"] == BASELINE))]
        for system, part in here.groupby("system", sort=False):
            if part["tokens"].isna().all():
                axes.axhline(part["mean"].iloc[0], color=look(system).color, linestyle=":", linewidth=1.8, label=brief(system))
            else:
                axes.plot(part["tokens"], part["mean"], **line_style(system) | {"linewidth": 1.8}, label=brief(system))
        axes.set(title=brief(collection.removeprefix("rankmamba/").removesuffix("/test")), xscale="log")
        axes.xaxis.set(major_locator=FixedLocator(sorted(set(here["tokens"].dropna()))), minor_locator=NullLocator())
        axes.xaxis.set(major_formatter=StrMethodFormatter("{x:,.0f}"))
    lines = {line.get_label(): line for axes in panels for line in axes.lines}
    order = sorted(lines, key=lambda shown: -table.loc[table["system"].map(brief) == shown, "mean"].max())
    figure.legend([lines[shown] for shown in order], order, loc="outside right center", frameon=False, handlelength=3)
    half = (table["high"] - table["low"]).median() / 2
    figure.supxlabel("tokens read of query and document together, logarithmic", fontsize=12)
    figure.supylabel(f"{measure} (typical 95% interval: ±{half:.2f})", fontsize=12)
    return figure


def one_panel(xlabel: str, ylabel: str, height: float = 4.8) -> tuple[Figure, Axes]:
    """A new figure of one panel; height: inches."""
    figure = Chart(figsize=(8.5, height), layout="constrained")
    return figure, figure.subplots(subplot_kw={"xlabel": xlabel, "ylabel": ylabel})


def marker_style(system: str) -> dict:
    """How a system's points are drawn, without a line."""
    style = look(system)
    face = "white" if mixed(system) else style.color
    return {"marker": style.marker, "color": style.color, "markerfacecolor": face, "markeredgewidth": 1.6, "linestyle": "none"}


def line_style(system: str) -> dict:
    """How a system's line is drawn, with its points."""
    return marker_style(system) | {"linestyle": look(system).line}


def _key(figure: Figure, systems: Sequence[str]) -> None:
    """Say what open markers mean, if there are any."""
    if any(map(mixed, systems)):
        looks = {"alone": "black", "mixed with the first stage": "white"}
        lines = [Line2D([], [], marker="o", color="black", markerfacecolor=face, linestyle="none") for face in looks.values()]
        figure.legend(lines, looks, loc="outside upper right", ncols=2, frameon=False, fontsize=11)


def end_labels(axes: Axes, values: Mapping[str, float], gap: float = 0.06) -> None:
    """Write each name with its marker at the right edge beside its value, or near it where names would touch.

    gap: between names, a share of the panel's height.
    """
    axes.set_ylim(axes.get_ylim())
    heights = {name: (axes.transScale + axes.transLimits).transform((1, value))[1] for name, value in values.items()}
    names = sorted(heights, key=heights.get)
    for name, place in zip(names, _spread([heights[name] for name in names], gap), strict=True):
        right = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1, 1.03, 1.05], [heights[name], place, place], color=look(name).color, linewidth=1, **right)
        axes.plot(1.05, place, **marker_style(name), **right)
        axes.annotate(
            brief(name), (1.05, place), xycoords="axes fraction", xytext=(9, 0), textcoords="offset points", va="center"
        )


def _spread(values: list[float], gap: float) -> list[float]:
    """Sorted values, moved to be at least `gap` apart: those that would touch are spaced evenly around their mean, within the panel."""

    def middle(group: list[float]) -> float:
        half = gap * (len(group) - 1) / 2
        return min(max(np.mean(group), half), max(half, 1 - half))

    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and middle(groups[-1]) - middle(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            groups[-1] += last
    return [middle(group) + gap * (k - (len(group) - 1) / 2) for group in groups for k in range(len(group))]
