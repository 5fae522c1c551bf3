"""The report's drawings, each in a wide and a narrow form: rounds, budgets, data owners."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from choral.audits.findings.schema import ArmResult, BudgetCurve, Point, Trace
from choral.audits.findings.text import cost, is_gap, is_percent, score
from choral.audits.report.charts.axes import Axis
from choral.audits.report.charts.svg import LABEL_GAP, REFERENCE, Chart, shortened, ticks

MOST_POINTS = 200
NAMED_OWNERS = 16
WIDE, NARROW = 864.0, 360.0
ROUNDS_HEIGHT = 430.0  # of a wide drawing over rounds
Lines = Sequence[tuple[str, Sequence[Point], int]]  # name, curve, colour


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture in two sizes; the page shows whichever fits."""

    wide: Markup
    narrow: Markup


def rounds_figure(
    arms: Sequence[ArmResult],
    metric: str,
    colours: Mapping[str, int],
    references: Mapping[str, float] | None = None,
    identity: str = "rounds",
) -> Figure:
    """A metric over rounds: a line for the mean, a band from the least to the greatest seed; references as levels."""
    found = [(arm.name, arm.measure(metric), colours[arm.name]) for arm in arms]
    said = "; ".join(f"{name} ends at {score(measure.estimate.mean, metric)}" for name, measure, _ in found)
    levels = "".join(f"; {name}: {score(level, metric)}" for name, level in (references or {}).items())
    said = f"One line per configuration, from round 0 (the initial model): {said}{levels}."
    lines = [(name, measure.curve, colour) for name, measure, colour in found]
    return _both(identity, f"{metric.capitalize()} over rounds", said, lines, metric, references or {})


def trace_figure(trace: Trace) -> Figure:
    """One run's metric over rounds."""
    curve = tuple(Point(round=n, mean=v, low=v, high=v) for n, v in enumerate(trace.values))
    said = f"From {score(trace.values[0], trace.name)} to {score(trace.values[-1], trace.name)}."
    return _both("rounds", f"{trace.name.capitalize()} over rounds", said, [(trace.name, curve, 2)], trace.name, {})


def _both(identity: str, title: str, said: str, lines: Lines, metric: str, references: Mapping[str, float]) -> Figure:
    return Figure(
        wide=_rounds(lines, metric, references, wide=True).render(f"{identity}-wide", title, said),
        narrow=_rounds(lines, metric, references, wide=False).render(f"{identity}-narrow", title, said),
    )


def _rounds(lines: Lines, metric: str, references: Mapping[str, float], *, wide: bool) -> Chart:
    values = [edge for _, curve, _ in lines for point in curve for edge in (point.low, point.high)]
    axis = Axis.over(metric, [*values, *references.values()])
    last = max(curve[-1].round for _, curve, _ in lines)
    chart = _frame(wide, len(lines) + len(references), (0, max(last, 1)), axis.span)
    chart.grid(axis.marks, axis.show, axis.title)
    whole = [value for value in ticks(0, max(last, 1), 8 if wide else 5) if value == round(value) and value <= last]
    chart.steps(whole, lambda value: f"{value:.0f}", "round")
    for level in references.values():
        y = chart.up(axis.at(level))
        chart.rule(chart.left, y, chart.width - chart.right, y, f"level arm-{REFERENCE}")
    for _, curve, colour in lines:
        thinned = _thin(curve)
        lows, highs = ([(p.round, axis.at(getattr(p, edge))) for p in thinned] for edge in ("low", "high"))
        chart.band(lows, highs, colour)
    for _, curve, colour in lines:
        chart.line([(p.round, axis.at(p.mean)) for p in _thin(curve)], colour)
    labels = [(name, curve[-1].mean, colour) for name, curve, colour in lines]
    labels += [(name, level, REFERENCE) for name, level in references.items()]
    _name(chart, labels, axis, wide, levels=len(references))
    return chart


def _thin(curve: Sequence[Point]) -> list[Point]:
    """At most about MOST_POINTS of a long history, ends kept: no more can be seen."""
    step = max(1, math.ceil(len(curve) / MOST_POINTS))
    return [point for index, point in enumerate(curve) if index % step == 0 or index == len(curve) - 1]


def budget_figure(
    curves: Sequence[BudgetCurve], references: Sequence[ArmResult], metric: str, colours: Mapping[str, int]
) -> Figure:
    """Budget against the metric: points with 95 % intervals, and arms without privacy as level lines."""
    said = "; ".join(
        f"{curve.arm}: " + ", ".join(f"{score(p.metric.mean, metric)} at ε = {p.asked:g}" for p in curve.points)
        for curve in curves
    )
    levels = "; ".join(f"without privacy, {arm.name}: {score(arm.metric.mean, metric)}" for arm in references)
    title = f"Privacy budget against {metric}"
    said = f"{said}. {levels}." if levels else f"{said}."
    return Figure(
        wide=_budgets(curves, references, metric, colours, wide=True).render("budget-wide", title, said),
        narrow=_budgets(curves, references, metric, colours, wide=False).render("budget-narrow", title, said),
    )


