"""An honest run is never accused, whatever its rate, noise, steps and delta; a false claim is, if it is false enough.

The ledgers are made without training, as the product makes them: noise calibrated to the budget, one event a pass, and
the cost that `Spent` states.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from choral import audit
from choral.audits import Audit
from choral.privacy import Ledger
from choral.privacy.accounting import record_level, record_noise
from choral.privacy.accounting.events import PoissonSampledGaussian
from choral.privacy.ledgers.spent import Spent
from choral.trainers import Run

MakeRun = Callable[..., Run]
Setting = tuple[float, float, int, int, int]


def drawn(count: int, seed: int) -> Iterator[Setting]:
    """(epsilon, delta, records, batch size, steps): epsilon .1 to 10, up to 20,000 steps."""
    generator = random.Random(seed)
    for _ in range(count):
        records = int(10 ** generator.uniform(2, 5))
        batch = max(1, int(records * 10 ** generator.uniform(-3, 0)))
        steps = int(10 ** generator.uniform(0, 4.302))
        delta = 10 ** generator.uniform(-9, -1) / records
        yield 10 ** generator.uniform(-1, 1), max(delta, 1e-10), records, batch, steps


def made(make_run: MakeRun, folder: Path, setting: Setting) -> tuple[Run, PoissonSampledGaussian]:
    epsilon, delta, records, batch, steps = setting
    rate = batch / records
    noise = record_noise.noise_multiplier(epsilon, delta, rate, steps, slack=1e-3)
    event = PoissonSampledGaussian(sample_rate=rate, noise_multiplier=noise, steps=steps)
    spent = Spent(
        epsilon=record_level.epsilon([event], delta), delta=delta, accountant=record_level.ACCOUNTANT, steps=steps,
        noise_multiplier=noise, sample_rate=rate,
    )  # fmt: skip
    run = kept(make_run, folder, setting, spent, event)
    return run, event


def kept(make_run: MakeRun, folder: Path, setting: Setting, spent: Spent, *events: PoissonSampledGaussian) -> Run:
    epsilon, delta, records, _, _ = setting
    sizes = {"a": records}
    plain = make_run("cloud-dp", parties=sizes, rounds=2)
    history = tuple(
        type(entry)(**{**{f: getattr(entry, f) for f in entry.__struct_fields__}, "epsilon": None})
        for entry in plain.history
    )
    privacy: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "max_grad_norm": 1.0, "epochs": 1}
    make_run(
        "cloud-dp", parties=sizes, rounds=2, history=history, privacy=privacy, spent={"pooled": spent}
    ).save(folder)  # fmt: skip
    (folder / "ledger").mkdir()
    ledger = Ledger(folder / "ledger" / "pooled.jsonl", holder="pooled")
    ledger.bind("pooled", delta)
    for place, event in enumerate(events):
        ledger.append(event, after=place)
    return Run.load(folder)


def about_the_budget(report: Audit) -> set[str]:
    names = ("budget", "accountants agree", "history", "Delta")
    found = [check.verdict for check in report.checks if any(name in check.name for name in names)]
    assert len(found) >= len(names)
    return set(found)


def hold_honest(make_run: MakeRun, tmp_path: Path, count: int, seed: int) -> None:
    for place, setting in enumerate(drawn(count, seed)):
        run, _ = made(make_run, tmp_path / f"{place}", setting)
        report = audit(run)
        assert about_the_budget(report) == {"holds"}, (setting, [c for c in report.checks if c.verdict != "holds"])


def hold_false(make_run: MakeRun, tmp_path: Path, count: int, seed: int) -> None:
    """In turn: a claim that is too low by 3 % or .03; the ledger's noise, steps or rate; the claim's of the same."""
    replace = dataclasses.replace
    for place, setting in enumerate(drawn(count, seed)):
        steps = setting[-1]
        run, event = made(make_run, tmp_path / f"honest{place}", setting)
        spent, held = run.info.spent["pooled"], event
        kind = place % 6 if steps > 1 else 0
        low = spent.epsilon - max(0.03 * spent.epsilon, 0.03)
        if kind == 0:
            spent = replace(spent, epsilon=low)
        elif kind == 1:
            held = PoissonSampledGaussian(
                sample_rate=event.sample_rate, noise_multiplier=event.noise_multiplier / 1.5, steps=event.steps
            )
        elif kind == 2:
            held = PoissonSampledGaussian(
                sample_rate=event.sample_rate, noise_multiplier=event.noise_multiplier, steps=event.steps * 2
            )
        elif kind == 3:
            spent = replace(spent, noise_multiplier=spent.noise_multiplier * 2)
        elif kind == 4:
            spent = replace(spent, steps=spent.steps // 2)
        else:
            spent = replace(spent, sample_rate=spent.sample_rate / 2)
        report = audit(kept(make_run, tmp_path / f"false{place}", setting, spent, held))
        assert [row.verdict for row in report.budgets] == ["violated"], (kind, setting, report.budgets)


def test_honest_runs_hold(make_run: MakeRun, tmp_path: Path) -> None:
    hold_honest(make_run, tmp_path, 3, seed=4)


def test_false_runs_are_violated(make_run: MakeRun, tmp_path: Path) -> None:
    hold_false(make_run, tmp_path, 6, seed=5)


@pytest.mark.slow
def test_five_hundred_honest_runs_hold_and_a_hundred_false_ones_are_violated(make_run: MakeRun, tmp_path: Path) -> None:
    start = time.monotonic()
    hold_honest(make_run, tmp_path / "honest", 500, seed=2026)
    hold_false(make_run, tmp_path / "false", 100, seed=2027)
    assert time.monotonic() - start < 20 * 60


# Settings of which an audit that compared one upper bound with another said "violated" or "not verified".
@pytest.mark.parametrize(
    "setting",
    [(1.0, 1e-5, 1000, 20, 1000), (0.25, 1e-5, 100, 10, 2000), (0.947, 1e-5, 10_000, 100, 10_000)],
)
def test_long_honest_trainings_hold(make_run: MakeRun, tmp_path: Path, setting: Setting) -> None:
    report = audit(made(make_run, tmp_path / "run", setting)[0])
    assert about_the_budget(report) == {"holds"}, report.checks


def test_a_ledger_does_not_exhaust_its_auditor(make_run: MakeRun, tmp_path: Path) -> None:
    """A million full batches with little noise, thousands of unlike steps, and steps that nobody can take."""
    setting = (1.0, 1e-5, 1000, 20, 10)
    spent = Spent(epsilon=0.9, delta=1e-5, accountant="", steps=10, noise_multiplier=1.0, sample_rate=0.02)
    steep = PoissonSampledGaussian(sample_rate=1.0, noise_multiplier=0.2, steps=10**6)
    start = time.process_time()
    report = audit(kept(make_run, tmp_path / "steep", setting, spent, steep))
    assert [row.verdict for row in report.budgets] == ["violated"]
    endless = PoissonSampledGaussian(sample_rate=0.5, noise_multiplier=0.2, steps=10**12)
    report = audit(kept(make_run, tmp_path / "endless", setting, spent, endless))
    assert [row.verdict for row in report.budgets] == ["unverified"]
    assert "expected at most" in report.budgets[0].finding
    assert time.process_time() - start < 30.0
