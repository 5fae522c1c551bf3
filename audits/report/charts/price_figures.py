"""The drawings of costs: where distribution is cheaper than an accelerator, and the metric per byte and per second."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from choral.audits.costs.bills import DAY
from choral.audits.costs.costs import Costs
from choral.audits.costs.crossover import CrossoverLine, Workload
from choral.audits.costs.job_bills import JobBill
from choral.audits.findings.schema import ArmResult
from choral.audits.findings.text import amount, duration, money, score
from choral.audits.report.charts.axes import Axis
from choral.audits.report.charts.figures import NARROW, WIDE, Figure
from choral.audits.report.charts.svg import LABEL_GAP, Chart, log_ticks, shortened

QUESTION = "Acceleration against large-scale distribution"
LEAST, MOST = 1.0, 1e9  # examples per party that are drawn; a line below runs along the edge
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def job_sentence(job: JobBill) -> str:
    """The reader's own job, and who wins it."""
    size = (
        f"{job.parties:,.0f} parties of {job.records:,.0f} records of {amount(job.record_bytes)}, a model of"
        f" {job.parameters:,.0f} parameters, {100 * job.taking_part:.3g} % of the parties in a round"
    )
    pace = ""
    if job.pause:
        pace = ", one round a day" if job.pause == DAY else f", a round every {duration(job.pause)}"
    cloud, apart = job.cloud, job.federation
    cheaper = f"distribution ({apart.arm})" if apart.usd < cloud.usd else f"the cloud ({cloud.arm})"
    faster = f"distribution ({apart.arm})" if apart.seconds < cloud.seconds else f"the cloud ({cloud.arm})"
    return (
        f"{size}{pace}. Cheaper is {cheaper}, {money(min(apart.usd, cloud.usd))} against"
        f" {money(max(apart.usd, cloud.usd))}; faster is {faster},"
        f" {duration(min(apart.seconds, cloud.seconds))} against {duration(max(apart.seconds, cloud.seconds))}."
    )


def crossovers(costs: Costs | None) -> list[tuple[str, Figure]]:
    """The drawings of money and of time, where there is a cloud and a federation to set against each other."""
    if costs is None or costs.workload is None:
        return []
    kinds = (("cheaper", "usd"), ("faster", "seconds"))
    return [(word, crossover_figure(costs.workload, costs.crossover, kind)) for word, kind in kinds]


def crossover_figure(work: Workload, lines: Sequence[CrossoverLine], kind: str) -> Figure:
    """Above its line, distribution is cheaper (kind "usd") or faster ("seconds") than an accelerator."""
    chosen = [line for line in lines if line.kind == kind]
    word = "cheaper" if kind == "usd" else "faster"
    said = "; ".join(_said(line, work, word) for line in chosen)
    title = f"{QUESTION}: when is distribution {word}?"
    return Figure(
        wide=_crossover(work, chosen, word, wide=True).render(f"crossover-{kind}-wide", title, said + "."),
        narrow=_crossover(work, chosen, word, wide=False).render(f"crossover-{kind}-narrow", title, said + "."),
    )


def _said(line: CrossoverLine, work: Workload, word: str) -> str:
    at = min(range(len(line.parties)), key=lambda index: abs(math.log(line.parties[index] / work.parties)))
    needed = line.examples[at]
    size = amount(line.record_bytes)
    if needed is None:
        return f"with {size} per example and about {line.parties[at]:.0f} parties, distribution is never {word}"
    return f"with {size} per example and about {line.parties[at]:.0f} parties, {word} from {needed:.2g} examples each"


