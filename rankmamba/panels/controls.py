"""What every panel shows of its job: buttons, a bar, the time, and errors; and the rule that there is one panel of a kind."""

import threading
from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as widgets
from tqdm.std import tqdm

from ..errors import InputError
from ..memory import out_of_memory
from .job import Job

CSS = """<style>
.rankmamba { max-width: 1100px; padding: 2px 0 10px; color: var(--jp-ui-font-color1, #222); }
[data-jp-theme-light="false"] .rankmamba { --rm-lighter: 45%; }
.rankmamba .rm-status { font-variant-numeric: tabular-nums; }
.rankmamba .rm-note { color: var(--jp-ui-font-color2, #666); }
.rankmamba .rm-error { border-left: 3px solid #b3261e; padding: 6px 12px; margin: 6px 0; max-width: 900px; line-height: 1.4; }
.rankmamba .rm-error summary { cursor: pointer; }
.rankmamba .rm-error pre { font-size: 11px; max-height: 16em; overflow: auto; }
.rm-table { border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums; margin-top: 6px; }
.rm-table th { text-align: right; font-weight: 600; padding: 2px 10px; border-bottom: 1px solid currentColor; }
.rm-table td { text-align: right; padding: 2px 10px; white-space: nowrap; }
.rm-table th:first-child, .rm-table td:first-child { text-align: left; padding-left: 0; }
.rm-table tr.rm-now { font-weight: 700; }
.rm-table i { display: inline-block; width: 18px; height: 3px; margin-right: 7px; vertical-align: middle; }
.rankmamba .widget-toggle-buttons { display: flex; align-items: center; }
.rankmamba .widget-toggle-buttons > .widget-label { text-align: right; margin-right: 8px; }
.rankmamba .rm-wide .slider-container { flex: 0 0 190px; }
.rankmamba .rm-wide .widget-readout { flex: 1 1 auto; max-width: none; text-align: left; overflow: hidden; text-overflow: ellipsis; }
.rankmamba .widget-html-content { line-height: 1.35; }
.rankmamba :focus-visible { outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 1px; }
</style>"""
_open: dict[str, "Panel"] = {}


class Panel(widgets.VBox):
    """A box of widgets with its jobs. There is one panel of a kind: a new one ends and removes its predecessor."""

    def __init__(self, children: list[widgets.Widget], controls: list["Controls"]):
        self._controls = controls
        kind = type(self).__name__
        if kind in _open:
            _open[kind].close()
        super().__init__([widgets.HTML(CSS, layout=widgets.Layout(display="none")), *children])
        self.add_class("rankmamba")
        _open[kind] = self

    def close(self) -> None:
        """End what the panel is doing, wait for it, and remove the panel with all that is in it: ipywidgets keeps what is not closed."""
        for controls in self._controls:
            controls.cancel()
        if _open.get(type(self).__name__) is self:
            del _open[type(self).__name__]
        for part in (*self.children, self.layout):
            _close(part)
        super().close()


def _close(widget: widgets.Widget) -> None:
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            _close(part)
    widget.close()


def close() -> None:
    """End what the panels of an earlier run of the notebook are still doing, and remove them."""
    for panel in list(_open.values()):
        panel.close()


