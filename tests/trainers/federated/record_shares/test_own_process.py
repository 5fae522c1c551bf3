"""Noise in shares at parties in processes of their own: what leaves them, and what each refuses at its own door."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import party_program as program
from party_program import NAMES, Coordinator
from test_party import Here, Processes, first_weights

from choral import Masked, Plain
from choral.errors import ConfigError
from choral.privacy import BandedShares, Ledger, PoissonSampledShares, Privacy, PrivacyError
from choral.privacy.dpsgd.poisson_loader import PrivateLoader
from choral.trainers.federated.party import TrainingParty, own_party


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes("shares", tmp_path)
    yield made
    made.stop()


def events(folder: Path, name: str) -> int:
    path = folder / f"{name}.jsonl"
    return sum(event.steps for event in Ledger(path).events) if path.exists() else 0


def test_parties_in_processes_of_their_own_train_with_noise_in_shares(processes: Processes, tmp_path: Path) -> None:
    for name in NAMES:
        processes.start(name)
    server = Coordinator(processes, "shares", first_weights())
    for number in (1, 2):
        server.round(number)
    assert set(server.survivors) == {NAMES}
    assert not torch.equal(server.weights, first_weights())
    for name in NAMES:
        assert events(tmp_path, name) == 4
        assert all(isinstance(event, PoissonSampledShares) for event in Ledger(tmp_path / f"{name}.jsonl").events)


def test_a_step_has_equally_many_rows_whatever_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its time would tell: docs/noise-in-shares.md. The draws differ; the rows that the model is shown do not."""
    shown: list[int] = []
    through = PrivateLoader.__iter__

    def counted(self: PrivateLoader) -> Iterator[Any]:
        for batch in through(self):
            shown.append(len(batch[0]))
            yield batch

    monkeypatch.setattr(PrivateLoader, "__iter__", counted)
    here = Here("shares", tmp_path)
    Coordinator(here, "shares", first_weights()).round(1)
    assert shown == [program.plan_of().terms.rows] * 6


def own(tmp_path: Path, drivers: Callable[[Any], Any] = lambda _: {}, **changed: Any) -> TrainingParty:
    """What north makes of the terms, by itself."""
    terms = replace(program.terms_of("shares"), **changed)
    privacy = {"privacy": program.IN_SHARES, "ledger": Ledger(tmp_path / "north.jsonl")}
    return own_party("north", program.dataset_of("north"), program.TASK, terms, drivers, **privacy)


def test_a_plan_that_breaks_the_partys_promise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a plan in the training terms"):
        own(tmp_path, shares=None)
    with pytest.raises(PrivacyError, match=r"the plan costs epsilon [78]\.?\d*, and 4 is promised"):
        own(tmp_path, shares=program.plan_of(epsilon=8.0))
    with pytest.raises(PrivacyError, match="the plan clips to 2, and the promise to 1"):
        own(tmp_path, shares=program.plan_of(max_grad_norm=2.0))
    assert not (tmp_path / "north.jsonl").exists() or not Ledger(tmp_path / "north.jsonl").events


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("records", 87),
        ("parties", 4),
        ("most_records", 41),
        ("length", 8),
        ("batch_size", 8),
        ("steps", 7),
        ("failure", 0.0),
    ],
)
def test_a_plan_of_other_constants_than_the_terms_is_refused(name: str, value: float, tmp_path: Path) -> None:
    """Nor may a server leave out of delta what the secure sum fails with."""
    plan = program.plan_of()
    other = replace(plan, terms=replace(plan.terms, **{name: value}))
    with pytest.raises(ConfigError, match=rf"the plan of the noise has {name} = {value}, and the training terms"):
        own(tmp_path, shares=other)


