"""The panel of document states: choose a model, a format and a size of collection, and see what storing costs and saves."""

from html import escape

import ipywidgets as widgets
from matplotlib.ticker import EngFormatter

from ..reporting.style import look
from ..states.trials import FULL, HOURS, MACHINES, format_table, outlook
from .controls import Panel, ink

CSS = """<style>
.rm-cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 18px 26px; margin: 10px 0 4px; max-width: 900px; }
.rm-cards div { border-top: 3px solid; padding-top: 4px; }
.rm-cards b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.rm-cards span { font-size: 12px; color: var(--jp-ui-font-color2, #666); }
</style>"""
BYTES = EngFormatter("B", places=1)


class StatesPanel(Panel):
    """What the states of a collection take, from the records of `states.trials.trial`. documents: the initial size of
    the collection."""

    def __init__(self, records: list[dict], documents: int):
        self._records, self._formats = records, format_table(records)
        formats = [name for name in dict.fromkeys(self._formats["format"]) if name != FULL]
        wide = {"style": {"description_width": "90px"}, "layout": widgets.Layout(width="440px"), "continuous_update": True}
        self.system = widgets.SelectionSlider(options=list(dict.fromkeys(self._formats["system"])), description="model", **wide)
        self.format = widgets.SelectionSlider(options=formats, description="format", **wide)
        sizes = sorted({documents, *(digit * 10**power for power in range(4, 9) for digit in (1, 3)), 10**9})
        self.documents = widgets.SelectionSlider(
            options=[(f"{size:,}", size) for size in sizes], value=documents, description="documents", **wide
        )
        self.cards = widgets.HTML()
        for widget in (self.system, self.format, self.documents):
            widget.observe(self._show, "value")
        super().__init__([self.system, self.format, self.documents, self.cards], [])
        self._show()

    def _show(self, change=None) -> None:
        chosen = self.system.value, self.format.value, self.documents.value
        self.cards.value = CSS + cards_html(self._records, self._formats, *chosen)


def cards_html(records: list[dict], formats, system: str, format: str, documents: int) -> str:
    """One row of numbers for a model, a format and a number of documents; a note where this model has no such format."""
    row = formats[(formats["system"] == system) & (formats["format"] == format)]
    if row.empty:
        return f'<div class="rm-note">{escape(system)} has not been stored as {escape(format)}.</div>'
    row = row.iloc[0].to_dict()
    full = formats[(formats["system"] == system) & (formats["format"] == FULL)].iloc[0]
    table = outlook([record for record in records if record["system"] == system], documents)
    large = table[table["format"] == format].iloc[0]
    measure = next(record["config"]["measure"] for record in records if record["system"] == system)
    numbers = [
        (BYTES(1000 * row["kB/document"]), "a document"),
        (BYTES(1e12 * large["TB"]), f"{documents:,} documents"),
        (f"{large[MACHINES]:,.0f}", MACHINES),
        (f"{large[HOURS]:,.3g}", HOURS),
        (f"{row['speed-up']:.1f}×", f"as fast as full scoring ({row['ms/query']:,.1f} ms a query, {full['ms/query']:,.0f} ms)"),
        (f"{large['break-even']:.2f}", "scorings of a document until it has paid"),
        (f"{row['difference']:+.3f}", f"{measure} [{row['low']:+.3f}, {row['high']:+.3f}]"),
        (f"{row['rankings kept']:.0%}", "of the rankings kept"),
    ]
    color = ink(look(system).color)
    cards = (f'<div style="border-color:{color}"><b>{number}</b><span>{escape(what)}</span></div>' for number, what in numbers)
    return f'<div class="rm-cards" aria-live="polite">{"".join(cards)}</div>'
