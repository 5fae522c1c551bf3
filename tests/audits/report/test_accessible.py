"""Reports for everybody: headings in order, names of pictures and tables, contrast of every ink on what it lies on.

Chromium with axe-core sees more: `make accessibility`, for a report of one's own; tests/accessibility.py.
"""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from choral.audits import audit, compare
from choral.audits.report.html import audit_page, comparison_page
from choral.trainers import Run

SCRIPT = Path(__file__).parents[2] / "accessibility.py"
NAMED = {"svg": ("aria-labelledby", "aria-hidden"), "img": ("alt",), "input": ("aria-label",), "a": ("href",)}


class Outline(HTMLParser):
    """Headings by level, and the tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))


def faults(page: str) -> list[str]:
    """What a reader who does not see the page would miss."""
    outline = Outline(page)
    found = [] if outline.levels.count(1) == 1 and outline.levels[0] == 1 else ["not one h1, first"]
    steps = zip(outline.levels, outline.levels[1:], strict=False)
    found += [f"h{before} is followed by h{after}" for before, after in steps if after > before + 1]
    for tag, attributes in outline.tags:
        if tag in NAMED and not any(attributes.get(name) for name in NAMED[tag]):
            found.append(f"<{tag}> without a name: {attributes}")
        if tag == "th" and attributes.get("scope") not in ("row", "col"):
            found.append("a heading of no row and no column")
        if tag == "html" and not attributes.get("lang"):
            found.append("no language")
    found += [
        f"a link to nothing: {target}" for target in re.findall(r'href="#(.*?)"', page) if f'id="{target}"' not in page
    ]
    return found


@pytest.fixture
def pages(arms: dict[str, list[Run]], budgets: dict[str, list[Run]]) -> dict[str, str]:
    report = compare(arms, budgets=budgets)
    found = {"short": comparison_page(report), "full": comparison_page(report, full=True)}
    return found | {name: audit_page(audit(runs[0])) for name, runs in arms.items()}


def test_headings_are_in_order_and_everything_has_a_name(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        assert faults(page) == [], name
    short = pages["short"]
    for old, new in (
        ("<h1", "<h2"),
        ("<h3", "<h5"),
        ('scope="row"', ""),
        ("aria-labelledby", "data-l"),
        ('lang="en"', ""),
    ):
        assert faults(short.replace(old, new)), old  # each of them is looked at


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    full = long(colour)
    parts = [int(full[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def mixed(colour: str, ink: str) -> str:
    """65 % of a colour in the ink."""
    parts = [[int(each.replace("#", "")[at : at + 2], 16) for at in (0, 2, 4)] for each in (colour, long(ink))]
    return "#" + "".join(f"{round(0.65 * one + 0.35 * other):02x}" for one, other in zip(*parts, strict=True))


def long(colour: str) -> str:
    return colour if len(colour) == 7 else "#" + "".join(2 * each for each in colour[1:])


def palettes(page: str) -> dict[str, dict[str, str]]:
    """Light, dark and print, each with what it takes over from the one before it."""
    found: dict[str, dict[str, str]] = {}
    for name, start in (("light", ":root {"), ("dark", "(prefers-color-scheme: dark) {"), ("print", "@media print {")):
        block = page[page.index(start) :].partition("}")[0]
        found[name] = found.get("light", {}) | dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-fA-F]{3,6})\b", block))
    return found


TEXT = [("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card"), ("accent", "paper"), ("accent", "card")]
TEXT += [(word, f"{word}-back") for word in ("good", "bad", "open")]


def test_contrast_of_words_and_of_drawn_lines(pages: dict[str, str]) -> None:
    """WCAG 2.2, 1.4.3: 4.5 for text; 1.4.11: 3 for what a drawing tells, as lines and points of configurations."""
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#fff") == pytest.approx(4.54, abs=0.005)  # the standard's own example
    for name, colours in palettes(pages["short"]).items():
        for ink, ground in TEXT:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (name, ink, ground)
        drawn = {key: value for key, value in colours.items() if key.startswith("arm-")}
        assert len(drawn) >= 11
        for key, value in drawn.items():
            assert contrast(value, colours["paper"]) >= 3, (name, key)
            assert contrast(mixed(value, colours["ink"]), colours["paper"]) >= 4.5, (name, key)
    assert "fill: color-mix(in srgb, var(--c) 65%, var(--ink))" in pages["short"]  # of names that stand in a drawing


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
def test_the_short_form_is_at_most_twelve_pages(
    pages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from accessibility import MOST_PAGES, printed

    (tmp_path / "report.html").write_text(pages["short"], "utf-8")
    assert 3 <= printed(tmp_path / "report.html") <= MOST_PAGES == 12