@pytest.mark.parametrize(
    ("secure_sum", "error", "words"),
    [
        (Masked(corrupt=0, dropouts=0, min_survivors=2), PrivacyError, "may be opened over 2 parties"),
        (Masked(corrupt=0, dropouts=0, min_survivors=3), PrivacyError, "withstands 0 corrupt parties"),
        (Plain(), ConfigError, "has no policy that this party holds the server to"),
    ],
)
def test_a_sum_of_which_the_party_itself_demands_too_little_is_refused(
    secure_sum: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    """Whatever the server proposes: a vector with a share of the noise alone would be opened."""

    def drivers(terms: Any) -> Any:
        spec = program.specs_of(terms, terms.digest)["update"]
        if isinstance(secure_sum, Plain):
            return {"update": secure_sum.party_driver(spec, name="north")}
        directory = {name: program.IDENTITIES[name].public for name in NAMES}
        policy = replace(secure_sum.policy(spec), directory=directory)
        identity = program.IDENTITIES["north"]
        return {"update": secure_sum.party_driver(spec, name="north", identity=identity, policy=policy)}

    with pytest.raises(error, match=words):
        own(tmp_path, drivers)


def test_a_sum_that_may_fail_oftener_than_delta_counts_on_is_refused(tmp_path: Path) -> None:
    """By the party's own policy: up to its bits it would take a sparse graph of masks that the server proposes."""

    def drivers(terms: Any, bits: int) -> Any:
        secure_sum = Masked(corrupt=1, dropouts=0, min_survivors=3)
        spec = program.specs_of(terms, terms.digest)["update"]
        directory = {name: program.IDENTITIES[name].public for name in NAMES}
        policy = replace(secure_sum.policy(spec), directory=directory, security_bits=bits)
        identity = program.IDENTITIES["north"]
        return {"update": secure_sum.party_driver(spec, name="north", identity=identity, policy=policy)}

    assert own(tmp_path, lambda terms: drivers(terms, 40)).name == "north"
    with pytest.raises(PrivacyError, match=r"with probability 2\^-20, and delta counts on 2\^-40"):
        own(tmp_path, lambda terms: drivers(terms, 20))


def test_the_plan_is_among_the_terms_that_all_parties_sign(tmp_path: Path) -> None:
    plan = program.plan_of()
    wider = replace(plan, noise_multiplier=2 * plan.noise_multiplier)
    assert own(tmp_path, shares=plan).terms.digest != own(tmp_path, shares=wider).terms.digest
    assert "shares" not in program.terms_of("private").record()


def test_a_promise_of_another_kind_takes_no_plan(tmp_path: Path) -> None:
    terms = replace(program.terms_of("private"), shares=program.plan_of())
    promise = {"privacy": Privacy(epsilon=4.0, delta=1e-3), "ledger": Ledger(tmp_path / "n.jsonl")}
    party = own_party("north", program.dataset_of("north"), program.TASK, terms, lambda _: {}, **promise)
    assert party.terms.shares is None  # so that its digest is not the one that others sign


def test_rows_of_banded_noise_go_on_with_the_rounds_and_a_restart_begins_anew(tmp_path: Path) -> None:
    """All three train two rounds; one begins again on its ledger: new noise, later rows, the next batches."""
    here = Here("banded", tmp_path)
    server = Coordinator(here, "banded", first_weights())
    server.round(1)
    server.round(2)
    for name in NAMES:
        made = Ledger(tmp_path / f"{name}.jsonl").events
        assert [(event.number, event.row) for event in made if isinstance(event, BandedShares)] == [
            (1, 0), (2, 1), (3, 2), (4, 3)
        ]  # fmt: skip
    again = own_party(
        "north",
        program.dataset_of("north"),
        program.TASK,
        program.terms_of("banded"),
        lambda _: {},
        privacy=program.BANDED,
        ledger=Ledger(tmp_path / "north.jsonl"),
    )
    shares = again._trainer.resident.shares["north"]._party  # type: ignore[union-attr]
    assert (shares.last_row, shares.steps_left) == (3, 2)
    for row in (0, 3):
        with pytest.raises(PrivacyError, match="row 3 was made before"):
            shares.at(row)
    shares.at(4)


def test_a_plan_of_other_bands_or_of_drawn_batches_is_refused(tmp_path: Path) -> None:
    """By the party's own promise, whatever the terms say."""
    for plan, words in (
        (program.plan_of(program.BANDED, bands=2), "the plan has 2 bands, and 3 are promised"),
        (program.plan_of(), "drawn at random and independent noise, and the promise of fixed batches"),
    ):
        terms = replace(program.terms_of("banded"), shares=plan)
        promise = {"privacy": program.BANDED, "ledger": Ledger(tmp_path / "n.jsonl")}
        with pytest.raises(PrivacyError, match=words):
            own_party("north", program.dataset_of("north"), program.TASK, terms, lambda _: {}, **promise)
