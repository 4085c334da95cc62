"""The charts of a comparison, as SVG that takes its colors and its font from the page."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detr.reporting.pages import HIGHER, INK, LOWER, MUTED, SHADE, WIDTHS, blank_figure, cut, drawn
from tools.comparison.cost import Cost
from tools.comparison.judge import Judgement, Verdict, spread
from tools.comparison.runs import Group

SIGNS: dict[Verdict, str] = {
    "baseline": "◆",
    "higher": "▲",
    "lower": "▼",
    "within the spread": "≈",
    "no conclusion": "?",
}
_COLORS: dict[Verdict, str] = {"higher": HIGHER, "lower": LOWER}
_DASHES = (0, (4, 3))
_DOT: dict[str, Any] = {"markersize": 9, "markeredgewidth": 0}


def ap_chart(groups: Sequence[Group], judgements: Sequence[Judgement], baseline: Group) -> dict[str, str]:
    """AP of each run, and its group's mean on the range that would not differ from the baseline."""
    center = statistics.fmean(baseline.values("AP"))

    def draw(width: int) -> Figure:
        beside = width > 2 * WIDTHS["narrow"]  # texts, instead of above the dots
        figure = blank_figure(width, (36 if beside else 56) * len(groups) + 44)
        axes = figure.subplots()
        axes.set_ylim(len(groups), 0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("AP")
        above, below = (0.1, 0.9) if beside else (0.45, 0.95)
        middle = (above + below) / 2
        for row, (group, judgement) in enumerate(zip(groups, judgements, strict=True)):
            values, color = group.values("AP"), _COLORS.get(judgement.verdict, INK)
            if judgement.low is not None and judgement.high is not None:
                half = (judgement.high - judgement.low) / 2
                axes.barh(row + middle, 2 * half, height=below - above, left=center - half, color=SHADE)
            axes.plot([center] * 2, [row + above, row + below], color=MUTED, linewidth=1, linestyle=_DASHES)
            axes.plot(values, [row + middle] * len(values), "o", color=color, alpha=0.45, **_DOT)
            mean, deviation = statistics.fmean(values), spread(values)[1]
            axes.plot([mean, mean], [row + above, row + below], color=color, linewidth=3)
            text = f"{mean:.3f}{'' if deviation is None else f' ± {deviation:.3f}'} {SIGNS[judgement.verdict]}"
            place: dict[str, Any] = {
                "y": row + (middle if beside else 0.27),
                "va": "center",
                "transform": axes.get_yaxis_transform(),
            }
            label = cut(f"{row + 1}  {group.label}", 40 if beside else 23)
            axes.text(x=-0.02 if beside else 0.0, s=label, ha="right" if beside else "left", weight="bold", **place)
            axes.text(x=1.02 if beside else 1.0, s=text, ha="left" if beside else "right", **place)
        axes.margins(x=0.05)
        return figure

    return drawn(draw, "ap")


def curves(groups: Sequence[Group], judgements: Sequence[Judgement], baseline: Group) -> tuple[str, dict[str, str]]:
    """What the curves show, and a panel for each group: AP, or training loss where some run was evaluated only once."""
    runs = [run for group in groups for run in group.runs]
    name, kind = ("AP", "val") if all(len(run.by_step("AP", "val")) > 1 for run in runs) else ("loss", "train")

    def line(axes: Axes, group: Group, color: str, style: tuple, band: bool) -> None:
        series = [run.by_step(name, kind) for run in group.runs]
        steps = sorted(set.intersection(*map(set, series)))
        values = [[run[step] for run in series] for step in steps]
        axes.plot(steps, [statistics.fmean(found) for found in values], color=color, linewidth=1.8, linestyle=style)
        if band and len(series) > 1:
            low, high = ([function(found) for found in values] for function in (min, max))
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)

    def draw(width: int) -> Figure:
        columns = max(width // 300, 1)
        rows = -(-len(groups) // columns)
        figure = blank_figure(width, 170 * rows + 20)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes in panels:
            axes.set_visible(False)
        for number, (axes, group, judgement) in enumerate(zip(panels, groups, judgements, strict=False), start=1):
            axes.set_visible(True)
            axes.tick_params(labelbottom=True, labelleft=True)
            axes.set_title(cut(f"{number}  {group.label}", 38), weight="bold")
            if group is not baseline:
                line(axes, baseline, MUTED, _DASHES, band=False)
            line(axes, group, _COLORS.get(judgement.verdict, INK), (0, ()), band=True)
        return figure

    return "AP" if name == "AP" else "training loss", drawn(draw, "curves")


def cost_chart(groups: Sequence[Group], judgements: Sequence[Judgement], costs: Sequence[Cost]) -> dict[str, str]:
    """Mean AP and its deviation against what an image costs; points carry the numbers of the groups."""
    panels = {
        "GFLOPs": [cost.flops / 1e9 for cost in costs],
        "latency, ms": [cost.milliseconds for cost in costs],
        "parameters, million": [cost.parameters / 1e6 for cost in costs],
    }

    def draw(width: int) -> Figure:
        columns = max(width // 300, 1)
        rows = -(-len(panels) // columns)
        figure = blank_figure(width, 290 * rows)
        places = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (name, values) in zip(places, panels.items(), strict=True):
            axes.set_xlabel(name)
            axes.set_ylabel("AP")
            for group, judgement, value in zip(groups, judgements, values, strict=True):
                mean, deviation = spread(group.values("AP"))
                color = _COLORS.get(judgement.verdict, INK)
                axes.errorbar(value, mean, yerr=deviation, color=color, alpha=0.4, linewidth=1.5)
                axes.plot(value, mean, "o", color=color, **_DOT)
            axes.margins(0.12)
            axes.locator_params(axis="x", nbins=4)
        figure.draw_without_rendering()  # which settles where things are
        for axes, values in zip(figure.axes, panels.values(), strict=True):
            means = [statistics.fmean(group.values("AP")) for group in groups]
            _number_points(axes, np.column_stack((values, means)))
        return figure

    return drawn(draw, "cost")


def _number_points(axes: Axes, points: np.ndarray) -> None:
    """1, 2, ... beside the points, each where it is farthest from all other points and numbers."""
    angles = np.arange(0, 2 * np.pi, np.pi / 8)
    around = 14 * np.column_stack((np.cos(angles), np.sin(angles)))
    taken = axes.transData.transform(points)
    for number, (point, place) in enumerate(zip(points, taken.copy(), strict=True), start=1):
        distances = np.linalg.norm((place + around)[:, None] - taken, axis=-1).min(axis=1)
        offset = around[distances.argmax()]
        taken = np.vstack((taken, place + offset))
        axes.annotate(
            str(number), point, offset, textcoords="offset points", ha="center", va="center_baseline", color=INK
        )
