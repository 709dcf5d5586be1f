"""The profile panel: choose a model, a length and a batch, measure what they cost, and keep the measurements side by side."""

from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as widgets

from ..reporting.style import look
from .controls import Controls, Panel, choice, in_row, ink, table_html
from .job import Job

LENGTHS, BATCHES = [2**power for power in range(6, 14)], [1, 8, 16, 32, 64]  # training needs whole groups of 8, or of 1
MODES = ("inference", "training")
CSS = """<style>
.rm-costs table { width: 100%; max-width: 1000px; }
.rm-costs :is(th, td):nth-child(5) { text-align: left; width: 34%; }
.rm-costs td:nth-child(5) i { height: 11px; }
</style>"""


class ProfilePanel(Panel):
    """Measure systems one after another; every measurement joins the table.

    measure(system, length, batch, stop=, modes=) returns what `profiling.measure` does. length: the initial one.
    """

    def __init__(self, measure: Callable[..., dict], systems: Sequence[str], length: int = 512):
        self._measure, self._rows = measure, []
        wide = {"style": {"description_width": "110px"}, "layout": widgets.Layout(width="420px")}
        self.system = choice(systems, "model")
        self.length = widgets.SelectionSlider(
            options=sorted({length, *LENGTHS}), value=length, description="length, tokens", **wide
        )
        self.batch = widgets.SelectionSlider(options=BATCHES, value=8, description="batch, pairs", **wide)
        self.controls = Controls("Measure", self._work, self._draw, unit="mode")
        self.table = widgets.HTML()
        sizes = in_row([self.length, self.batch])
        super().__init__([self.system, sizes, self.controls.row(), self.controls.error, self.table], [self.controls])

    def _work(self, job: Job) -> None:
        chosen = self.system.value, self.length.value, self.batch.value
        for place, mode in enumerate(MODES):
            job.report(place, len(MODES))
            found = self._measure(*chosen, stop=job.stop, modes=[mode])
            if mode in found or mode in found["out_of_memory"]:
                self._rows.append((*chosen, mode, found))
            if job.stop.is_set():
                return
        job.report(len(MODES), len(MODES))

    def _draw(self, job: Job) -> None:
        self.table.value = CSS + costs_table(list(self._rows))


def costs_table(rows: Sequence[tuple[str, int, int, str, dict]]) -> str:
    """Measurements (system, length, batch, mode, what `profiling.measure` returned) as an HTML table, the newest first."""
    fastest = max((found[mode]["tokens_per_s"] for *_, mode, found in rows if mode in found), default=1.0)
    heads = [
        "model",
        "length",
        "batch",
        "mode",
        "tokens/s: median, quartiles",
        "ms for 100 documents",
        "peak MiB",
        "GFLOP a pair",
        "of a large product's speed",
    ]
    lines = []
    for system, length, batch, mode, found in reversed(rows):
        cells = [escape(system), f"{length:,}", batch, mode]
        gflops = f"{found['flops'][mode] / batch / 1e9:,.3g}"
        if mode in found:
            numbers = found[mode]
            width = 55 * numbers["tokens_per_s"] / fastest
            cells += [
                f'<i style="width:{width:.1f}%;background:{ink(look(system).color)}"></i>{numbers["tokens_per_s"]:,.0f} '
                f'<span class="rm-note">{numbers["low"]:,.0f} to {numbers["high"]:,.0f}</span>',
                f"{numbers['latency_ms']:,.0f}" if mode == "inference" else "",
                "" if numbers["peak_mib"] is None else f"{numbers['peak_mib']:,.0f}",
                gflops,
                f"{numbers['share']:.0%}",
            ]
        else:
            cells += ["does not fit into memory", "", "", gflops, ""]
        lines.append(("", cells))
    return f'<div class="rm-costs">{table_html(heads, lines)}</div>' if rows else ""
