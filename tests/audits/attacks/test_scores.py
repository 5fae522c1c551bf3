"""Audits of scores: verdicts, ceilings, null calibration over hundreds of draws, files, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

from choral.audits.attacks.canaries import flip_coins
from choral.audits.attacks.score_audit import audit_scores, audit_training, canaries_needed
from choral.audits.attacks.score_bounds import FDP, ONE_RUN, TooFewCanariesError, _counts, null_control
from choral.audits.attacks.score_files import read_score_file, read_scores
from choral.audits.findings.evidence import ScoreAudit
from choral.audits.lower_bounds import one_run, trade_off, trials
from choral.audits.lower_bounds.guessing import FixedShares, SampleSplit, ranking, right, stream_of
from choral.audits.lower_bounds.roc import Bools
from choral.errors import ChoralError, ConfigError, DataError


def shifted(count: int, mu: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside = rng.random(count) < 0.5
    return rng.normal(size=count) + mu * inside, inside


def test_a_leaking_model_violates_and_a_private_one_does_not() -> None:
    scores, inside = shifted(2000, 3.0)
    found = audit_scores(scores, inside, design="coins", delta=1e-5, claimed=1.0)
    assert (found.finding, found.decisive) == ("violated", ONE_RUN)
    assert found.bounds[0].epsilon > 1.0
    assert found.bounds[1].method == FDP
    assert found.bounds[1].epsilon > found.bounds[0].epsilon
    assert "at least" in found.sentence
    scores, inside = shifted(2000, 0.2)
    found = audit_scores(scores, inside, design="coins", delta=1e-5, claimed=1.0)
    assert found.finding == "not violated"
    assert f"at most {found.bounds[0].ceiling:.3g}" in found.sentence
    assert found.null is not None
    assert found.null.holds


def test_counts_ceiling_and_correction_are_those_of_the_bound() -> None:
    scores, inside = shifted(1000, 2.0)
    bound = audit_scores(scores, inside, design="coins", delta=1e-5).bounds[0]
    counts = bound.counts
    ordered = inside[np.argsort(-scores)]
    half = counts["guesses"] // 2
    assert counts["right"] == ordered[:half].sum() + (~ordered[-half:]).sum()
    assert bound.tried == 4
    beta = 0.05 / 4
    assert bound.epsilon == one_run.lower_bound(1000, 2 * half, counts["right"], delta=1e-5, beta=beta)
    shares = (20, 100, 400, 1000)
    assert bound.ceiling == max(one_run.ceiling(1000, r, delta=1e-5, beta=beta) for r in shares)
    assert bound.ceiling > bound.epsilon


def test_results_survive_json_to_the_digit() -> None:
    scores, inside = shifted(300, 1.0)
    for design in ("coins", "runs", "split"):
        found = audit_scores(scores, inside, design=design, delta=1e-5, claimed=2.0)
        assert msgspec.json.decode(msgspec.json.encode(found), type=ScoreAudit) == found
        assert found == audit_scores(scores, inside, design=design, delta=1e-5, claimed=2.0)


def test_split_records_give_no_bound() -> None:
    found = audit_scores(*shifted(500, 3.0), design="split", delta=1e-5, claimed=0.1)
    assert (found.finding, found.bounds, found.null) == ("no claim", (), None)
    assert found.roc.auc.value > 0.9


def test_independent_runs_give_two_sided_bounds() -> None:
    scores, inside = shifted(2000, 3.0)
    found = audit_scores(scores, inside, design="runs", delta=1e-5, claimed=1.0, guessing=1.5)
    counts = trials.Counts(**found.bounds[0].counts)
    assert counts.true_positives == int((inside & (scores >= 1.5)).sum())
    assert found.bounds[0].epsilon == trials.clopper_pearson(counts, delta=1e-5)
    assert [bound.kind for bound in found.bounds] == ["confidence", "credible", "confidence"]
    halved = audit_scores(scores, inside, design="runs", delta=1e-5, claimed=1.0)
    assert sum(halved.bounds[0].counts.values()) == 1000
    assert halved.finding == "violated"


def _null_rate(bound: Callable[[np.ndarray, np.ndarray], float], draws: int, size: int) -> tuple[int, int]:
    rng = np.random.default_rng(17)
    return sum(bound(rng.normal(size=size), rng.random(size) < 0.5) > 0 for _ in range(draws)), draws


DELTA = 1e-5
PROCEDURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "one run, four shares": lambda s, c: FixedShares().run(s, c, lambda m, r, v, b: _one_run(m, r, v, b), 0.05).epsilon,
    "one run, one share": lambda s, c: (
        FixedShares((0.3,)).run(s, c, lambda m, r, v, b: _one_run(m, r, v, b), 0.05).epsilon
    ),
    "one run, split": lambda s, c: SampleSplit().run(s, c, lambda m, r, v, b: _one_run(m, r, v, b), 0.05).epsilon,
    "f-DP, four shares": lambda s, c: FixedShares().run(s, c, _fdp, 0.05).epsilon,
    "Clopper-Pearson, split": lambda s, c: trials.clopper_pearson(_counts(s, c, None, DELTA), delta=DELTA),
    "Clopper-Pearson, fixed": lambda s, c: trials.clopper_pearson(_counts(s, c, 0.7, DELTA), delta=DELTA),
}


def _one_run(m: int, r: int, v: int, beta: float) -> float:
    return one_run.lower_bound(m, r, v, delta=DELTA, beta=beta)


def _fdp(m: int, r: int, v: int, beta: float) -> float:
    return trade_off.lower_bound_mu(m, r, v, beta=beta)


@pytest.mark.parametrize("name", PROCEDURES)
def test_null_calibration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # 500 draws of scores that know nothing of the coins. If the true rate is 5 %, more than 41 positives have
    # probability 1e-3: that is the false-alarm rate here. The uncorrected maximum over thresholds has 30 to 60 %.
    positives, draws = _null_rate(PROCEDURES[name], 500, 240)
    interval = trials.rate_interval(positives, draws)
    with capsys.disabled():
        print(f"\nnull, {name}: {positives} of {draws} positive, [{interval.low:.3f}, {interval.high:.3f}]")
    assert positives <= binom.ppf(0.999, draws, 0.05)


def test_the_joint_beta_bound_is_credible_only() -> None:
    # On no leak at all it is always a little above 0, for epsilon = 0 is a line of no mass. At a true
    # epsilon of 1 (randomised response), where both directions are tight, it overshoots in about 12 of 100 audits at
    # beta = .05, twice what a confidence bound may (250 draws, seed fixed). So it never decides a verdict.
    rng = np.random.default_rng(4)
    flip = 1.0 / (1.0 + math.e)
    found = []
    for _ in range(250):
        fn, fp = (int(x) for x in rng.binomial(120, flip, size=2))
        counts = trials.Counts(true_positives=120 - fn, false_negatives=fn, false_positives=fp, true_negatives=120 - fp)
        found.append(trials.region_mass(counts, 1.0, 0.0) < 0.05)
    assert 15 < sum(found) < 50
    none = trials.Counts(true_positives=60, false_negatives=60, false_positives=60, true_negatives=60)
    assert 0.0 < trials.joint_beta(none, delta=0.0) < 0.1
    assert trials.clopper_pearson(none, delta=0.0) == 0.0


def test_the_uncorrected_maximum_over_thresholds_would_be_found_out() -> None:
    def cheat(scores: np.ndarray, coins: np.ndarray) -> float:
        ordered = coins[ranking(scores)]
        return max(_one_run(240, r, right(ordered, r), 0.05) for r in range(2, 241, 4))

    positives, draws = _null_rate(cheat, 150, 240)
    assert positives > binom.ppf(0.999, draws, 0.05)
    rng = np.random.default_rng(1)
    scores = rng.normal(size=240)
    control = null_control(lambda coins: cheat(scores, coins), scores, 0.05, 150)
    assert not control.holds


def test_a_model_that_never_saw_the_canaries() -> None:
    # The real-model version: a network trained without any canary scores noise records; 500 sets of coins.
    # False-alarm rate 1e-3 as above.
    import torch
    from torch import nn

    from choral.audits.attacks.canaries import loss_scores, record_canaries

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = torch.randn(200, 16), torch.randint(4, (200,))
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    scores = loss_scores(model, record_canaries(300, (16,), 4))
    found = audit_scores(scores, flip_coins(300), design="coins", delta=1e-5, null_draws=500)
    assert found.null is not None
    assert found.null.positives <= binom.ppf(0.999, 500, 0.05)


def test_ties_are_not_broken_by_the_order_of_the_file() -> None:
    # Members first and scores of two values: broken in the file's order, half of the guesses are right by themselves.
    inside = np.arange(400) < 200
    scores = np.zeros(400)
    scores[::7] = 1.0
    ordered = inside[ranking(scores)]
    assert abs(right(ordered, 300) - 150) < 45  # 5 sigma
    assert audit_scores(scores, inside, design="coins", delta=0.0).bounds[0].epsilon == 0.0


def test_random_numbers_of_scores_are_theirs_and_of_one_use_alone() -> None:
    scores, other = np.arange(64.0), np.arange(64.0) + 1.0
    drawn = [tuple(stream_of(of, *key).random(4)) for of, key in ((scores, ()), (scores, (1,)), (other, (1,)))]
    assert len(set(drawn)) == 3
    assert drawn[1] == tuple(stream_of(scores, 1).random(4))
    coins: list[Bools] = []

    def bound(inside: Bools) -> float:
        coins.append(inside)
        return 0.0

    null_control(bound, scores, 0.05, 1)
    assert not np.array_equal(coins[0], stream_of(scores).random(64) < 0.5)  # equal by chance: 2^-64


def test_coins_are_fair_and_fresh() -> None:
    coins = flip_coins(100_000)
    assert abs(int(coins.sum()) - 50_000) < 5 * 158.2  # 5 sigma: 6e-7
    assert not np.array_equal(coins, flip_coins(100_000))
    with pytest.raises(ConfigError, match="at least one"):
        flip_coins(0)


def test_coins_that_were_not_fair_are_refused() -> None:
    scores, _ = shifted(300, 0.0)
    with pytest.raises(DataError, match="fair coins"):
        audit_scores(scores, np.arange(300) < 60, design="coins", delta=1e-5)


def test_too_few_canaries_say_how_many_are_needed() -> None:
    with pytest.raises(TooFewCanariesError, match="not even epsilon = 0") as caught:
        audit_scores([1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1], design="coins", delta=1e-5)
    assert "canaries are needed" in caught.value.hint
    found = audit_scores(*shifted(100, 1.0), design="coins", delta=1e-5, claimed=5.0)
    needed = canaries_needed(5.0, delta=1e-5)
    assert f"{needed} canaries are needed" in found.notes[0]
    assert FixedShares().ceiling(needed, lambda m, r, v, b: _one_run(m, r, v, b), 0.05) >= 5.0
    assert FixedShares().ceiling(needed - 4, lambda m, r, v, b: _one_run(m, r, v, b), 0.05) < 5.0


def test_audit_training_flips_trains_and_judges() -> None:
    seen: list[Any] = []

    def train(chosen: list[int]) -> set[int]:
        seen.append(chosen)
        return set(chosen)

    def score(model: set[int], canaries: Sequence[int]) -> list[float]:
        rng = np.random.default_rng(2)
        return [float(canary in model) + 0.1 * rng.normal() for canary in canaries]

    found = audit_training(train, score, range(400), delta=1e-5, claimed=2.0)
    assert len(seen) == 1
    assert len(seen[0]) == found.members
    assert found.finding == "violated"
    with pytest.raises(TooFewCanariesError, match="20 canaries can refute at most") as caught:
        audit_training(train, score, range(20), delta=1e-5, claimed=4.0)
    assert str(canaries_needed(4.0, delta=1e-5)) in caught.value.hint
    assert len(seen) == 1  # refused before any training
    with pytest.raises(DataError, match="399 scores but 400"):
        audit_training(train, lambda model, canaries: np.arange(399.0), range(400), delta=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"design": "halves"}, "expected 'coins'"),
        ({"design": "coins", "delta": -1.0}, "expected 0 <= delta"),
        ({"design": "coins", "delta": math.nan}, "expected 0 <= delta"),
        ({"design": "coins", "confidence": 1.0}, "error probability"),
        ({"design": "coins", "claimed": 0.0}, "claimed epsilon"),
        ({"design": "coins", "claimed": math.inf}, "claimed epsilon"),
        ({"design": "coins", "guessing": 0.5}, "does not go with design='coins'"),
        ({"design": "runs", "guessing": FixedShares()}, "does not go with design='runs'"),
        ({"design": "runs", "guessing": math.nan}, "does not go with design='runs'"),
        ({"design": "runs", "guessing": True}, "does not go with design='runs'"),
        ({"design": "split", "guessing": 0.5}, "does not go with design='split'"),
        ({"design": "coins", "null_draws": 0}, "null_draws"),
    ],
)
def test_bad_settings(options: dict[str, Any], said: str) -> None:
    scores, inside = shifted(100, 1.0)
    with pytest.raises(ConfigError, match=said):
        audit_scores(scores, inside, **{"delta": 1e-5, **options})


@pytest.mark.parametrize("shares", [(), (0.0,), (1.5,), (math.nan,)])
def test_bad_shares(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="shares"):
        FixedShares(shares)


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    csv, jsons = tmp_path / "a.csv", tmp_path / "a.json"
    csv.write_text("\ufeffmember,score\r\n1,0.25\r\nfalse,-3e2\r\n", encoding="utf-8")
    jsons.write_text(json.dumps({"scores": [0.25, -300], "members": [True, 0]}))
    assert read_scores(csv) == read_scores(jsons) == ([0.25, -300.0], [1, 0])


@pytest.mark.parametrize("design", ["coins", "runs", "split", None])
def test_a_file_may_state_its_design(tmp_path: Path, design: str | None) -> None:
    csv, jsons = tmp_path / "a.csv", tmp_path / "a.json"
    csv.write_text((f"# design: {design}\n" if design else "") + "score,member\n0.5,1\n")
    jsons.write_text(json.dumps({"scores": [0.5], "members": [1], "design": design}))
    assert read_score_file(csv) == read_score_file(jsons) == ([0.5], [1], design)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            b"# design: halves\nscore,member\n",
            "line 1: design is 'halves', expected one of coins",
        ),
        ("a.csv", b"# design: runs\nscore,member\n0.5\n", "line 3, has 1 fields"),
        ("a.json", b'{"scores": [1], "members": [1], "design": "halves"}', "cannot be read"),
        ("a.csv", b"", "begins with"),
        ("a.csv", b"0.5,1\n", "begins with"),
        ("a.csv", b"score,member\n0.5,1,3\n", "line 2, has 3 fields"),
        ("a.csv", b"score,member\n0.5,1\n0.5\n", "line 3, has 1 fields"),
        ("a.csv", b"score,member\nabc,1\n", "score is 'abc'"),
        ("a.csv", b"score,member\n1_0,1\n", "score is '1_0'"),
        ("a.csv", b"score,member\n1.0,yes\n", "member is 'yes'"),
        ("a.csv", b"score,member\n\xff\xfe,1\n", "cannot be read"),
        ("a.csv", b'score,member\n"1.0,1\n', "cannot be read"),
        ("a.json", b"", "cannot be read"),
        ("a.json", b'{"scores": [1.0]}', "cannot be read"),
        ("a.json", b'{"scores": [NaN], "members": [1]}', "cannot be read"),
        ("a.json", b'{"scores": ["1"], "members": [1]}', "cannot be read"),
        ("a.json", b'{"scores": [1], "members": [1], "extra": 2}', "cannot be read"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.txt", b"score,member\n", "cannot read scores from"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ChoralError, match=said):
        read_scores(tmp_path / name)


def test_missing_and_nan_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_scores(tmp_path / "none.csv")
    (tmp_path / "nan.csv").write_text("score,member\nnan,1\n1.0,0\n2.0,1\n")
    with pytest.raises(DataError, match="not finite"):
        audit_scores(*read_scores(tmp_path / "nan.csv"), design="coins", delta=1e-5)


def test_exactly_half_is_said_to_be_suspicious() -> None:
    """P[Binomial(400, 1/2) = 200] = 0.0399; one member more says nothing."""
    rng = np.random.default_rng(3)
    members = np.repeat([1, 0], 200)
    notes = audit_scores(rng.normal(size=400), members, design="coins", delta=1e-5, null_draws=5).notes
    assert any("Exactly half of the 400 canaries are members, which fair coins give in 4 %" in note for note in notes)
    members[200] = 1
    assert not audit_scores(rng.normal(size=400), members, design="coins", delta=1e-5, null_draws=5).notes


@pytest.mark.parametrize("plan", [FixedShares(), FixedShares((0.3,)), SampleSplit(), SampleSplit((0.1, 1.0))], ids=repr)
@pytest.mark.parametrize("canaries", [200, 201, 402])
def test_the_ceiling_is_over_as_many_canaries_as_are_judged_and_nobody_is_above_it(plan: Any, canaries: int) -> None:
    """The bound is judged on all canaries where shares are fixed, on half of them where one half chose."""
    members = np.arange(canaries) % 2 == 0
    asked: list[int] = []

    def bound(tested: int, guesses: int, right: int, beta: float) -> float:
        asked.append(tested)
        return one_run.lower_bound(tested, guesses, right, delta=1e-5, beta=beta)

    reached = plan.run(np.where(members, 1.0, -1.0) * (1.0 + np.arange(canaries)), members, bound, 0.05)
    tested = canaries // 2 if isinstance(plan, SampleSplit) else canaries
    assert reached.canaries == tested == asked[-1]
    asked.clear()
    most = plan.ceiling(canaries, bound, 0.05)
    assert set(asked) == {tested}
    assert 0.0 < reached.epsilon <= most * (1.0 + 1e-12)
    if len(getattr(plan, "shares", ())) == 1:
        assert reached.epsilon == pytest.approx(most)