def _crossover(work: Workload, lines: Sequence[CrossoverLine], word: str, *, wide: bool) -> Chart:
    rows = LABEL_GAP * ((len(lines) + 2) // 2)
    x = (math.log10(2), math.log10(max(lines[0].parties)))
    drawn = [m for line in lines for m in line.examples if m is not None and m <= MOST]
    y = (math.log10(LEAST), float(math.ceil(math.log10(max([*drawn, work.examples, 1e3]) + 1))))
    if wide:
        chart = Chart(width=WIDE, height=430, left=52, right=240, top=34, bottom=50, x=x, y=y)
    else:
        chart = Chart(width=NARROW, height=320 + rows, left=42, right=10, top=40 + rows, bottom=50, x=x, y=y)
    chart.grid(range(0, int(y[1]) + 1, 1 if wide or y[1] < 6 else 2), _decade, "examples per party, by bytes of each")
    chart.steps(range(1, 7, 1 if wide else 2), _decade, "parties")
    labels = []
    for index, line in enumerate(lines):
        colour = index + 1
        points = [
            (math.log10(n), math.log10(max(m, LEAST)))
            for n, m in zip(line.parties, line.examples, strict=True)
            if m is not None and m <= MOST
        ]
        if points:
            chart.line(points, colour)
        name = f"{amount(line.record_bytes)} each" + (" (here)" if line.record_bytes == work.record_bytes else "")
        labels.append((name if points else f"{name}: never {word}", points[-1][1] if points else y[1], colour))
    own = (math.log10(work.parties), math.log10(min(max(work.examples, LEAST), MOST)))
    chart.dot(chart.across(own[0]), chart.up(own[1]), 0, 5)
    chart.text(chart.across(own[0]) + 9, chart.up(own[1]) + 4, "this run", "name arm-0")
    if wide:
        chart.end_labels(labels)
    else:
        chart.key([(name, colour) for name, _, colour in labels], 12)
    return chart


def progress_figure(arms: Sequence[ArmResult], metric: str, colours: Mapping[str, int], by: str) -> Figure | None:
    """The metric against what had been sent and received per party ("bytes"), or against seconds; log scale.

    None where no arm recorded that.
    """
    lines = []
    for arm in arms:
        points = [(getattr(point, by), point.mean) for point in arm.curve if getattr(point, by)]
        if len(points) > 1 and not (by == "bytes" and arm.kind == "centralized"):
            lines.append((arm.name, points, colours[arm.name]))
    if not lines:
        return None
    title = f"{metric.capitalize()} by {'bytes per party' if by == 'bytes' else 'seconds of training'}"
    show = amount if by == "bytes" else _seconds
    said = "; ".join(
        f"{name} reaches {score(line[-1][1], metric)} after {show(line[-1][0])}" for name, line, _ in lines
    )
    return Figure(
        wide=_progress(lines, metric, by, show, wide=True).render(f"{by}-wide", title, f"{said}."),
        narrow=_progress(lines, metric, by, show, wide=False).render(f"{by}-narrow", title, f"{said}."),
    )


def _progress(
    lines: Sequence[tuple[str, list[tuple[float, float]], int]],
    metric: str,
    by: str,
    show: Callable[[float], str],
    *,
    wide: bool,
) -> Chart:
    across = [math.log10(x) for _, line, _ in lines for x, _ in line]
    axis = Axis.over(metric, (y for _, line, _ in lines for _, y in line))
    x, y = (min(across), max(max(across), min(across) + 0.3)), axis.span
    rows = LABEL_GAP * ((len(lines) + 1) // 2)
    if wide:
        chart = Chart(width=WIDE, height=400, left=52, right=240, top=34, bottom=50, x=x, y=y)
    else:
        chart = Chart(width=NARROW, height=300 + rows, left=42, right=14, top=40 + rows, bottom=50, x=x, y=y)
    chart.grid(axis.marks, axis.show, axis.title)
    title = "sent and received per party (log scale)" if by == "bytes" else "seconds of training (log scale)"
    chart.steps(log_ticks(*x), lambda value: show(10**value), title)
    for _, line, colour in lines:
        chart.line([(math.log10(a), axis.at(b)) for a, b in line], colour)
    if wide:
        chart.end_labels([(shortened(name, 28), axis.at(line[-1][1]), colour) for name, line, colour in lines])
    else:
        chart.key([(name, colour) for name, _, colour in lines], 12)
    return chart


def _decade(value: float) -> str:
    return "1" if value == 0 else f"10{str(round(value)).translate(_RAISED)}" if value > 1 else "10"


def _seconds(value: float) -> str:
    return f"{value:.2g} s"