def _budgets(
    curves: Sequence[BudgetCurve],
    references: Sequence[ArmResult],
    metric: str,
    colours: Mapping[str, int],
    *,
    wide: bool,
) -> Chart:
    points = [point for curve in curves for point in curve.points]
    edges = [edge for p in points for edge in (p.metric.low, p.metric.high) if edge is not None]
    values = [p.metric.mean for p in points] + [arm.metric.mean for arm in references]
    if is_percent(metric):  # an interval may leave the possible range; the drawing does not
        edges = [min(max(edge, 0.0), 1.0) for edge in edges]
    axis = Axis.over(metric, values if is_gap(metric) else values + edges, from_zero=False)
    asked = sorted({point.asked for point in points})
    pad = 0.15 * max(math.log2(asked[-1] / asked[0]), 1.0)
    x = (math.log2(asked[0]) - pad, math.log2(asked[-1]) + pad)
    chart = _frame(wide, len(curves) + len(references), x, axis.span)
    chart.grid(axis.marks, axis.show, axis.title)
    chart.steps(
        [math.log2(epsilon) for epsilon in asked],
        lambda value: f"{2**value:.3g}",
        f"ε asked for, per {curves[0].unit} (log scale)",
    )
    for arm in references:
        colour = colours[arm.name]
        level = chart.up(axis.at(arm.metric.mean))
        chart.rule(chart.left, level, chart.width - chart.right, level, f"level arm-{colour}")
    for index, curve in enumerate(curves):
        colour, shift = colours[curve.arm], (index - (len(curves) - 1) / 2) * 8
        chart.line([(math.log2(p.asked) + _data(chart, shift), axis.at(p.metric.mean)) for p in curve.points], colour)
        for point in curve.points:
            across, middle = chart.across(math.log2(point.asked)) + shift, chart.up(axis.at(point.metric.mean))
            if point.metric.low is not None and point.metric.high is not None:
                low, high = max(axis.at(point.metric.low), axis.span[0]), min(axis.at(point.metric.high), axis.span[1])
                chart.rule(across, chart.up(low), across, chart.up(high), f"whisker arm-{colour}")
            chart.dot(across, middle, colour)
    labels = [(curve.arm, curve.points[-1].metric.mean, colours[curve.arm]) for curve in curves]
    labels += [(arm.name, arm.metric.mean, colours[arm.name]) for arm in references]
    _name(chart, labels, axis, wide, levels=len(references))
    return chart


def _data(chart: Chart, pixels: float) -> float:
    """A horizontal distance in pixels, in data units."""
    return pixels / (chart.width - chart.left - chart.right) * (chart.x[1] - chart.x[0])


def owners_figure(arms: Sequence[ArmResult], colours: Mapping[str, int]) -> Figure:
    """Each data owner's epsilon against what was asked for."""
    private = [arm for arm in arms if arm.claim is not None]
    said = "; ".join(
        f"{arm.name}: {len(arm.holders)} data owner{'s' if len(arm.holders) > 1 else ''}, epsilon from"
        f" {cost(arm.holders[-1].epsilon)} to {cost(arm.holders[0].epsilon)}, {arm.claim.asked:g} asked for, per"
        f" {arm.claim.unit}"
        for arm in private
        if arm.claim
    )
    return Figure(
        wide=_owners(private, colours, wide=True).render("holders-wide", "Epsilon of each data owner", said + "."),
        narrow=_owners(private, colours, wide=False).render("holders-narrow", "Epsilon of each data owner", said + "."),
    )


def _owners(arms: Sequence[ArmResult], colours: Mapping[str, int], *, wide: bool) -> Chart:
    tall = {arm.name: 22.0 if len(arm.holders) <= NAMED_OWNERS else max(1.0, 320 / len(arm.holders)) for arm in arms}
    height = sum(40 + tall[arm.name] * len(arm.holders) for arm in arms) + 56
    most = max(max(arm.claim.asked, arm.claim.epsilon) for arm in arms if arm.claim)
    marks = ticks(0, most, 8 if wide else 4)
    left = 150.0 if wide else 96.0
    chart = Chart(
        width=WIDE if wide else NARROW, height=height, left=left, right=64, top=8, bottom=50, x=(0, marks[-1])
    )
    y = chart.top
    for arm in arms:
        if arm.claim is None:
            continue
        step, colour, limit = tall[arm.name], colours[arm.name], chart.across(arm.claim.asked)
        chart.text(0, y + 18, arm.name, f"name arm-{colour}")
        chart.text(
            limit,
            y + 18,
            f"asked for: {arm.claim.asked:g} per {arm.claim.unit}",
            "tick",
            "end" if arm.claim.asked > most / 2 else "start",
        )
        y += 30
        for holder in arm.holders:
            middle = y + step / 2
            chart.rule(chart.left, middle, chart.across(holder.epsilon), middle, f"stem arm-{colour}")
            chart.dot(chart.across(holder.epsilon), middle, colour, 5 if step > 8 else 1.5)
            if step > 8:
                chart.text(chart.left - 10, middle + 4, shortened(holder.name, 20 if wide else 11), "tick", "end")
                past = max(chart.across(holder.epsilon), limit)
                chart.text(past + 10, middle + 4, cost(holder.epsilon), "value")
            y += step
        chart.rule(limit, y - step * len(arm.holders) - 4, limit, y + 2, "limit")
        y += 10
    chart.steps(marks, lambda value: f"{value:g}", "ε spent")
    return chart


def _frame(wide: bool, labels: int, x: tuple[float, float], y: tuple[float, float]) -> Chart:
    if wide:
        return Chart(width=WIDE, height=ROUNDS_HEIGHT, left=52, right=240, top=34, bottom=50, x=x, y=y)
    rows = LABEL_GAP * ((labels + 1) // 2)
    return Chart(width=NARROW, height=320 + rows, left=42, right=10, top=40 + rows, bottom=50, x=x, y=y)


def _name(chart: Chart, labels: Sequence[tuple[str, float, int]], axis: Axis, wide: bool, levels: int = 0) -> None:
    if wide:
        chart.end_labels(
            [(f"{shortened(name, 21)}  {score(y, axis.metric)}", axis.at(y), colour) for name, y, colour in labels]
        )
    else:
        chart.key([(name, colour) for name, _, colour in labels], 12, levels)
