"""The live learning curves: a small SVG, written as text, because matplotlib's figures belong to the main thread."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..reporting.style import look
from .controls import ink

WIDTH, HEIGHT, TOP, BOTTOM, LEFT, GAP, RIGHT = 900, 250, 26, 34, 40, 86, 40
MOST_POINTS = 240  # of one line; more would not be visible


class Run(NamedTuple):
    """One training run in the picture: its system, its curve (rows of `train`), whether it is the current one."""

    system: str
    curve: Sequence[dict]
    now: bool


def learning_curves(runs: Sequence[Run], steps: int, group_size: int) -> str:
    """Draw loss and accuracy against steps as SVG; the current run is thick, earlier ones thin, guessing is dotted.

    steps: where the axis ends, at least. Lines are smoothed over a tenth of the run; the current run's raw values are faint.
    """
    runs = [run for run in runs if len(run.curve)]
    steps = max([steps, *(run.curve[-1]["step"] for run in runs)])
    guessing = math.log(group_size)
    top = max([1.25 * guessing, *(1.05 * _smooth(run.curve, "loss").max() for run in runs)])
    width = (WIDTH - LEFT - GAP - RIGHT) / 2
    loss = _Axes(LEFT, width, steps, min(top, 4 * guessing), "LCE loss (nats)")
    accuracy = _Axes(LEFT + width + GAP, width, steps, 1.0, "accuracy (relevant document on top of its group)")
    parts = [loss.frame(), accuracy.frame()]
    parts += [loss.guess(guessing, f"guessing: ln {group_size}"), accuracy.guess(1 / group_size, f"guessing: 1/{group_size}")]
    for run in sorted(runs, key=lambda run: run.now):
        parts += [loss.line(run, "loss"), accuracy.line(run, "accuracy")]
    now = next((run for run in runs if run.now), None)
    said = f"{now.system} at step {now.curve[-1]['step']}" if now else f"{len(runs)} earlier runs"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="learning curves: {escape(said)}" '
        'style="width:100%;max-width:900px;height:auto;font:12px var(--jp-ui-font-family, sans-serif)" '
        f'fill="currentColor">{"".join(parts)}</svg>'
    )


class _Axes:
    """One of the two pictures: where it is, and what its axes span."""

    def __init__(self, left: float, width: float, steps: int, top: float, title: str):
        self.left, self.width, self.steps, self.top, self.title = left, width, max(1, steps), top, title

    def at(self, step: float, value: float) -> tuple[float, float]:
        height = HEIGHT - TOP - BOTTOM
        return self.left + self.width * step / self.steps, TOP + height * (1 - min(max(value, 0), self.top) / self.top)

    def frame(self) -> str:
        parts = [f'<text x="{self.left - 28}" y="14" font-weight="600">{escape(self.title)}</text>']
        for value in _ticks(self.top, 4):
            x, y = self.at(0, value)
            parts.append(f'<path d="M{x:.1f} {y:.1f}h{self.width:.1f}" stroke="currentColor" opacity=".13"/>')
            parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" opacity=".75">{value:g}</text>')
        for step in filter(float.is_integer, _ticks(self.steps, 5)):
            x, y = self.at(step, 0)
            parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle" opacity=".75">{step:,.0f}</text>')
        x, y = self.at(self.steps, 0)
        return "".join(parts) + f'<text x="{x:.1f}" y="{y + 31:.1f}" text-anchor="end" opacity=".75">training steps</text>'

    def guess(self, value: float, words: str) -> str:
        x, y = self.at(0, value)
        line = f'<path d="M{x:.1f} {y:.1f}h{self.width:.1f}" stroke="currentColor" stroke-dasharray="2 3" opacity=".7"/>'
        words = f'<text x="{x + self.width:.1f}" y="{y - 4:.1f}" text-anchor="end" opacity=".75" font-size="11">{escape(words)}</text>'
        return line + words

    def line(self, run: Run, name: str) -> str:
        color, values = ink(look(run.system).color), _smooth(run.curve, name)
        steps = [row["step"] for row in run.curve]
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int))
        parts = []
        if run.now:
            raw = " ".join("{:.1f},{:.1f}".format(*self.at(steps[i], run.curve[i][name])) for i in kept)
            parts.append(f'<polyline points="{raw}" fill="none" stroke="{color}" stroke-width="1" opacity=".25"/>')
        points = " ".join("{:.1f},{:.1f}".format(*self.at(steps[i], values[i])) for i in kept)
        stroke = 2.6 if run.now else 1.3
        look_of_line = f'stroke-width="{stroke}" stroke-dasharray="{_dashes(run.system, stroke)}"' + ("" if run.now else ' opacity=".55"')
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-linejoin="round" {look_of_line}/>')
        if run.now:
            x, y = self.at(steps[-1], values[-1])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" fill="{color}" font-weight="700">{values[-1]:.2f}</text>')
        return "".join(parts)


def _dashes(system: str, stroke: float) -> str:
    """The line style of a system's figures as SVG has it, for lines `stroke` wide."""
    line = look(system).line
    dashes = {"-": (), "--": (3.7, 1.6), "-.": (6.4, 1.6, 1, 1.6), ":": (1, 1.65)}[line] if isinstance(line, str) else line[1]
    return " ".join(f"{stroke * part:.1f}" for part in dashes) or "none"


def _smooth(curve: Sequence[dict], name: str) -> np.ndarray:
    return pd.Series([row[name] for row in curve]).ewm(span=max(1, len(curve) / 10)).mean().to_numpy()


def _ticks(top: float, count: int) -> list[float]:
    """Round numbers from 0 to `top`, about `count` of them."""
    size = 10 ** math.floor(math.log10(top / count))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if top / (size * factor) <= count)
    return [float(place * step) for place in range(int(top / step + 1e-9) + 1)]
