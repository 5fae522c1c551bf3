"""The HTML report: one well-formed offline file that anyone can read, whatever the names in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from choral.audits import Comparison, audit, compare
from choral.audits.report.charts.figures import rounds_figure
from choral.audits.report.charts.svg import ARM_CLASSES, arm_classes, spread, ticks
from choral.audits.report.html import audit_page, comparison_page
from choral.audits.report.settings_shown import settings
from choral.trainers import RoundRecord, Run

MakeRun = Callable[..., Run]
Arms = dict[str, list[Run]]
VOID = {"meta", "link", "br", "hr", "img", "input", "line", "circle", "path", "polyline", "polygon"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7*7 }}'


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and the text outside of <style>."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> is out of place"

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.words += data


@pytest.fixture
def report(arms: Arms, budgets: Arms) -> Comparison:
    return compare(arms, budgets=budgets)


@pytest.fixture
def pages(report: Comparison, arms: Arms) -> dict[str, str]:
    found = {"comparison": comparison_page(report)}
    found |= {f"audit of {name}": audit_page(audit(arms[name][0])) for name in arms}
    return found


def test_it_is_well_formed(pages: dict[str, str]) -> None:
    for name, html in pages.items():
        page = Page(html)
        assert page.stack == [], name
        assert html.startswith("<!doctype html>"), html[:40]
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), name


def test_it_fetches_nothing_and_runs_nothing(pages: dict[str, str]) -> None:
    for html in pages.values():
        assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|javascript:", html)
        for tag, attributes in Page(html).tags:
            assert tag not in {"script", "iframe", "object", "embed", "link", "img", "base", "form"}
            assert not any(name.startswith("on") or name in {"src", "srcset"} for name in attributes)
            assert (attributes.get("href") or "#").startswith("#")  # a place in the same file
        policy = next(a for tag, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in (policy["content"] or "")


def test_every_picture_has_alt_text(pages: dict[str, str]) -> None:
    for name, html in pages.items():
        pictures = re.findall(r"<svg.*?</svg>", html, re.S)
        assert len(pictures) == (20 if name == "comparison" else 2)
        for picture in pictures:
            assert 'role="img"' in picture
            for labelled in re.findall(r'aria-labelledby="(.*?)"', picture)[0].split():
                text = re.search(rf'id="{labelled}">([^<]+)<', picture)
                assert text is not None
                assert len(text[1]) > 10


def test_pictures_hold_numbers_only_where_numbers_belong(report: Comparison) -> None:
    assert not re.search(r"\b(nan|inf|None)\b", "".join(re.findall(r"<svg.*?</svg>", comparison_page(report), re.S)))


def test_light_dark_phone_and_print_are_there(pages: dict[str, str]) -> None:
    for html in pages.values():
        for needed in ("prefers-color-scheme: dark", "@media print", "max-width", 'name="viewport"', 'lang="en"'):
            assert needed in html
        used = set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--c", "--columns", "--least"}
        for block in re.findall(r":root \{(.*?)\}", html, re.S):
            assert used <= set(re.findall(r"(--[\w-]+):", block)), "a colour is missing in one scheme"


def test_hostile_names_are_shown_and_not_run(make_run: MakeRun) -> None:
    parties = {HOSTILE: 90, "b": 90}
    arms = {
        HOSTILE: make_run("cloud", parties=parties, config={HOSTILE: [HOSTILE]}, versions={HOSTILE: HOSTILE}),
        "federated": make_run("federated", parties=parties, secure_sum={"name": "plain", HOSTILE: {HOSTILE: True}}),
        "federated-dp": make_run("federated-dp", parties=parties),
    }
    html = comparison_page(compare(arms, title=HOSTILE, budgets={HOSTILE: [make_run("cloud-dp")]}))
    for page in (html, audit_page(audit(replace(arms["federated-dp"], folder=Path(HOSTILE))))):
        assert "<script" not in page
        assert "<img" not in page
        assert "&lt;script&gt;" in page
        assert "{{ 7*7 }}" in page
        parsed = Page(page)
        assert parsed.stack == []
        assert "<script>alert(1)</script>" in parsed.words


def test_the_page_says_what_the_issue_asks_for(report: Comparison) -> None:
    words = " ".join(Page(comparison_page(report)).words.split())
    for needed in (
        "What privacy and distribution cost",
        "differentially private for each record",
        "zero out one record",
        "PLD (dp-accounting 0.6.0)",
        "Accuracy over rounds",
        "What a budget buys",
        "Who has spent what",
        "federated-masked equals federated",
        "The server does not collude",
        "What was not audited",
        "Gradient inversion",
        "over seeds only",
        "composition",
        "sizes are treated as public",
        "torch",
        "seeds 0, 1, 2",
        "batch_size",
    ):
        assert needed in words, needed


def test_the_page_says_for_whom_each_epsilon_holds(arms: Arms, budgets: Arms, make_client_run: MakeRun) -> None:
    report = compare({**arms, "whole": [make_client_run(seed) for seed in range(3)]}, budgets=budgets)
    words = " ".join(Page(comparison_page(report)).words.split())
    for needed in (
        "differential privacy for each record, it reaches",
        "differential privacy for each client, it reaches 20",
        "of 8per record",
        "of 8per client",
        "different promises and not on one scale",
        "ε per record asked for",
        "5.66 per client",
        "Upper quartile",
        "Sample rate",
        "federated-dp, 10 data owners",
        "asked for: 8 per client",
    ):
        assert needed in words.replace("\u00a0", " "), needed
    assert "not on one scale" not in Page(comparison_page(compare(arms))).words


def test_the_page_is_drawn_from_the_json_alone(report: Comparison, tmp_path: Path) -> None:
    assert comparison_page(Comparison.load(report.save(tmp_path / "r.json"))) == comparison_page(report)
    assert report.save(tmp_path / "r.html").read_text("utf-8") == comparison_page(report)


def test_one_arm_of_one_seed_can_be_shown(make_run: MakeRun) -> None:
    html = comparison_page(compare({"only": make_run(rounds=1)}))
    assert "one seed" in html
    assert Page(html).stack == []
    assert "What a budget buys" not in html


def test_many_holders_and_many_rounds_stay_small(make_run: MakeRun) -> None:
    parties = {f"party {number}": 90 for number in range(400)}
    html = comparison_page(compare({"federated-dp": make_run("federated-dp", rounds=5000, parties=parties)}))
    assert len(html) < 400_000
    heights = [float(number) for number in re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', html)]
    assert max(heights) < 1000


def test_other_metrics_are_not_percent(arms: Arms) -> None:
    words = Page(comparison_page(compare(arms, metric="loss"))).words
    assert "Loss over rounds" in words
    assert "points" not in words.split("What is promised")[0]


def test_colours_belong_to_names() -> None:
    fixed = ("cloud", "cloud-dp", "federated")
    assert arm_classes(["federated", "x"], fixed)["federated"] == 2
    assert arm_classes(["x", "cloud"], fixed) == {"cloud": 0, "cloud-dp": 1, "federated": 2, "x": 3}
    assert len(set(arm_classes([f"arm {n}" for n in range(ARM_CLASSES)], fixed).values())) == ARM_CLASSES
    assert arm_classes([*"abcdefghij", "cloud"], fixed)["j"] == 1
    many = arm_classes([f"arm {n}" for n in range(20)], fixed)
    assert set(many.values()) <= set(range(ARM_CLASSES))


def test_lines_are_drawn_where_the_numbers_are(report: Comparison) -> None:
    """The cloud's line, read back from its pixels, is the cloud's curve."""
    drawing = str(rounds_figure(report.arms, "accuracy", arm_classes([], ["cloud", "cloud-dp", "federated",
                  "federated-masked", "federated-dp"])).wide)  # fmt: skip
    line = re.search(r'<polyline points="([^"]+)" class="line arm-0"', drawing)
    assert line is not None
    points = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
    ys = dict(re.findall(r'y="([\d.]+)" class="tick" text-anchor="end">(\d+) %', drawing))
    pixel_of = {int(value): float(pixel) - 4 for pixel, value in ys.items()}
    low, high = min(pixel_of), max(pixel_of)
    for (_, pixel), point in zip(points, report.arms[0].curve, strict=True):
        value = low + (pixel_of[low] - pixel) / (pixel_of[low] - pixel_of[high]) * (high - low)
        assert value / 100 == pytest.approx(point.mean, abs=1e-3)


def test_labels_are_moved_apart() -> None:
    placed = spread([100, 101, 300, 102], 0, 400, gap=10)
    assert placed[2] == 300
    ordered = sorted(placed[:2] + placed[3:])
    assert ordered[0] < ordered[1] < ordered[2]
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(ordered))
    assert max(spread([395, 396, 397], 0, 400, gap=10)) == 400


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.55, 0.97), (0.0, 0.0), (3e-9, 4e-9), (-2.0, 7.0), (0.0, 8.0)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    marks = ticks(low, high, 5)
    assert marks[0] <= low + 1e-12
    assert marks[-1] >= high - 1e-12
    assert 2 <= len(marks) <= 8


def test_a_hostile_metric_name_is_escaped_in_the_pictures(make_run: MakeRun) -> None:
    history = [replace_metrics(entry, {HOSTILE: 0.5}) for entry in make_run().history]
    html = comparison_page(compare({"cloud": make_run(history=history)}, metric=HOSTILE))
    assert "<script" not in html.lower()
    assert Page(html).stack == []


def replace_metrics(entry: RoundRecord, metrics: dict[str, float]) -> RoundRecord:
    return msgspec.structs.replace(entry, metrics=metrics)


def test_the_page_with_all_evidence_is_well_formed(make_run: MakeRun, evidence: SimpleNamespace) -> None:
    report = audit(
        make_run("federated"),
        attacks=[evidence.attack(attack=HOSTILE), evidence.attack(design="split", bounds=(), decisive="", null=None)],
        probe=evidence.probe(violated=True),
        inversion=evidence.inversion(),
    )
    html = audit_page(report)
    page = Page(html)
    assert page.stack == []
    assert "<script" not in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(re.findall(r"<svg", html)) == 2 * (1 + 3 + 1)
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.S))
    assert not re.search(r"\b(nan|inf|None)\b", drawings)
    assert "true image" in page.words


def test_an_image_is_drawn_pixel_by_pixel(make_run: MakeRun, evidence: SimpleNamespace) -> None:
    html = audit_page(audit(make_run(), inversion=evidence.inversion()))
    wide = re.search(r"<svg[^>]*inversion-wide.*?</svg>", html, re.S)
    assert wide is not None
    # The last of eight columns is white in each of the eight rows of four pictures.
    assert (
        re.findall(r'<path d="([^"]*)" fill="#ffffff"', wide[0]) == ["".join(f"M7 {y}h1v1h-1z" for y in range(8))] * 4
    )


def test_settings_are_printed_once_and_then_only_what_differs_without_what_is_not_set(arms: Arms) -> None:
    def typed(run: Run, **changes: object) -> Run:
        config = {"rounds": 20, "training": {"rate": 0.5, "batch_size": 16, "start": None}, "epsilons": []} | changes
        return replace(run, info=msgspec.structs.replace(run.info, config=config))

    given = {name: [typed(run) for run in runs] for name, runs in arms.items()}
    assert settings(compare(given).arms) == [
        ("all configurations", '{\n  "rounds": 20,\n  "training": {\n    "batch_size": 16,\n    "rate": 0.5\n  }\n}')
    ]
    given["cloud-dp"] = [
        typed(run, training={"rate": 0.5, "batch_size": 64, "start": None}) for run in given["cloud-dp"]
    ]
    (first, whole), (other, differs) = settings(compare(given).arms)
    assert first == "cloud, federated, federated-masked, federated-dp"
    assert '"batch_size": 16' in whole
    assert other == "cloud-dp, where they differ from the first"
    assert differs == '{\n  "training": {\n    "batch_size": 64\n  }\n}'


def test_no_template_is_left_unfilled(arms: Arms, budgets: dict[str, list[Run]]) -> None:
    page = comparison_page(compare(arms, budgets=budgets))
    assert "{{" not in page
    assert "every ε is per record;" in page


@pytest.mark.parametrize(("tiles", "columns"), [(3, 3), (6, 6), (7, 4), (8, 4), (13, 5)])
def test_no_tile_is_left_alone_in_its_row(
    report: Comparison, monkeypatch: pytest.MonkeyPatch, tiles: int, columns: int
) -> None:
    tile = {"label": "Privacy", "value": "none", "note": "", "interval": ""}
    monkeypatch.setattr("choral.audits.report.html.cards", lambda _: [tile] * tiles)
    assert f'<div class="cards" style="--columns: {columns}">' in comparison_page(report)
