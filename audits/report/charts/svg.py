"""A small SVG chart: axes, lines, bands, points and labels that take their colours from the page's CSS.

Colours are classes (``arm-0`` to ``arm-12``), so one drawing serves light, dark and print. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

LABEL_GAP = 17.0
ARM_CLASSES = 12
REFERENCE = 12  # the colour class of what is no arm
_DASHES = ("", "", "", "7 5", "", "2 4", "9 3 2 3", "12 4", "", "6 3", "", "3 3", "1 5")


def arm_classes(names: Iterable[str], fixed: Sequence[str]) -> dict[str, int]:
    """A colour number per arm: the well-known ``fixed`` ones always the same, others in turn after them, and then those
    of the well-known ones that are not there.
    """
    places = {name: index for index, name in enumerate(fixed)}
    given = list(dict.fromkeys(names))
    free = [*range(len(fixed), ARM_CLASSES), *(place for name, place in places.items() if name not in given)]
    others = [name for name in given if name not in places]
    return places | {name: free[turn % len(free)] for turn, name in enumerate(others)}


def dash(place: int) -> str:
    """Lines are told apart by dashes as well as by colour."""
    return f' stroke-dasharray="{_DASHES[place]}"' if _DASHES[place] else ""


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that cover [low, high], at most ``most`` steps apart."""
    raw = max(high - low, 1e-9) / most
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of round numbers within [low, high]: decades, with 2 and 5 between them where decades are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    marks = [decade + math.log10(factor) for decade in decades for factor in factors]
    return [mark for mark in marks if low - 1e-9 <= mark <= high + 1e-9]


def spread(wanted: Sequence[float], low: float, high: float, gap: float = LABEL_GAP) -> list[float]:
    """Label positions near ``wanted``, in the same order, at least ``gap`` apart and within [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    floor = low
    for index in order:
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


@dataclass(kw_only=True)
class Chart:
    """A drawing surface in pixels with margins and two scales. ``across`` and ``up`` map data to pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float] = (0.0, 1.0)
    parts: list[str] = field(default_factory=list)

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def up(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def add(self, markup: str) -> None:
        self.parts.append(markup)

    def text(self, x: float, y: float, words: str, classes: str = "", anchor: str = "start") -> None:
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{escape(words)}</text>')

    def rule(self, x1: float, y1: float, x2: float, y2: float, classes: str, extra: str = "") -> None:
        self.add(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"{extra}/>')

    def grid(self, values: Sequence[float], show: Callable[[float], str], title: str) -> None:
        """Horizontal lines with their values, and what they measure above them."""
        for value in values:
            self.rule(self.left, self.up(value), self.width - self.right, self.up(value), "grid")
            self.text(self.left - 8, self.up(value) + 4, show(value), "tick", "end")
        self.text(0, self.top - 14, title, "axis")

    def steps(self, values: Sequence[float], show: Callable[[float], str], title: str) -> None:
        """The horizontal axis: marks with their values, and what they measure under them."""
        base = self.height - self.bottom
        self.rule(self.left, base, self.width - self.right, base, "base")
        for value in values:
            self.rule(self.across(value), base, self.across(value), base + 5, "base")
            self.text(self.across(value), base + 20, show(value), "tick", "middle")
        self.text((self.left + self.width - self.right) / 2, base + 42, title, "axis", "middle")

    def line(self, points: Sequence[tuple[float, float]], place: int) -> None:
        drawn = " ".join(f"{self.across(x):.1f},{self.up(y):.1f}" for x, y in points)
        self.add(f'<polyline points="{drawn}" class="line arm-{place}"{dash(place)}/>')

    def band(self, lows: Sequence[tuple[float, float]], highs: Sequence[tuple[float, float]], place: int) -> None:
        edge = [*lows, *reversed(highs)]
        drawn = " ".join(f"{self.across(x):.1f},{self.up(y):.1f}" for x, y in edge)
        self.add(f'<polygon points="{drawn}" class="band arm-{place}"/>')

    def dot(self, x: float, y: float, place: int, radius: float = 4) -> None:
        """A point in pixels."""
        self.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="dot arm-{place}"/>')

    def end_labels(self, labels: Sequence[tuple[str, float, int]]) -> None:
        """Names beside the right end of lines: (name, y in data, colour), moved apart where they would touch."""
        edge = self.width - self.right
        wanted = [self.up(y) for _, y, _ in labels]
        placed = spread(wanted, self.top, self.height - self.bottom)
        for (name, _, place), start, end in zip(labels, wanted, placed, strict=True):
            self.add(f'<path d="M{edge + 3:.1f} {start:.1f}L{edge + 14:.1f} {end:.1f}" class="leader arm-{place}"/>')
            self.text(edge + 18, end + 4, name, f"name arm-{place}")

    def key(self, labels: Sequence[tuple[str, int]], y: float, levels: int = 0) -> None:
        """Names in rows of two above a narrow drawing; the last ``levels`` of them are level lines."""
        for index, (name, place) in enumerate(labels):
            x, row = (index % 2) * self.width / 2, y + LABEL_GAP * (index // 2)
            level = index >= len(labels) - levels
            kind, extra = ("level", "") if level else ("line", dash(place))
            self.rule(x, row - 4, x + 20, row - 4, f"{kind} arm-{place}", extra)
            self.text(x + 26, row, shortened(name, 18), f"name arm-{place}")

    def render(self, identity: str, title: str, description: str) -> Markup:
        """The finished drawing with its alt text. ``identity`` is unique in the page."""
        head = (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" height="{self.height:g}"'
            f' role="img" aria-labelledby="{identity}-t {identity}-d">'
            f'<title id="{identity}-t">{escape(title)}</title><desc id="{identity}-d">{escape(description)}</desc>'
        )
        return Markup(head + "".join(self.parts) + "</svg>")  # noqa: S704 (every text above is escaped)


def shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
