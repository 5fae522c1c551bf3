"""The vertical axis: linear for shares, logarithmic for gaps; what is drawn on it is where the numbers are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from choral.audits import compare
from choral.audits.report.charts.axes import FLOOR, Axis
from choral.audits.report.html import comparison_page
from choral.errors import ConfigError, DataError
from choral.trainers import Run

MakeRun = Callable[..., Run]


def test_a_gap_is_logarithmic() -> None:
    axis = Axis.over("objective gap", [0.3, 2e-4])
    assert axis.marks[0] == -4
    assert axis.marks[-1] == 0
    assert axis.at(0.01) == pytest.approx(-2)
    assert axis.at(0.0) == axis.at(-1e-17) == math.log10(FLOOR)
    assert [axis.show(mark) for mark in (-4, -2, 0)] == ["10\u207b\u2074", "0.01", "1"]
    assert "log scale" in axis.title


def test_others_are_linear_and_reach_0() -> None:
    axis = Axis.over("test error", [0.2, 0.6])
    assert axis.marks[0] == 0
    assert axis.marks[-1] >= 0.6
    assert (axis.at(0.2), axis.show(0.2), axis.title) == (0.2, "20 %", "test error")
    assert Axis.over("loss", [0.2, 0.6], from_zero=False).marks[0] > 0


@pytest.mark.parametrize("values", [[0.0], [0.5, 0.5], [1e-30, 1e30], [0.0, 0.0]])
def test_a_gap_of_any_size_has_an_axis(values: list[float]) -> None:
    axis = Axis.over("gap", values)
    low, high = axis.span
    assert low < high
    assert all(low - 1e-9 <= axis.at(value) <= high + 1e-9 for value in values)


def gap_run(make_run: MakeRun, *gaps: float, arm: str = "federated") -> Run:
    run = make_run(arm, rounds=len(gaps) - 1)
    history = [
        msgspec.structs.replace(entry, metrics={"objective gap": gap, "test error": 0.1 + gap / 10})
        for entry, gap in zip(run.history, gaps, strict=True)
    ]
    return make_run(arm, rounds=len(gaps) - 1, history=history)


def test_curves_and_levels_are_drawn_where_the_numbers_are(make_run: MakeRun) -> None:
    report = compare(
        {"one": gap_run(make_run, 1.0, 0.1, 0.001)},
        metric="objective gap",
        also=["test error"],
        references={"test error": {"majority": 0.4, "optimum": 0.11}, "recall": {"not shown": 0.5}},
    )
    page = comparison_page(report)
    names = ("rounds", "rounds-1")
    gap, error = (re.findall(rf'<svg[^>]*labelledby="{name}-wide-t.*?</svg>', page, re.S)[0] for name in names)
    pixels = [
        [float(pair.split(",")[1]) for pair in re.findall(r'<polyline points="([^"]+)" class="line', each)[0].split()]
        for each in (gap, error)
    ]
    # One decade, then two: the second step down is twice the first one.
    assert pixels[0][2] - pixels[0][1] == pytest.approx(2 * (pixels[0][1] - pixels[0][0]), abs=0.3)
    # The test error is 0.2, 0.11, 0.1001; the levels at 0.4 and 0.11, of which the second meets the curve.
    first, second = (float(y) for y in re.findall(r'y1="([\d.]+)"[^>]*class="level arm-12"', error))
    assert second == pytest.approx(pixels[1][1], abs=0.2)
    assert first == pytest.approx(pixels[1][0] - 0.2 * (pixels[1][1] - pixels[1][0]) / 0.09, abs=0.6)
    assert "majority (40.0" in page
    assert "not shown" not in page


def test_other_metrics_are_in_table_markdown_and_terminal(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = compare({"one": gap_run(make_run, 1.0, 0.25)}, metric="objective gap", also=["test error"])
    assert report.arms[0].measure("test error").estimate.mean == 0.125
    assert report.arms[0].measure("objective gap").estimate.mean == 0.25
    assert "test error 12.5" in comparison_page(report)
    assert "| one | 0.25 | 12.5" in report.save(tmp_path / "report.md").read_text()
    report.print()
    assert "12.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"also": ["objective gap"]}, ConfigError, "named twice"),
        ({"also": ["recall"]}, ConfigError, "no metric 'recall'"),
        ({"references": {"objective gap": {"x": math.nan}}}, DataError, "reference 'x'"),
    ],
)
def test_refuses(options: dict[str, object], kind: type[Exception], says: str, make_run: MakeRun) -> None:
    with pytest.raises(kind, match=says):
        compare({"one": gap_run(make_run, 1.0, 0.25)}, metric="objective gap", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arm", "metric", "there"),
    [
        ("federated-dp", "objective gap", True),
        ("federated", "objective gap", False),
        ("federated-dp", "test error", False),
    ],
)
def test_the_gap_of_private_arms_has_its_caveat(arm: str, metric: str, there: bool, make_run: MakeRun) -> None:
    """It is read from the training records, which no budget covers."""
    report = compare({arm: gap_run(make_run, 1.0, 0.5, arm=arm)}, metric=metric)
    assert any("computed on the training records" in each for each in report.caveats) is there
