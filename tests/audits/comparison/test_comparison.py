"""The comparison's rows, its refusals, its JSON and its table."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
import torch
from rich.console import Console
from scipy import stats

from choral.audits import Comparison, ReportError, audit, compare
from choral.audits.findings.schema import Check
from choral.errors import ConfigError, DataError
from choral.trainers import Run

MakeRun = Callable[..., Run]
Arms = dict[str, list[Run]]


def last(runs: list[Run]) -> list[float]:
    return [run.metrics["accuracy"] for run in runs]


def check(report: Comparison, part: str) -> Check:
    return next(each for each in report.checks if part in each.name)


def test_rows_hold_means_intervals_and_paired_differences(arms: Arms) -> None:
    report = compare(arms)
    assert report.baseline == "cloud"
    assert [arm.name for arm in report.arms] == list(arms)
    for arm in report.arms:
        scores = last(arms[arm.name])
        low, high = stats.t.interval(0.95, 2, loc=sum(scores) / 3, scale=stats.sem(scores))
        assert (arm.metric.low, arm.metric.high) == pytest.approx((low, high))
        if arm.name == "cloud":
            assert arm.difference is None
            continue
        assert arm.difference is not None
        assert arm.difference.paired
        oracle = stats.ttest_rel(scores, last(arms["cloud"])).confidence_interval(0.95)
        found = arm.difference.estimate
        assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high))


def test_pairs_are_made_by_seed_and_not_by_position(arms: Arms) -> None:
    shuffled = {**arms, "federated": arms["federated"][::-1]}
    assert compare(shuffled).arms[2].difference == compare(arms).arms[2].difference


def test_other_seeds_are_not_paired(arms: Arms, make_run: MakeRun) -> None:
    arms["federated"] = [make_run("federated", seed) for seed in (3, 4, 5, 6)]
    difference = compare(arms).arms[2].difference
    assert difference is not None
    assert not difference.paired
    oracle = stats.ttest_ind(last(arms["federated"]), last(arms["cloud"]), equal_var=False).confidence_interval(0.95)
    assert (difference.estimate.low, difference.estimate.high) == pytest.approx((oracle.low, oracle.high))


def test_one_seed_has_no_interval_and_says_so(make_run: MakeRun) -> None:
    report = compare({"cloud": make_run("cloud"), "federated": make_run("federated")})
    assert report.arms[0].metric.low is None
    assert report.arms[1].difference is not None
    assert report.arms[1].difference.estimate.low is None
    printed = _printed(report)
    assert "1 seed: no interval" in printed
    assert " ± " not in printed.split("± is")[0]


def test_the_worst_holder_speaks_for_the_arm(arms: Arms, make_run: MakeRun) -> None:
    # Another holder of another seed has spent more than all in the first run.
    costly = make_run("federated-dp", 2)
    spent = dict(costly.info.spent)
    spent["Davos"] = replace(spent["Davos"], epsilon=7.9999)
    arms["federated-dp"][2] = make_run("federated-dp", 2, spent=spent)
    row = compare(arms).arms[-1]
    assert row.claim is not None
    assert (row.claim.holder, row.claim.epsilon) == ("Davos", 7.9999)
    assert (row.claim.asked, row.claim.delta, row.claim.unit) == (8.0, 1e-5, "record")
    assert row.holders[0].name == "Davos"
    assert len(row.holders) == 10
    for word in ("10⁻⁵", "8.00", "record", "zero out one record", "PLD", "Davos", "server"):
        assert word in row.claim.sentence


def test_bytes_seconds_and_survivors(arms: Arms) -> None:
    rows = {arm.name: arm for arm in compare(arms).arms}
    assert rows["federated"].bytes_per_party == 20 * (20_900 + 10_450)
    assert rows["federated-masked"].bytes_per_party == 20 * (26_500 + 22_100)
    assert rows["cloud"].bytes_per_party == 264 * 213  # the largest party's raw data, moved once
    assert rows["cloud"].survivors is None
    assert rows["federated"].survivors == 10
    assert rows["federated"].seconds.mean == pytest.approx(20 * 0.23)


def test_the_fewest_survivors_of_any_round_are_reported(arms: Arms, make_run: MakeRun) -> None:
    history = list(make_run("federated", 1).history)
    history[7] = msgspec.structs.replace(history[7], survivors=6)
    arms["federated"][1] = make_run("federated", 1, history=history)
    assert compare(arms).arms[2].survivors == 6


def test_the_curve_is_the_mean_and_the_range_over_seeds(arms: Arms) -> None:
    curve = compare(arms).arms[0].curve
    assert [point.round for point in curve] == list(range(21))
    scores = [run.history[5].metrics["accuracy"] for run in arms["cloud"]]
    assert (curve[5].low, curve[5].high) == (min(scores), max(scores))
    assert curve[5].mean == pytest.approx(sum(scores) / 3)


def test_arms_keep_their_order_whatever_the_mapping(arms: Arms, make_run: MakeRun) -> None:
    mixed = {"zebra": make_run("federated"), **dict(reversed(arms.items())), "apple": make_run("federated")}
    assert [arm.name for arm in compare(mixed).arms] == [*arms, "zebra", "apple"]


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (("federated", "cloud"), None, "cloud"),
        (("federated", "mine:cloud"), None, "mine"),
        (("federated", "federated-dp"), None, "federated"),
        (("mine:cloud-dp", "federated"), None, "federated"),
        (("cloud", "federated"), "federated", "federated"),
    ],
)
def test_the_baseline(names: tuple[str, ...], wanted: str | None, expected: str, make_run: MakeRun) -> None:
    arms = {name.split(":")[0]: make_run(name.split(":")[-1]) for name in names}
    assert compare(arms, baseline=wanted).baseline == expected


# Checks


def test_a_masked_sum_that_changes_nothing_holds(arms: Arms) -> None:
    report = compare(arms)
    assert [(row.arm, row.reference, row.seed, row.difference) for row in report.matches] == [
        ("federated-masked", "federated", seed, 0.0) for seed in range(3)
    ]
    assert check(report, "equals").verdict == "holds"
    assert "identical, to the last bit, at each of 3 seeds" in check(report, "equals").finding


@pytest.mark.parametrize(
    ("nudge", "verdict"), [(3e-8, "holds"), (1e-3, "violated"), (math.nan, "violated"), (math.inf, "violated")]
)
def test_weights_that_differ(nudge: float, verdict: str, arms: Arms, make_run: MakeRun) -> None:
    run = arms["federated-masked"][1]
    state = {name: tensor.clone() for name, tensor in run.state.items()}
    state["bias"][3] += nudge
    arms["federated-masked"][1] = make_run("federated-masked", 1, state=state)
    report = compare(arms)
    assert check(report, "equals").verdict == verdict
    assert "identical" not in check(report, "equals").finding  # as two of three seeds are
    found = report.matches[1].difference
    assert found == pytest.approx(nudge, rel=1e-6) if math.isfinite(nudge) else found is None


@pytest.mark.parametrize(("nudge", "verdict"), [(0.25, "holds"), (0.3, "violated")])
def test_weights_may_differ_by_the_fixed_point_bound(nudge: float, verdict: str, make_run: MakeRun) -> None:
    coarse = {"fixed_point": {"bound": 16.0, "error_bound": 0.25}}
    weights = {"bias": torch.zeros(3)}
    plain = make_run("federated", state=weights, **coarse)
    masked = make_run("federated-masked", state={"bias": weights["bias"] + nudge}, **coarse)
    assert check(compare({"plain": [plain], "masked": [masked]}), "equals").verdict == verdict


def test_one_seed_that_cannot_be_compared_leaves_all_unverified(arms: Arms, make_run: MakeRun) -> None:
    arms["federated-masked"][1] = make_run("federated-masked", 1, fixed_point=None)
    report = compare(arms)
    assert len(report.matches) == 2
    assert check(report, "equals").verdict == "unverified"


@pytest.mark.parametrize("change", ["a tensor is missing", "a shape that would broadcast"])
def test_other_shapes_are_a_difference(change: str, arms: Arms, make_run: MakeRun) -> None:
    state = dict(arms["federated-masked"][0].state)
    if change == "a tensor is missing":
        del state["bias"]
    else:
        state["bias"] = torch.zeros(1)
    arms["federated-masked"][0] = make_run("federated-masked", 0, state=state)
    report = compare(arms)
    assert check(report, "equals").verdict == "violated"
    assert report.matches[0].difference is None


def test_sums_are_held_against_the_same_method_only(make_run: MakeRun) -> None:
    """Another algorithm, step or split ends at other weights, whatever the sum."""
    state = {"weight": torch.ones(3)}
    gd = make_run("federated", algorithm={"kind": "gd", "rate": 1.0})
    fsvrg = {"algorithm": {"kind": "fsvrg", "step": 5.0}, "state": state}
    alike = {"plain": make_run("federated", **fsvrg), "masked": make_run("federated-masked", **fsvrg)}
    report = compare({"gd": gd, **alike})
    assert [(row.arm, row.reference, row.difference) for row in report.matches] == [("masked", "plain", 0.0)]
    assert check(report, "equals").name == "masked equals plain"
    for other in (
        {"algorithm": {"kind": "fsvrg", "step": 6.0}},
        {"config": {"split": {"reshuffle": True}}},
        {"config": {"training": {"learning_rate": 0.1}}},
    ):
        assert compare(alike | {"plain": make_run("federated", **fsvrg | other)}).matches == ()
    two = {"gd": gd, "gd-masked": make_run("federated-masked", algorithm={"kind": "gd", "rate": 1.0})}
    assert check(compare(alike | two), "equals").name == "masked equals plain; gd-masked equals gd"


def test_a_dropout_leaves_the_masked_sum_unverified(arms: Arms, make_run: MakeRun) -> None:
    history = list(make_run("federated-masked", 0).history)
    history[3] = msgspec.structs.replace(history[3], survivors=9)
    arms["federated-masked"] = [make_run("federated-masked", 0, history=history)]
    found = check(compare(arms), "equals")
    assert (found.verdict, "survived" in found.finding) == ("unverified", True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds": 5}, "other rounds or parties"),
        ({"parties": {"a": 700, "b": 665}}, "other rounds or parties"),
        ({"fixed_point": None}, "no common fixed-point encoding"),
        ({"fixed_point": {"bound": 8.0, "error_bound": 1e-9}}, "no common fixed-point encoding"),
    ],
)
def test_runs_that_cannot_be_held_against_each_other_are_unverified(
    change: dict[str, object], said: str, arms: Arms, make_run: MakeRun
) -> None:
    arms["federated-masked"] = [make_run("federated-masked", seed, **change) for seed in range(3)]
    report = compare(arms)
    found = check(report, "equals")
    assert (found.verdict, said in found.finding, report.matches) == ("unverified", True, ())


def test_other_starting_weights_are_found(arms: Arms, make_run: MakeRun) -> None:
    assert check(compare(arms), "starts").verdict == "holds"
    history = list(make_run("cloud", 1).history)
    history[0] = msgspec.structs.replace(history[0], metrics={"accuracy": 0.2})
    arms["cloud"][1] = make_run("cloud", 1, history=history)
    found = check(compare(arms), "starts")
    assert (found.verdict, "seed 1" in found.finding) == ("violated", True)


def test_other_data_is_found(arms: Arms, make_run: MakeRun) -> None:
    found = check(compare(arms), "examples")
    assert (found.verdict, found.refutable) == ("holds", True)
    assert not check(compare({"cloud": arms["cloud"]}), "examples").refutable  # nothing beside it
    arms["cloud"] = [make_run("cloud", seed, parties={"a": 100}) for seed in range(3)]
    assert check(compare(arms), "examples").verdict == "violated"


def test_a_budget_that_was_passed_is_found(arms: Arms, make_run: MakeRun) -> None:
    # These runs have no folder, so there is no ledger to believe them by; see test_integration for the verdict "holds".
    assert check(compare(arms), "federated-dp stays").verdict == "unverified"
    privacy = {"epsilon": 7.9, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 2}
    arms["federated-dp"] = [make_run("federated-dp", seed, privacy=privacy) for seed in range(3)]
    assert check(compare(arms), "federated-dp stays").verdict == "violated"


# The budget curve


def test_budgets_are_grouped_by_the_epsilon_asked_for(arms: Arms, budgets: Arms) -> None:
    report = compare(arms, budgets=budgets)
    assert [curve.arm for curve in report.budgets] == ["cloud-dp", "federated-dp"]
    for curve in report.budgets:
        assert [point.asked for point in curve.points] == [1, 2, 4, 8]
        for point in curve.points:
            scores = [r.metrics["accuracy"] for r in budgets[curve.arm] if r.info.privacy["epsilon"] == point.asked]
            assert point.metric.values == pytest.approx(scores)
            assert point.spent <= point.asked
            assert point.metric.low is not None


def test_a_run_without_privacy_has_no_place_in_the_budgets(arms: Arms) -> None:
    with pytest.raises(ConfigError, match="without privacy"):
        compare(arms, budgets={"cloud": arms["cloud"]})
    with pytest.raises(ConfigError, match="no runs"):
        compare(arms, budgets={"cloud-dp": []})


def test_epsilons_of_two_units_share_no_curve(budgets: Arms, arms: Arms, make_client_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"per record \(cloud-dp\) and per client \(whole\)") as caught:
        compare(arms, budgets={**budgets, "whole": [make_client_run()]})
    assert "not on one scale" in caught.value.hint
    report = compare(arms, budgets={"whole": [make_client_run()]})
    assert [curve.unit for curve in report.budgets] == ["client"]


# Units


def test_each_epsilon_says_for_whom_it_holds(arms: Arms, make_client_run: MakeRun) -> None:
    alone = compare(arms)
    assert "per record." in " ".join(_printed(alone).split())
    assert not any("per client" in caveat for caveat in alone.caveats)
    both = compare({**arms, "whole": [make_client_run(seed) for seed in range(3)]})
    row = next(line for line in _printed(both).splitlines() if line.startswith("whole"))
    assert "5.66 /client" in row
    assert "not on one scale" in " ".join(_printed(both).split())
    assert any("no common scale" in caveat for caveat in both.caveats)
    assert any("hundreds" in caveat for caveat in both.caveats)
    only = compare({"cloud": arms["cloud"], "whole": [make_client_run(seed) for seed in range(3)]})
    assert not any("no common scale" in caveat for caveat in only.caveats)


def test_the_spread_over_holders_is_there_where_there_are_several(arms: Arms) -> None:
    report = {arm.name: arm for arm in compare(arms).arms}
    assert report["cloud-dp"].spreads == ()
    assert report["federated"].spreads == ()
    epsilon, noise, rate, examples = report["federated-dp"].spreads
    holders = report["federated-dp"].holders
    assert (epsilon.greatest, epsilon.least) == (holders[0].epsilon, holders[-1].epsilon)
    assert (noise.least, noise.greatest) == (1.1, pytest.approx(1.55))
    assert (rate.least, rate.greatest) == (16 / 213, 16 / 60)
    assert (examples.least, examples.median, examples.greatest) == (60, 136.5, 213)


# Refusals


def test_bad_arms_are_refused(arms: Arms, make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="no arms"):
        compare({})
    with pytest.raises(ConfigError, match="'cloud' has no runs"):
        compare({"cloud": []})
    with pytest.raises(ConfigError, match="two runs of seed 1"):
        compare({"cloud": [make_run(seed=1), make_run(seed=1)]})
    with pytest.raises(ConfigError, match="different rounds: 20 and 5"):
        compare({"cloud": [make_run(seed=0), make_run(seed=1, rounds=5)]})
    with pytest.raises(ConfigError, match="different privacy") as caught:
        compare({"cloud-dp": [make_run("cloud-dp", 0), make_run("cloud-dp", 1, epsilon=2.0)]})
    assert "budgets=" in caught.value.hint
    with pytest.raises(ConfigError, match="two secure sums"):
        compare({"federated": [make_run("federated", 0), make_run("federated-masked", 1)]})
    with pytest.raises(ConfigError, match="no arm 'clowd'") as caught:
        compare(arms, baseline="clowd")
    assert "federated-masked" in caught.value.hint


def test_an_interrupted_run_is_named(arms: Arms, make_run: MakeRun) -> None:
    arms["federated"][2] = make_run("federated", 2, history=make_run("federated", 2).history[:8])
    with pytest.raises(ConfigError, match="arm 'federated', seed 2: interrupted after round 7 of 20") as caught:
        compare(arms)
    assert "resume=True" in caught.value.hint
    for history in ([make_run().history[0]], []):
        with pytest.raises(ConfigError, match="interrupted after round 0"):
            compare({"cloud": make_run(history=history)})


def test_a_history_with_a_gap_is_refused(make_run: MakeRun) -> None:
    history = make_run().history
    for broken in (history[1:], history[:3] + history[4:], history[:4] + history[3:]):
        with pytest.raises(ConfigError, match="its history is not rounds 0 to 20"):
            compare({"cloud": make_run(history=broken)})


def test_a_metric_must_be_there_and_finite(arms: Arms, make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="no metric 'f1', it has accuracy, loss"):
        compare(arms, metric="f1")
    assert compare(arms, metric="loss").arms[0].metric.mean == pytest.approx(1 - sum(last(arms["cloud"])) / 3)
    history = list(make_run("cloud", 0).history)
    history[4] = msgspec.structs.replace(history[4], metrics={"accuracy": math.nan})
    with pytest.raises(DataError, match="accuracy is nan after round 4"):
        compare({"cloud": make_run(history=history)})


def test_privacy_without_spending_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="records no spending"):
        compare({"cloud-dp": make_run("cloud-dp", spent={})})
    spent = make_run("cloud-dp").info.spent["pooled"]
    bad = {"pooled": replace(spent, epsilon=math.nan)}
    with pytest.raises(DataError, match="epsilon spent by pooled is nan"):
        compare({"cloud-dp": make_run("cloud-dp", spent=bad)})


# Files and terminal


def test_json_round_trip(arms: Arms, budgets: Arms, tmp_path: Path) -> None:
    report = compare(arms, budgets=budgets, title="Ten hospitals")
    path = report.save(tmp_path / "new" / "report.json")
    assert Comparison.load(path) == report
    held = json.loads(path.read_text())
    assert (held["format"], held["version"], held["kind"]) == ("choral-report", 2, "comparison")
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_report_file_that_is_not_one_is_refused(arms: Arms, tmp_path: Path) -> None:
    path = compare(arms).save(tmp_path / "report.json")
    held = json.loads(path.read_text())
    for change, message in (
        ({"version": 1}, "version 1"),
        ({"format": "other"}, "not a Choral report"),
        ({"extra": 1}, "extra"),
        ({"metric": 3}, "metric"),
        ({"kind": "audit"}, "kind"),
    ):
        path.write_text(json.dumps({**held, **change}))
        with pytest.raises(ReportError, match=message):
            Comparison.load(path)
    path.write_text(json.dumps(held)[:-20])
    with pytest.raises(ReportError, match="damaged"):
        Comparison.load(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(ReportError, match="damaged"):
        Comparison.load(path)
    with pytest.raises(ReportError, match="no report"):
        Comparison.load(tmp_path / "none.json")


def test_only_json_and_html_can_be_saved(arms: Arms, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'report\.pdf'") as caught:
        compare(arms).save(tmp_path / "report.pdf")
    assert ".html" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_the_curves_are_a_picture_of_their_own(arms: Arms, make_run: MakeRun, tmp_path: Path) -> None:
    """Well-formed, with one panel per metric, every colour that it uses, and nothing fetched or run."""
    hostile = "<script>&\"'"
    report = compare(arms | {hostile: make_run("federated")}, also=["loss"], references={"loss": {hostile: 0.5}})
    drawn = report.save(tmp_path / "curves.svg").read_text()
    root = ElementTree.fromstring(drawn)  # noqa: S314 (written just now)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall("{http://www.w3.org/2000/svg}g")) == 2
    assert hostile in {element.text.rsplit("  ")[0] for element in root.iter() if element.text}
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    assert set(re.findall(r"var\((--[\w-]+)\)", drawn)) - {"--c"} <= set(re.findall(r"(--[\w-]+):", drawn))
    assert set(re.findall(r"arm-\d+", drawn)) <= set(re.findall(r"\.(arm-\d+) \{", drawn))
    with pytest.raises(ConfigError, match=r"'curves\.svg'"):
        audit(arms["cloud"][0]).save(tmp_path / "curves.svg")


def _printed(report: Comparison, width: int = 80) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=width))
    return out.getvalue()


def test_the_table_fits_a_pipe_of_80_columns(arms: Arms) -> None:
    lines = _printed(compare(arms)).splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("federated-dp"))
    for cell in ("87.3", "−9.9", "8.00", "20", "972", "4.6"):
        assert cell in row
    assert all(line.count("%") == 1 for line in lines if line.startswith(("cloud ", "federated ")))


def test_names_are_printed_and_not_interpreted(make_run: MakeRun) -> None:
    printed = _printed(compare({"[red]x[/red]": make_run()}, title="[bold]t"))
    assert "[red]x[/red]" in printed
    assert "[bold]t" in printed


def test_the_public_import_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, choral.audits; print([m for m in ('torch', 'matplotlib', 'scipy', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
