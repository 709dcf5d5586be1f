"""The figures of notebook 06: what a stored byte buys, and how much faster a query gets."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator, StrMethodFormatter

from ..plots import end_labels, line_style, marker_style, one_panel, styled
from ..reporting.style import brief, look
from .trials import MEASURE


@styled
def frontier(table: pd.DataFrame) -> Figure:
    """What a format changes in `trials.MEASURE`, with its 95% interval, against its bytes; one line per system.

    table: the stored formats of `trials.format_table`.
    """
    figure, axes = one_panel(xlabel="bytes per document", ylabel=f"{MEASURE} minus full scoring's")
    axes.axhline(0, color="#444444", linewidth=1)
    for place, (system, part) in enumerate(table.groupby("system", sort=False)):
        part = part.sort_values("kB/document")
        size = 1000 * part["kB/document"]
        axes.plot(size, part["difference"], color=look(system).color, linewidth=1, linestyle=look(system).line)
        axes.vlines(size, part["low"], part["high"], color=look(system).color, linewidth=2, alpha=0.5)
        axes.plot(size, part["difference"], **marker_style(system), label=brief(system))
        for at, names in part["format"].groupby(size.round(-1)):
            short = ", ".join(names).replace("bfloat", "bf").replace("float", "fp").replace(" layers", "")
            axes.annotate(short, (at, 0.02 + 0.05 * place), xycoords=("data", "axes fraction"), fontsize=9, ha="center",
                          color=look(system).color)  # fmt: skip
    low, high = axes.get_ylim()
    axes.set(xscale="log", ylim=(low - 0.3 * (high - low), high))
    axes.xaxis.set(minor_locator=NullLocator(), major_formatter=EngFormatter("B"))
    if not table.empty:
        axes.margins(x=0.1)  # for the names at the ends
        axes.legend(frameon=False)
    return figure


@styled
def speed_up(table: pd.DataFrame) -> Figure:
    """How many times as fast as full scoring a query is from states in memory, by length of document.

    table: `trials.length_table`.
    """
    figure, axes = one_panel(xlabel="tokens of the document", ylabel="full scoring / from states")
    ends = {}
    for system, part in table.groupby("system", sort=False):
        axes.plot(part["tokens"], part["speed-up"], **line_style(system))
        ends[system] = part["speed-up"].iloc[-1]
    axes.set(xscale="log", xticks=sorted(set(table["tokens"])), ylim=(0, None))
    axes.xaxis.set(minor_locator=NullLocator(), major_formatter=StrMethodFormatter("{x:,.0f}"))
    axes.axhline(1, color="black", linestyle=":", linewidth=1.5)
    end_labels(axes, ends)
    return figure
