"""The question of the slides as one picture: who wins over parties and record sizes, with the data sets as dots."""

from __future__ import annotations

import math
from itertools import groupby

from choral.audits.costs.costs import Costs
from choral.audits.costs.winners import TASK_SIZES, WinnerMap
from choral.audits.report.charts.figures import NARROW, WIDE, Figure
from choral.audits.report.charts.svg import Chart

QUESTION = "Specialised hardware, or massive distribution?"
LINE, LETTER = 16.0, 8.0  # of a name in the drawing, in pixels
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def winner_sentence(found: WinnerMap) -> str:
    """What the picture says, in one sentence, for its caption and its alternative text."""
    of = "money" if found.kind == "usd" else "time"
    privacy = "without differential privacy" if found.epsilon is None else f"at ε = {found.epsilon:g} for each record"
    pace = ", with one round a day" if found.daily else ""
    if found.rounds is None or found.cloud_rounds is None:
        other, only = (found.federated, found.cloud) if found.rounds is None else (found.cloud, found.federated)
        return (
            f"By {of}, {privacy}{pace}, {other} never reached the level in all seeds, {only} did and wins everywhere."
        )
    cells = sum(len(row) for row in found.distribution)
    loose = sum(not firm for row in found.firm for firm in row)
    said = (
        f"By {of}, {privacy}{pace}, distribution ({found.federated}, {found.rounds:.3g} rounds) wins"
        f" {100 * found.share:.0f} % of the cells against {found.cloud} ({found.cloud_rounds:.3g} rounds), and"
    )
    if not loose:
        return f"{said} none changes its winner when one price is doubled or halved."
    most = ", ".join(key.replace("_", " ") for key in list(found.flips)[:3])
    return (
        f"{said} {100 * loose / cells:.0f} % change their winner when one price is doubled or halved, most by {most}."
    )


def winners(costs: Costs | None) -> list[tuple[str, Figure]]:
    """(what it says, drawing) of every map of who wins."""
    maps = costs.maps if costs is not None else ()
    return [(winner_sentence(found), winner_figure(found, f"winner-{place}")) for place, found in enumerate(maps)]


def winner_figure(found: WinnerMap, identity: str) -> Figure:
    title, said = QUESTION, winner_sentence(found)
    return Figure(
        wide=_map(found, wide=True).render(f"{identity}-wide", title, said),
        narrow=_map(found, wide=False).render(f"{identity}-narrow", title, said),
    )


def _map(found: WinnerMap, *, wide: bool) -> Chart:
    across, up = [math.log10(n) for n in found.parties], [math.log10(ratio) for ratio in found.ratios]
    half_x, half_y = (across[1] - across[0]) / 2, (up[1] - up[0]) / 2
    x, y = (across[0] - half_x, across[-1] + half_x), (up[0] - half_y, up[-1] + half_y)
    if wide:
        chart = Chart(width=WIDE, height=430, left=62, right=200, top=34, bottom=50, x=x, y=y)
    else:
        chart = Chart(width=NARROW, height=380, left=52, right=10, top=94, bottom=50, x=x, y=y)
    for row, place in enumerate(up):
        shades = [_shade(*cell) for cell in zip(found.distribution[row], found.firm[row], strict=True)]
        for shade, run in groupby(enumerate(shades), lambda each: each[1]):
            columns = [column for column, _ in run]
            if shade != "0":
                _cells(chart, (across[columns[0]] - half_x, across[columns[-1]] + half_x), place, half_y, shade)
    chart.grid(range(math.ceil(y[0]), math.floor(y[1]) + 1, 2), _decade, "bytes of a record over those of the model")
    chart.steps(range(1, 7, 1 if wide else 2), _decade, "parties")
    _data_sets(chart)
    _key(chart, wide)
    return chart


def _data_sets(chart: Chart) -> None:
    """A dot for each; those that all but coincide share a name's line, and names that would touch are moved down."""
    names: list[tuple[float, float, str]] = []
    for data in sorted(TASK_SIZES, key=lambda each: (each.parties, -each.ratio)):
        left, at = chart.across(math.log10(data.parties)), chart.up(math.log10(data.ratio))
        chart.dot(left, at, 0, 4)
        if names and names[-1][0] == left and at - names[-1][1] < LINE / 2:
            names[-1] = (left, names[-1][1], f"{names[-1][2]}, {data.name}")
        else:
            names.append((left, at, data.name))
    placed: list[tuple[float, float, str]] = []
    for left, at, name in sorted(names, key=lambda each: each[1]):
        for x, y, other in placed:
            if abs(y - at) < LINE and x < left + LETTER * len(name) and left < x + LETTER * len(other):
                at = y + LINE
        placed.append((left, at, name))
        chart.text(left + 8, at + 4, name, "name arm-0")


def _shade(distribution: bool, firm: bool) -> str:
    """Opacity of a cell."""
    return {(True, True): "1", (True, False): ".45", (False, False): ".15", (False, True): "0"}[distribution, firm]


def _cells(chart: Chart, x: tuple[float, float], y: float, half_y: float, opacity: str) -> None:
    """Neighbours in a row that look alike, as one."""
    left, right, top = chart.across(x[0]), chart.across(x[1]), chart.up(y + half_y)
    chart.add(
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left + 0.3:.1f}"'
        f' height="{chart.up(y - half_y) - top + 0.3:.1f}" class="cell arm-1" fill-opacity="{opacity}"/>'
    )


def _key(chart: Chart, wide: bool) -> None:
    words = (("1", "distribution"), (".45", "distribution, by a price"), (".15", "cloud, by a price"), ("0", "cloud"))
    for place, (opacity, name) in enumerate(words):
        left = chart.width - chart.right + 14 if wide else chart.left + (place % 2) * (chart.width - chart.left) / 2
        top = chart.top + 22 * place if wide else 12 + 22 * (place // 2)
        chart.add(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="14" height="14" class="cell arm-1"'
            f' fill-opacity="{opacity}"/><rect x="{left:.1f}" y="{top:.1f}" width="14" height="14" class="frame"/>'
        )
        chart.text(left + 20, top + 11, name, "tick")


def _decade(value: float) -> str:
    return "1" if value == 0 else f"10{str(round(value)).translate(_RAISED)}" if value != 1 else "10"
