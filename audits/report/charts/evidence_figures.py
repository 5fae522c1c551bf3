"""Drawings of attacks: the ROC on log axes, and pictures of what inversion rebuilt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from choral.audits.findings.evidence import InversionAudit, RocPoint, ScoreAudit
from choral.audits.report.charts.figures import NARROW, WIDE, Figure
from choral.audits.report.charts.svg import Chart

_GREYS = 16
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def roc_figure(attack: ScoreAudit, identity: str) -> Figure:
    """True against false positives, both on log axes, where the ends that matter can be seen."""
    roc = attack.roc
    said = f"Area under the curve {roc.auc.value:.3f}, {roc.auc.low:.3f} to {roc.auc.high:.3f}"
    for point in roc.at:
        rate = point.true_positive_rate
        said += f"; {rate.value:.3f} true positives ({rate.low:.3f} to {rate.high:.3f}) at {point.wanted:g} false ones"
    title = f"ROC of {attack.attack}"
    return Figure(
        wide=_roc(attack, wide=True).render(f"{identity}-wide", title, f"{said}."),
        narrow=_roc(attack, wide=False).render(f"{identity}-narrow", title, f"{said}."),
    )


def _roc(attack: ScoreAudit, *, wide: bool) -> Chart:
    roc = attack.roc
    low = min(-1.0, -math.log10(max(roc.non_members, roc.members, 10)))
    if wide:
        chart = Chart(width=WIDE, height=440, left=64, right=240, top=34, bottom=50, x=(low, 0.0), y=(low, 0.0))
    else:
        chart = Chart(width=NARROW, height=340, left=48, right=16, top=34, bottom=50, x=(low, 0.0), y=(low, 0.0))
    marks = [float(mark) for mark in range(math.ceil(low), 1)]
    chart.grid(marks, _rate, "true positives (log scale)")
    chart.steps(marks, _rate, "false positives (log scale)")
    corners = [(low, low), (0.0, 0.0)]
    drawn = " ".join(f"{chart.across(x):.1f},{chart.up(y):.1f}" for x, y in corners)
    chart.add(f'<polyline points="{drawn}" class="level arm-0" fill="none"/>')
    chart.line(_stairs(roc.points, low), 2)
    for point in roc.at:
        rate = point.true_positive_rate
        if not point.resolved or math.log10(point.wanted) < low:
            continue
        across = chart.across(math.log10(point.wanted))
        bottom, top = (chart.up(max(low, _log(value, low))) for value in (rate.low, rate.high))
        chart.rule(across, bottom, across, top, "whisker arm-2")
        chart.dot(across, chart.up(_log(rate.value, low)), 2)
    if wide:
        chart.end_labels([("attack", 0.0, 2), ("guessing", -0.12 * abs(low), 0)])
    return chart


def _stairs(points: Sequence[RocPoint], low: float) -> list[tuple[float, float]]:
    return [(_log(point.false_positive_rate, low), _log(point.true_positive_rate, low)) for point in points]


def _log(value: float, low: float) -> float:
    return max(math.log10(value), low) if value > 0 else low


def _rate(value: float) -> str:
    return "1" if value == 0 else f"10{str(round(value)).translate(_RAISED)}"


def inversion_figure(result: InversionAudit) -> Figure:
    """The true image, and beside it what was rebuilt from each kind of message."""
    said = "; ".join(
        f"from the {view.name}: {view.psnr:.1f} dB, {'recognisable' if view.recovered else 'not recovered'}"
        for view in result.views
    )
    title = "What gradient inversion rebuilds"
    return Figure(
        wide=_pictures(result, across=len(result.views) + 1, side=140.0).render("inversion-wide", title, f"{said}."),
        narrow=_pictures(result, across=2, side=150.0).render("inversion-narrow", title, f"{said}."),
    )


def _pictures(result: InversionAudit, *, across: int, side: float) -> Chart:
    shown = [("true image", result.truth, "")]
    shown += [(view.name, view.image, f"{view.psnr:.1f} dB") for view in result.views]
    gap, under = 24.0, 50.0
    rows = -(-len(shown) // across)
    tall = side * result.shape[0] / result.shape[1]
    chart = Chart(
        width=across * (side + gap) - gap, height=rows * (tall + under), left=0, right=0, top=0, bottom=0, x=(0, 1)
    )
    for index, (name, image, note) in enumerate(shown):
        x, y = (index % across) * (side + gap), (index // across) * (tall + under)
        _picture(chart, image, result.shape, x, y, side)
        chart.text(x, y + tall + 18, name, "axis")
        chart.text(x, y + tall + 35, note, "tick")
    return chart


def _picture(chart: Chart, image: Sequence[float], shape: tuple[int, int], x: float, y: float, side: float) -> None:
    """A path per shade of grey, each pixel a unit square: a few bytes per pixel, and no image format."""
    height, width = shape
    unit = side / width
    squares: dict[int, list[str]] = {}
    for place, value in enumerate(image):
        shade = min(_GREYS - 1, max(0, round(value * (_GREYS - 1))))
        squares.setdefault(shade, []).append(f"M{place % width} {place // width}h1v1h-1z")
    chart.add(f'<g transform="translate({x:.1f} {y:.1f}) scale({unit:.4f})" shape-rendering="crispEdges">')
    chart.add(f'<rect width="{width}" height="{height}" fill="#000"/>')
    for shade, parts in sorted(squares.items()):
        level = round(255 * shade / (_GREYS - 1))
        if shade:
            chart.add(f'<path d="{"".join(parts)}" fill="#{level:02x}{level:02x}{level:02x}"/>')
    chart.add("</g>")
