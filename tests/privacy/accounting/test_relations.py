"""Neighbour relations: what a ledger states, what older ledgers meant, and what is printed of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism

from choral.errors import ConfigError
from choral.privacy import Ledger, Privacy, PrivacyEngine
from choral.privacy.accounting import record_level
from choral.privacy.accounting.events import CLIENT_UNIT, PoissonSampledGaussian, relation_of, stated
from choral.privacy.ledgers.spent import group_pair

EVENT = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.5, steps=10)
# The bytes that an earlier version wrote for two passes.
OLDER = (
    '{"previous":"0000000000000000000000000000000000000000000000000000000000000000","entry":{"type":"header","'
    'format":"choral ledger 1","holder":"data","delta":0.00001,"unit":"record","neighbours":"add or remove one'
    ' record"},"digest":"8ec26e15738c769fd419d6cb950fddfc494f95471e9837ad2c8ae8d5fa0d8807"}\n'
    '{"previous":"8ec26e15738c769fd419d6cb950fddfc494f95471e9837ad2c8ae8d5fa0d8807","entry":{"type":"poisson_g'
    'aussian","sample_rate":0.1,"noise_multiplier":1.5,"steps":10},"digest":"4159a180615be8ad4e886715cd42cef1f'
    '4c4a153309c14e4454c3c44e9b8adfe"}\n'
    '{"previous":"4159a180615be8ad4e886715cd42cef1f4c4a153309c14e4454c3c44e9b8adfe","entry":{"type":"poisson_g'
    'aussian","sample_rate":0.1,"noise_multiplier":1.5,"steps":10},"digest":"5e91d9f1b8be6d696de777e9201b735e9'
    '3f0460e5d9e610ad3d7adfee108e2ca"}\n'
)


@pytest.fixture
def older(tmp_path: Path) -> Path:
    path = tmp_path / "older.jsonl"
    path.write_text(OLDER, encoding="utf-8")
    return path


def test_a_new_ledger_states_that_one_record_is_zeroed_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.bind("a", 1e-5)
    ledger.append(EVENT, after=0)
    assert '"neighbours":"zero out one record"' in (tmp_path / "a.jsonl").read_text()
    assert Ledger(tmp_path / "a.jsonl").neighbours == stated(ledger.neighbours) == "zero out one record"


def test_an_older_ledger_is_read_and_goes_on_without_a_changed_byte(older: Path) -> None:
    ledger = Ledger(older)
    assert (ledger.neighbours, relation_of(ledger.neighbours)) == ("add or remove one record", "zero out one record")
    assert ledger.epsilon(1e-5) == record_level.epsilon([EVENT, EVENT], 1e-5)
    ledger.bind("data", 1e-5)
    ledger.append(EVENT, after=2)
    assert older.read_text().startswith(OLDER)
    assert Ledger(older).events == (EVENT,) * 3


def test_training_goes_on_with_an_older_ledger_and_says_that_its_words_are_old(
    problem: Any, loop: Any, older: Path
) -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-5, ledger=older)
    model = problem.model()
    loop(*privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()), epochs=1)
    assert privacy.spent().neighbours == "zero out one record (in older words: add or remove one record)"
    assert relation_of(privacy.spent().neighbours) == "zero out one record"
    assert len(Ledger(older).events) == 3


def test_a_client_s_relation_is_no_record_s(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.bind("clients", 1e-5, unit=CLIENT_UNIT)
    assert "client" in ledger.neighbours
    assert PrivacyEngine(
        Privacy(epsilon=1.0, delta=1e-5), holder="a", ledger=Ledger(), passes=1
    ).spent().neighbours == ("zero out one record")


# Several records of one person


def test_the_pair_of_a_person_is_that_of_a_chain_of_neighbours() -> None:
    assert group_pair(3.0, 1e-5, 1) == (3.0, 1e-5)
    epsilon, delta = group_pair(3.0, 1e-5, 3)
    assert (epsilon, delta) == (9.0, pytest.approx(1e-5 * (1 + math.exp(3) + math.exp(6)), rel=1e-12))
    assert group_pair(3.0, 1e-5, 6) == (18.0, 1.0)
    assert group_pair(300.0, 1e-5, 10) == (3000.0, 1.0)


@pytest.mark.parametrize("records", [2, 3])
def test_k_epsilon_at_the_same_delta_is_too_little_for_a_person_and_the_pair_is_not(records: int) -> None:
    """The exact divergence of k records zeroed out at once, each drawn by itself (dp-accounting's mixture)."""
    one = record_level.epsilon([PoissonSampledGaussian(sample_rate=0.05, noise_multiplier=1.1, steps=100)], 1e-5)
    weights = [math.comb(records, j) * 0.05**j * 0.95 ** (records - j) for j in range(records + 1)]
    loss = from_mixture_gaussian_mechanism(1.1, range(records + 1), weights, value_discretization_interval=1e-3)
    exact = loss.self_compose(100)
    epsilon, delta = group_pair(one, 1e-5, records)
    assert exact.get_delta_for_epsilon(epsilon) < delta
    assert exact.get_delta_for_epsilon(epsilon) > 1e-5  # "k times epsilon" alone would be false


def test_what_is_spent_says_what_a_person_is_promised(problem: Any, loop: Any) -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-5, records_per_person=2)
    model = problem.model()
    loop(*privacy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), problem.loader()))
    spent = privacy.spent()
    assert (spent.records_per_person, spent.person_epsilon, spent.person_delta) == (
        2,
        *group_pair(spent.epsilon, 1e-5, 2),
    )
    assert "person_delta=0.0002" in str(spent)
    plain = Privacy(epsilon=3.0, delta=1e-5).spent()
    assert (plain.records_per_person, plain.person_epsilon, plain.person_delta) == (None, None, None)


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "2"])
def test_a_bound_on_records_is_an_integer(bad: Any) -> None:
    with pytest.raises(ConfigError, match="records_per_person"):
        Privacy(epsilon=3.0, delta=1e-5, records_per_person=bad)
