"""What is refused before anything is read, paid for or sent; cells of few contributors; what is saved; the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from choral import (
    AdaptiveClip,
    ClientPrivacy,
    ConfigError,
    DataError,
    Masked,
    Privacy,
    PrivacyError,
    federated_statistics,
)
from choral.cli.command_line import main
from choral.privacy import Ledger
from choral.trainers import Categories, Count, Covariance, Histogram, Mean, Quantiles, Table

TWO = {name: {"x": np.arange(8.0), "y": np.arange(8.0)} for name in "ab"}
SHARES = Privacy(1.0, 1e-4, noise="distributed")


@pytest.mark.parametrize(
    ("statistic", "said"),
    [
        (Mean(5, 5), "the first below the second"),
        (Mean(0, float("inf")), "finite"),
        (Mean(0, "1"), "expected a number"),  # type: ignore[arg-type]
        (Mean(1e15, 1e15 + 1), "too close"),
        (Mean(0, 1, weight=0), "weight"),
        (Mean(0, 1, column=""), "column"),
        (Histogram([0, 0]), "rising"),
        (Histogram([0, float("inf")]), "finite"),
        (Quantiles((0.0,), 0, 1), "without the two"),
        (Quantiles((1.0,), 0, 1), "without the two"),
        (Quantiles((0.5,), 0, 1, bins=1000), "a square"),
        (Quantiles((), 0, 1), "list of shares"),
        (Categories("ab"), "list of values"),
        (Categories(("a", "a")), "all different"),
        (Covariance({"x": (0, 1)}), "two columns"),
        (Table({"x": (0, 1)}), "two columns"),
        (Table({"x": range(2000), "y": range(2000)}), "cells"),
        ("mean", "expected Statistic"),
    ],
)
def test_statistics_out_of_range(statistic: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        federated_statistics(TWO | {"c": {"x": [1.0], "y": [2.0]}}, {"x": statistic}, privacy=SHARES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"privacy": Privacy(1.0, 1e-4)}, "noise"),
        ({"privacy": SHARES, "contributors": 2}, "cells are public"),
        ({"threshold": 20.0}, "threshold without noise"),
        ({"privacy": SHARES, "threshold": 20.0}, "no cells to leave out"),
        ({"privacy": SHARES, "threshold": float("nan")}, "threshold"),
        ({"contributors": 3}, "nothing would be left"),
        ({"contributors": 1}, "contributors >= 2"),
        ({"privacy": SHARES, "ledgers": {"a": Ledger()}}, "no Ledger for 'b'"),
        ({"privacy": ClientPrivacy(1.0, 1e-4), "ledgers": {"a": Ledger()}}, "one ledger counts for all"),
        ({"privacy": ClientPrivacy(1.0, 1e-4, clip=AdaptiveClip(start=1.0))}, "fixed clip"),
        ({"privacy": 1.0}, "privacy"),
        ({"secure_sum": "maskd"}, "secure_sum"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        federated_statistics(TWO, {"x": Mean(0, 8)}, **options)


@pytest.mark.parametrize(("people", "threshold"), [(None, 1.0), (4, 4.0), (None, float("inf")), (None, -5.0)])
def test_a_threshold_is_above_what_one_person_counts(people: int | None, threshold: float) -> None:
    """Refused before anything is paid for."""
    promise = Privacy(1.0, 1e-4, noise="distributed", records_per_person=people)
    ledgers = {name: Ledger() for name in "ab"}
    with pytest.raises(ConfigError, match=r"one contributor alone may count|threshold"):
        federated_statistics(TWO, {"x": Histogram([0, 4, 8])}, privacy=promise, threshold=threshold, ledgers=ledgers)
    assert all(not ledger.events for ledger in ledgers.values())


def test_one_party_is_no_federation_and_nothing_is_no_question() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        federated_statistics({"a": TWO["a"]}, {"x": Mean(0, 8)})
    with pytest.raises(ConfigError, match="no statistics"):
        federated_statistics(TWO, {})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"z": [1.0]}, "no column 'x'"),
        ({"x": []}, "no records"),
        ({"x": [[1.0]]}, "2 dimensions"),
        ({"x": ["secret"]}, "expected numbers"),
        (3, "no columns by name"),
    ],
)
def test_data_that_cannot_be_read_is_named_without_a_value(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        federated_statistics(TWO | {"c": data}, {"x": Mean(0, 8)})
    assert "secret" not in f"{error.value} {error.value.hint}"


def test_noise_in_shares_needs_a_sum_that_withstands_its_colluders() -> None:
    """And nothing is paid for where it does not."""
    ledgers = {name: Ledger() for name in "abc"}
    three = TWO | {"c": TWO["a"]}
    with pytest.raises(PrivacyError, match="withstands 0 corrupt"):
        federated_statistics(three, {"x": Mean(0, 8)}, privacy=SHARES, secure_sum=Masked(), ledgers=ledgers)
    assert all(not ledger.events for ledger in ledgers.values())


def parties_with_rare_cells() -> dict[str, dict[str, Any]]:
    """Six parties; "common" is everywhere, "rare" at one, "seldom" at three, and column y at two."""
    found = {}
    for at in range(6):
        values = ["common"] * 5 + ["usual"] * 3 + (["rare"] * 4 if at == 0 else []) + (["seldom"] if at < 3 else [])
        y = np.full(len(values), 1.0 if at < 2 else np.nan)
        found[f"party-{at}"] = {"kind": values, "x": np.arange(len(values)) + 0.0, "y": y}
    return found


def test_what_one_party_alone_has_is_not_published() -> None:
    parties = parties_with_rare_cells()
    kinds = Categories(("common", "usual", "rare", "seldom"))
    wanted = {"kind": kinds, "x": Mean(0, 16), "y": Mean(0, 2)}
    bare = federated_statistics(parties, wanted)
    assert bare["kind"]["count rare"].value == 4  # of one party: this is what the threshold is for
    assert bare.left_out == 0
    found = federated_statistics(parties, wanted, contributors=4, secure_sum=Masked())
    shown = {label: each.value for label, each in found["kind"].items() if label.startswith("count")}
    # "rare" and "seldom" have 1 and 3 contributors; one more is left out, so that "all - the rest" is not theirs.
    assert shown == {
        "count common": None, "count usual": 18.0, "count rare": None, "count seldom": None, "count other": 0.0
    }  # fmt: skip
    assert found["x"]["mean"].value == bare["x"]["mean"].value
    assert found["y"]["mean"].value is None
    assert found.left_out == 3 + 5
    assert "how many parties contribute" in found.releases[0]


@pytest.mark.parametrize(("corrupt", "least"), [(1, 3), (2, 4)])
def test_a_cell_needs_two_contributors_beside_the_corrupt_ones(corrupt: int, least: int) -> None:
    """One honest party and the corrupt ones, who know what they sent: the cell would be that party's."""
    wanted, secure_sum = {"x": Mean(0, 16)}, Masked(corrupt=corrupt, dropouts=0)
    with pytest.raises(ConfigError, match=f"expected at least {least}"):
        federated_statistics(parties_with_rare_cells(), wanted, contributors=least - 1, secure_sum=secure_sum)
    found = federated_statistics(parties_with_rare_cells(), wanted, contributors=least, secure_sum=secure_sum)
    assert found["x"]["mean"].value is not None