class Controls:
    """Starts and stops one job at a time and shows its state; starting again ends the previous job.

    work(job), in a thread, does it. draw(job) shows what it has made so far; it is called a few times a second and at the end.
    The widgets to place: start, stop, bar, status, error. unit: what is counted, e.g. "step".
    """

    def __init__(self, label: str, work: Callable[[Job], object], draw: Callable[[Job], None], unit: str = "step"):
        self.unit, self.job = unit, None
        self._showing = threading.Lock()  # or a job that has just ended could show itself as the one that begins
        self._work, self._draw = work, draw
        self.start = widgets.Button(description=label, button_style="primary", tooltip=f"{label} (Enter)")
        self.stop = widgets.Button(description="Stop", disabled=True, tooltip="Stop; what is done so far is kept")
        self.bar = widgets.FloatProgress(0, min=0, max=1, layout=widgets.Layout(width="220px"))
        self.status, self.error = widgets.HTML(), widgets.HTML()
        self.status.add_class("rm-status")
        self.start.on_click(lambda button: self._press())
        self.stop.on_click(lambda button: self._ask_to_stop())

    def row(self) -> widgets.HBox:
        """The buttons, the bar and the status in one line."""
        return in_row([self.start, self.stop, self.bar, self.status], align_items="center")

    def begin(self) -> None:
        """Start the job; a running one is stopped first, and the new job's thread waits for it."""
        with self._showing:
            before = self.job
            if before is not None:
                before.stop.set()
            self.start.disabled, self.stop.disabled, self.stop.button_style = True, False, "danger"
            self.error.value = ""
            self.job = Job(self._work, self._refresh, after=before)
            self.job.start()

    def _press(self) -> None:
        if self.job is None or self.job.ended.is_set():  # the second press of a double click comes when the button is disabled
            self.begin()

    def cancel(self) -> None:
        """End the job, if there is one, and wait for it."""
        if self.job is not None:
            self.job.cancel()

    def _ask_to_stop(self) -> None:
        self.job.stop.set()
        self._show(self.job)

    def _refresh(self, job: Job) -> None:
        if job is not self.job:  # another one has been started since
            return
        try:
            self._draw(job)
        except Exception as error:
            job.fail(error)
        with self._showing:
            if job is self.job:
                self._show(job)

    def _show(self, job: Job) -> None:
        going = not job.ended.is_set()
        self.stop.disabled = not going or job.stop.is_set()
        self.stop.button_style = "" if self.stop.disabled else "danger"
        self.bar.value = job.done / job.total if job.total else 0
        self.bar.bar_style = {"failed": "danger", "stopped": "warning", "finished": "success"}.get(job.state, "info")
        parts = [job.state] if job.state != "running" else []
        if job.total:
            parts.append(f"{self.unit} {job.done:,} of {job.total:,}")
        parts.append(f"{tqdm.format_interval(job.elapsed)} elapsed")
        if job.remaining is not None:
            parts.append(f"{tqdm.format_interval(job.remaining)} left")
        self.status.value = " · ".join(parts)
        self.error.value = error_html(job.error, job.traceback) if job.error else ""
        self.start.disabled = going  # last: what stands there by then is how the job ended, and the next one may begin


def in_row(children: Sequence[widgets.Widget], **layout) -> widgets.HBox:
    """Widgets side by side, wrapped where there is no room: JupyterLab's own row would cut them off."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", **layout))


def choice(options: Sequence[str], description: str) -> widgets.ToggleButtons:
    """A choice that works by keyboard: JupyterLab takes arrow keys and letters from a native list, but not Enter from a button."""
    return widgets.ToggleButtons(
        options=list(options), description=description, style={"button_width": "auto", "description_width": "110px"}
    )


def ink(color: str) -> str:
    """A colour of the figures as CSS: lightened in a dark theme, where it could not be read as it is."""
    return f"color-mix(in srgb, {color}, white var(--rm-lighter, 0%))"


def error_html(error: BaseException, traceback: str) -> str:
    """An error as HTML: what happened, what to do about it, and where, folded away."""
    said = str(error) if isinstance(error, InputError) else traceback.strip().splitlines()[-1]
    return (
        f'<div class="rm-error" role="alert"><b>{escape(said)}</b> {escape(advice(error))}'
        f"<details><summary>where it happened</summary><pre>{escape(traceback)}</pre></details></div>"
    )


def advice(error: BaseException) -> str:
    """What to do about an error that does not say so itself."""
    if isinstance(error, InputError | FloatingPointError):
        return ""
    if out_of_memory(error):
        return "Choose a smaller length, group or model, or close other notebooks."
    if isinstance(error, OSError):
        return "Check the disk and the results folder, then start again."
    return "Change the last setting and start again; if it comes again, the lines below say where it happened."


def table_html(heads: Sequence[str], rows: Sequence[tuple[str, Sequence]]) -> str:
    """A table as HTML; rows: (class of the row, its cells, which are HTML already)."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    lines = (f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for kind, cells in rows)
    return f'<table class="rm-table"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
