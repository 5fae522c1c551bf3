"""Runs as `federate` and `centralize` return them, made of arithmetic instead of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from choral.audits.findings.evidence import Bound, InversionAudit, NullControl, Probe, ProbeCheck, ScoreAudit, View
from choral.audits.lower_bounds.roc import roc
from choral.audits.lower_bounds.trials import rate_interval
from choral.privacy.ledgers.spent import Spent
from choral.trainers.run_folder.info import RoundRecord, RunInfo
from choral.trainers.run_folder.run import Run

TOWNS = ("Aarau", "Basel", "Chur", "Davos", "Emmen", "Fribourg", "Glarus", "Horgen", "Ilanz", "Jona")
PARTIES = {name: 60 + 17 * index for index, name in enumerate(TOWNS)}
VERSIONS = {"python": "3.11.7", "choral": "0.1.0", "torch": "2.13.0", "dp-accounting": "0.6.0"}
ACCOUNTANT = "PLD (dp-accounting 0.6.0), cross-checked by RDP"
PEAK = {"cloud": 0.972, "cloud-dp": 0.915, "federated": 0.964, "federated-masked": 0.964, "federated-dp": 0.872}


def wobble(*key: int) -> float:
    """A fixed number in [-1, 1] that looks irregular."""
    return math.sin(12.9898 * sum(k * 7.31**i for i, k in enumerate(key, 1)))


def fake_run(
    arm: str = "cloud",
    seed: int = 0,
    *,
    rounds: int = 20,
    epsilon: float = 8.0,
    peak: float | None = None,
    parties: dict[str, int] | None = None,
    **changes: object,
) -> Run:
    """A run of one of the five well-known arms."""
    parties = PARTIES if parties is None else parties
    private, federated = arm.endswith("-dp"), arm.startswith("federated")
    peak = PEAK[arm] if peak is None else peak
    top = peak + 0.004 * wobble(seed, 3 if federated else 5, int(private))
    speed = 0.35 if federated else 0.6
    history = []
    for number in range(rounds + 1):
        start = 0.1 + 0.03 * wobble(seed)
        value = (
            start
            if number == 0
            else top
            - (top - start) * math.exp(-speed * number)
            + 0.004 * wobble(seed, number, int(federated)) * math.exp(-number / 8)
        )
        history.append(
            RoundRecord(
                round=number,
                metrics={"accuracy": value, "loss": 1 - value},
                seconds=0.0 if number == 0 else 0.21 + 0.02 * seed,
                survivors=len(parties) if federated and number else 0,
                bytes_up=(26_500 if "masked" in arm or private else 20_900) if federated and number else 0,
                bytes_down=(22_100 if "masked" in arm or private else 10_450) if federated and number else 0,
                epsilon=epsilon * math.sqrt(number / rounds) * 0.999 if private and number else None,
            )
        )
    holders = {"pooled": sum(parties.values())} if not federated else parties
    spent = (
        {
            name: Spent(
                epsilon=epsilon * (0.999 - 0.06 * index / len(holders)),
                delta=1e-5,
                accountant=ACCOUNTANT,
                steps=80,
                noise_multiplier=1.1 + 0.05 * index,
                sample_rate=16 / size,
            )
            for index, (name, size) in enumerate(holders.items())
        }
        if private
        else {}
    )
    secure = None
    if federated:
        masked = "masked" in arm or private
        secure = {
            "name": "masked" if masked else "plain",
            "trust": (
                "The server does not collude with all but one of the parties that stay to the end."
                if masked
                else "The server sees every party's update."
            ),
            "threshold": 2 if masked else 1,
            "modulus_bits": 46,
        }
    state = {"weight": torch.full((10, 64), float(seed + 1) / 3, dtype=torch.float32), "bias": torch.zeros(10)}
    fields: dict[str, object] = {
        "kind": "federated" if federated else "centralized",
        "rounds": rounds,
        "seed": seed,
        "device": "cpu",
        "parties": dict(parties),
        "parameters": 650,
        "privacy": {"epsilon": epsilon, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 2} if private else None,
        "spent": spent,
        "secure_sum": secure,
        "fixed_point": {"bound": 16.0, "value_bits": 28, "max_weight": 256, "error_bound": 6.0e-8}
        if federated
        else None,
        "raw_bytes": {name: 264 * size for name, size in parties.items()},
        "config": {"data": "digits", "rounds": rounds, "alpha": 0.5, "batch_size": 16},
        "versions": VERSIONS,
    }
    recorded: Any = changes.pop("history", history)
    state = changes.pop("state", state)
    fields.update(changes)
    return Run(info=RunInfo(**fields), history=tuple(recorded), state=state)


def fake_client_run(seed: int = 0) -> Run:
    """A run that promises client-level privacy, its noise inside the masked sum."""
    promise = {"unit": "client", "epsilon": 8.0, "delta": 1e-5, "noise": "distributed", "min_survivors": 6}
    spent = Spent(
        epsilon=5.66,
        delta=1e-5,
        unit="client",
        neighbours="zero out one client",
        accountant="RDP",
        steps=20,
        noise_multiplier=3.0,
        sample_rate=1.0,
    )
    return fake_run("federated-dp", seed, peak=0.2, privacy={**promise, "colluders": 1}, spent={"clients": spent})


@pytest.fixture
def make_client_run() -> Callable[..., Run]:
    return fake_client_run


@pytest.fixture
def make_run() -> Callable[..., Run]:
    return fake_run


@pytest.fixture
def arms() -> dict[str, list[Run]]:
    return {arm: [fake_run(arm, seed) for seed in range(3)] for arm in PEAK}


@pytest.fixture
def budgets() -> dict[str, list[Run]]:
    curve = {1.0: 0.55, 2.0: 0.74, 4.0: 0.82, 8.0: 0.872}
    return {
        arm: [fake_run(arm, seed, epsilon=eps, peak=top + lift) for eps, top in curve.items() for seed in range(3)]
        for arm, lift in (("cloud-dp", 0.045), ("federated-dp", 0.0))
    }


def attack(finding: str = "not violated", *, null_holds: bool = True, **changes: Any) -> ScoreAudit:
    rng = np.random.default_rng(0)
    members = np.arange(400) % 2 == 0
    scores = rng.normal(size=400) + 0.5 * members
    bound = Bound(
        method="one-run", epsilon=0.4, delta=1e-5, confidence=0.95, kind="confidence", ceiling=3.7,
        counts={"canaries": 400, "guesses": 100, "right": 62}, thresholds="the 100 scores farthest from the median",
        tried=1, assumptions=("Each canary was in or out by a fair coin.",), reference="Steinke, Nasr, Jagielski 2023",
    )  # fmt: skip
    null = NullControl(
        draws=500, positives=20 if null_holds else 200, rate=rate_interval(20 if null_holds else 200, 500),
        allowed=0.05, holds=null_holds,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "attack": "loss threshold", "design": "coins", "unit": "record", "scores": 400, "members": 200, "delta": 1e-5,
        "claimed": 3.0, "finding": finding, "sentence": "What was found.", "decisive": "one-run", "bounds": (bound,),
        "roc": roc(scores, members), "null": null, "notes": ("Few canaries.",),
    }  # fmt: skip
    return ScoreAudit(**(fields | changes))


def inversion(*, recovered: bool = False) -> InversionAudit:
    image = tuple((i % 8) / 7 for i in range(64))
    views = tuple(
        View(name=name, sees="x", image=image, psnr=20.0, ssim=0.5, unrelated_psnr=9.0, p_value=0.2, recovered=found)
        for name, found in (("plain update", True), ("masked message", recovered), ("sum", False))
    )
    return InversionAudit(
        method="exact (linear first layer)", shape=(8, 8), batch=1, trials=20, level=0.01, truth=image, views=views,
        assumptions=("The adversary knows the model.",),
    )  # fmt: skip


def probe(*, violated: bool) -> Probe:
    test = ProbeCheck(
        name="noise size", violated=violated, expected=1.0, observed=0.1, p_value=1e-9, false_alarms=1e-4,
        finding="The noise is a tenth of what is claimed.", assumptions=(),
    )  # fmt: skip
    return Probe(checks=(test,), canaries=attack(), violated=violated, sentence="Probed.")


@pytest.fixture
def evidence() -> SimpleNamespace:
    """Makers of the results of attacks, as the attacks' own modules return them."""
    return SimpleNamespace(attack=attack, inversion=inversion, probe=probe)
