"""The training panel: change the settings, press Train, watch it learn, and compare it with earlier runs."""

import dataclasses
from collections.abc import Callable, Mapping
from html import escape

import ipywidgets as widgets
import numpy as np

from ..reporting.style import look
from ..train import TrainConfig
from ..training.progress import Stopped
from .controls import Controls, Panel, choice, in_row, ink, table_html
from .curves import Run, learning_curves
from .job import Job

SHOWN_CURVES = 6  # how many earlier runs are in the picture, the newest ones


class TrainingPanel(Panel):
    """Train systems with settings of your own, beside the study's runs and never in their place.

    configs: the initial settings, {system: TrainConfig}. train(config, on_step, stop) trains and returns the record; runs() gives
    the records of all runs so far, oldest first.
    """

    def __init__(
        self,
        configs: Mapping[str, TrainConfig],
        train: Callable[..., dict],
        runs: Callable[[], list[dict]],
    ):
        self._configs, self._train, self._runs = dict(configs), train, runs
        self._past, self._curve, self._config = [], [], None
        first = next(iter(self._configs.values()))
        wide = {"style": {"description_width": "110px"}, "layout": widgets.Layout(width="420px")}
        self.system = choice(self._configs, "backbone")
        # steps on a scale that has the configured values: a numeric slider would move these to its own steps
        rates = {float(f"{10**power:.2g}") for power in np.arange(-6, -0.99, 0.05)}
        rates |= {config.learning_rate for config in self._configs.values()}
        self.learning_rate = widgets.SelectionSlider(
            options=[(f"{rate:g}", rate) for rate in sorted(rates)],
            value=first.learning_rate,
            description="learning rate",
            **wide,
        )
        self.group_size = widgets.IntSlider(
            first.group_size, min=2, max=max(16, first.group_size), description="group size", **wide
        )
        lengths = {*range(8 * (first.max_query_length // 8 + 1), 513, 8), first.max_length}
        self.max_length = widgets.SelectionSlider(
            options=sorted(lengths), value=first.max_length, description="length, tokens", **wide
        )
        self.steps = widgets.BoundedIntText(first.max_steps, min=0, max=1_000_000, description="steps (0: all)", **wide)
        self.seed = widgets.BoundedIntText(first.seed, min=0, max=1_000_000, description="seed", **wide)
        self.controls = Controls("Train", self._work, self._draw)
        self.picture, self.said, self.table = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.said.add_class("rm-note")
        self.system.observe(lambda change: self._start_from(change["new"]), "value")
        left, right = [self.learning_rate, self.steps], [self.group_size, self.seed, self.max_length]
        body = [
            self.system,
            in_row([widgets.VBox(left), widgets.VBox(right)]),
            self.controls.row(),
            self.controls.error,
            self.said,
            self.picture,
            self.table,
        ]
        super().__init__(body, [self.controls])
        self._past = runs()  # only now: the previous panel has just kept what it was training
        self._show_runs()

    def _start_from(self, system: str) -> None:
        config = self._configs[system]
        self.learning_rate.value, self.steps.value = config.learning_rate, config.max_steps

    def _work(self, job: Job) -> dict | None:
        config = self._config = dataclasses.replace(
            self._configs[self.system.value],
            learning_rate=self.learning_rate.value,
            group_size=self.group_size.value,
            max_length=self.max_length.value,
            max_steps=self.steps.value,
            seed=self.seed.value,
        )
        curve = self._curve = []

        def on_step(row: dict) -> None:
            curve.append(row)
            job.report(row["step"], row["of"])

        try:
            return self._train(config, on_step=on_step, stop=job.stop)
        except Stopped:
            return None

    def _draw(self, job: Job) -> None:
        if job.ended.is_set():
            self._past = self._runs()
            unbegun = "Stopped before the first step: nothing is kept." if job.state == "stopped" else ""
            self.said.value = unbegun if job.result is None else _sentence(job.result, trained=bool(self._curve))
            self._show_runs(job.result)
            return
        curve = list(self._curve)  # it is growing
        if not curve:
            self.said.value = "loading the backbone and the training groups …"
            return
        self.said.value = f"{curve[-1]['tokens'] / curve[-1]['seconds']:,.0f} tokens/s"
        self._show_curves(Run(self._config.system, curve, True), self._past, job.total, self._config.group_size)

    def _show_runs(self, now: dict | None = None) -> None:
        """Show the curves and the table of all runs; now: the record of the run that has just ended."""
        key = None if now is None else now["created"]
        run = None if now is None else Run(now["system"], now["result"]["curve"], True)
        group_size = self.group_size.value if now is None else now["config"]["group_size"]
        self._show_curves(run, [record for record in self._past if record["created"] != key], 0, group_size)
        self.table.value = runs_table(self._past, key)

    def _show_curves(self, now: Run | None, past: list[dict], steps: int, group_size: int) -> None:
        alike = [record for record in past if record["config"]["group_size"] == group_size]  # guessing is ln(group size)
        earlier = [Run(record["system"], record["result"]["curve"], False) for record in alike[-SHOWN_CURVES:]]
        self.picture.value = learning_curves([*earlier, *([now] if now else [])], steps, group_size)


def _sentence(record: dict, trained: bool) -> str:
    result = record["result"]
    if not trained and not result["partial"]:
        return f"These settings were trained before, at {escape(record['created'])}; change one to train again."
    if result["partial"]:
        return f"Stopped after step {result['steps']:,}: kept, and marked partial in its record."
    return f"Trained {result['steps']:,} steps in {record['timing']['seconds']:,.1f} s; kept with its settings."


def runs_table(records: list[dict], now: str | None = None) -> str:
    """The runs as an HTML table, newest first; loss and accuracy are means of a run's last tenth. now: `created` of the newest."""
    heads = ["run", "learning rate", "group", "length", "seed", "steps", "loss", "accuracy", "tokens/s", "time"]
    rows = []
    for record in reversed(records):
        config, result, timing = record["config"], record["result"], record["timing"]
        last = result["curve"][-max(1, len(result["curve"]) // 10) :]
        cells = [
            f'<i style="background:{ink(look(record["system"]).color)}"></i>{escape(record["system"])}',
            f"{config['learning_rate']:.2g}",
            *(escape(str(config[name])) for name in ("group_size", "max_length", "seed")),
            f"{result['steps']:,}" + (" (partial)" if result["partial"] else ""),
            f"{np.mean([row['loss'] for row in last]):.3f}" if last else "",
            f"{np.mean([row['accuracy'] for row in last]):.0%}" if last else "",
            f"{timing['tokens_per_s']:,.0f}",
            f"{timing['seconds'] / 60:.1f} min" if timing["seconds"] >= 60 else f"{timing['seconds']:.1f} s",
        ]
        rows.append(("rm-now" if record["created"] == now else "", cells))
    return table_html(heads, rows)
