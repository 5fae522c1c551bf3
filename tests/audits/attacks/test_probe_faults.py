"""The probe against every broken trainer of `probe_faults`, and against honest ones."""

from __future__ import annotations

import os

import pytest
from probe_faults import FAULTS

from choral.audits.attacks.probing import probe
from choral.privacy import AdaptiveClip, PerLayerClip, Privacy

PROMISE = Privacy(epsilon=3.0, delta=1e-5, max_grad_norm=0.7, epochs=3)
QUICK = [
    ("sampling", "a shuffled DataLoader"),
    ("clipping", "to 1.5 C"),
    ("shape", "uniform"),
    ("noise", "seeded by a counter of the process"),
]


def named(key: tuple[str, str]) -> str:
    return ": ".join(key)


def caught(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[key](monkeypatch)
    found = probe(PROMISE)
    assert found.violated
    assert any(check.violated for check in found.checks), found.sentence  # and not by the canaries alone


@pytest.mark.parametrize("key", QUICK, ids=named)
def test_a_subtle_fault_is_caught(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    caught(key, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in FAULTS if key not in QUICK], ids=named)
def test_every_fault_is_caught(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    caught(key, monkeypatch)


def test_each_group_has_ten_faults_and_more() -> None:
    groups = [group for group, _ in FAULTS]
    assert {group: groups.count(group) >= 15 for group in set(groups)} == dict.fromkeys(
        ("clipping", "sampling", "noise", "shape", "schedule"), True
    )


@pytest.mark.slow
def test_honest_trainers_are_passed_forty_times_of_forty() -> None:
    """Fifteen checks with a false-alarm rate of 1e-6 each: one of 40 probes fails with probability 6e-4, and the
    canaries' bound, which is far below the truth, more rarely than that."""
    kinds = (0.7, AdaptiveClip(start=0.3, share=0.6), PerLayerClip(0.3))
    for number in range(40):
        chunks = 150 if number % 2 else None
        promise = Privacy(
            (1.0, 2.0, 4.0, 8.0)[number % 4], 1e-5, max_grad_norm=kinds[number % 3], max_physical_batch_size=chunks
        )
        found = probe(promise)
        assert not found.violated, found.sentence


def test_passes_beyond_the_first_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that ends after forty steps, in a training that was asked for fourteen passes of three."""
    from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer

    honest, made = PrivateOptimizer._independent_noise, []

    def ends(self: PrivateOptimizer, count: int, grid: float, whole: int) -> object:
        made.append(os.getpid())
        return honest(self, count, grid, whole) * (len(made) <= 40)

    monkeypatch.setattr(PrivateOptimizer, "_independent_noise", ends)
    found = probe(Privacy(epsilon=3.0, delta=1e-5, epochs=14))
    assert found.checks[0].violated
    assert "in the last" in found.checks[0].finding or "in step 4" in found.checks[0].finding