def test_what_is_saved_is_json_and_a_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    wanted = {"x": Mean(0, 8), evil: Count(column="x")}
    found = federated_statistics(TWO, wanted)
    plain = json.loads(found.save(tmp_path / "s.json").read_text())
    assert plain["estimates"]["x"]["mean"]["value"] == 3.5
    assert plain["format"] == "choral statistics 1"
    page = found.save(tmp_path / "s.html").read_text()
    assert "3.5" in page
    assert evil not in page
    assert "&lt;script&gt;" in page
    with pytest.raises(ConfigError, match="not as"):
        found.save(tmp_path / "s.pickle")
    assert "mean" in found.table()


CONFIG = """
[parties]
north = "north.csv"
south = "south.csv"
[privacy]
epsilon = 4.0
delta = 1e-4
[secure_sum]
kind = "plain"
[statistics.age]
kind = "mean"
low = 0
high = 120
[statistics.sex]
kind = "categories"
values = ["f", "m"]
[statistics.thirds]
kind = "quantiles"
column = "age"
shares = [0.333, 0.667]
low = 0
high = 120
bins = 16
[statistics.bins]
kind = "histogram"
column = "age"
edges = [0, 18, 120]
[statistics.both]
kind = "table"
columns.sex = ["f", "m"]
columns.age = [1, 2]
[statistics.n]
kind = "count"
column = "age"
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(1)
    for name in ("north", "south"):
        rows = [f"{age},{'fm'[int(sex)]}" for age, sex in generator.integers(0, [90, 2], (400, 2))]
        (tmp_path / f"{name}.csv").write_text("age,sex\n" + "\n".join([*rows, ",f"]) + "\n")
    (tmp_path / "stats.toml").write_text(CONFIG)
    out = tmp_path / "run"
    assert main(["stats", str(tmp_path / "stats.toml"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Differentially private for each record" in shown
    plain = json.loads((out / "statistics.json").read_text())
    mean = plain["estimates"]["age"]["mean"]
    assert abs(mean["value"] - 44.5) < 6 * mean["standard_error"]
    assert Ledger(out / "ledger" / "north.jsonl").epsilon(1e-4) <= 4.0
    assert main(["stats", str(tmp_path / "stats.toml"), "--out", str(out)]) == 2  # the budget is spent
    assert "is spent" in capsys.readouterr().err
    bad = tmp_path / "bad.toml"
    bad.write_text(CONFIG.replace("low = 0\n", "", 1))
    exact = tmp_path / "exact.toml"
    exact.write_text(CONFIG.replace("epsilon = 4.0\ndelta = 1e-4\n", ""))
    assert main(["stats", str(exact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimates"]["age"]["mean"]["value"] == pytest.approx(44.5, abs=3.0)
    assert main(["stats", str(bad), "--quiet"]) == 2
    assert "statistics.age.low is not set" in capsys.readouterr().err


def test_exact_totals_say_how_many_cells_are_one_partys_alone() -> None:
    parties = {name: {"x": ["both", "both"]} for name in "abcdef"}
    parties["a"] = {"x": ["both", "mine"]}
    parties["b"] = {"x": ["both", "ours"]}
    parties["c"] = {"x": ["ours", "both"]}
    found = federated_statistics(parties, {"x": Categories(("both", "mine", "ours", "none"))})
    assert "Of 3 cells that are not empty, 1 are one party's alone and 2 of fewer than 5 parties" in found.releases[0]
    kept = federated_statistics(parties, {"x": Categories(("both", "mine", "ours", "none"))}, contributors=5)
    assert not any("alone" in said for said in kept.releases)
    assert federated_statistics(TWO, {"x": Mean(0, 9)}).releases == ()


def test_statistics_are_read_back_drawn_and_printed_by_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parties = {name: {"x": np.arange(50.0) % 4} for name in "abc"}
    sums = Masked(corrupt=1, min_survivors=3)
    found = federated_statistics(parties, {"x": Mean(-3, 5)}, privacy=SHARES, secure_sum=sums)
    found.save(tmp_path / "statistics.json")
    assert type(found).load(tmp_path / "statistics.json") == found
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "statistics.html").read_text().count("<h2>x</h2>") == 1
    assert found.table() in capsys.readouterr().out
    (tmp_path / "statistics.json").write_text('{"format": "choral statistics 2"}')
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no statistics" in capsys.readouterr().err
