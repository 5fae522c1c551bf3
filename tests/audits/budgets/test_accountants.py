"""Epsilon by several accountants, and participation: what was planned against who came, with trainers that break it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import ClientPrivacy, Masked, Plain, audit
from choral.audits import Audit
from choral.audits.budgets import accountants
from choral.audits.budgets.accountants import accountants_of
from choral.privacy import Ledger, LedgerError
from choral.privacy.accounting import client_level, other_accountants, record_level, renyi
from choral.privacy.accounting.events import ClientRelease, PoissonSampledGaussian, Search
from choral.privacy.client_level import client
from choral.privacy.errors import AccountingError
from choral.trainers import Run
from choral.trainers.federated import codec as codecs

MakeRun = Callable[..., Run]
DELTA = 1e-3
torch.set_num_threads(1)


@pytest.fixture
def job() -> dict[str, Any]:
    """Eight parties, two rounds, a linear model."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(8 * 20, 5, generator=generator)
    labels = (points[:, 0] > 0).long()
    cut = [slice(20 * i, 20 * i + 20) for i in range(8)]

    def build(dataset: TensorDataset) -> Any:
        model = nn.Linear(5, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.5), DataLoader(dataset, batch_size=10)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        for batch, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()

    return {
        "build": build,
        "fit": fit,
        "evaluate": lambda model: float((model(points).argmax(1) == labels).float().mean()),
        "parties": {f"p{i}": TensorDataset(points[part], labels[part]) for i, part in enumerate(cut)},
        "rounds": 2,
    }


def promise(**changes: Any) -> ClientPrivacy:
    return ClientPrivacy(**({"epsilon": 20.0, "delta": DELTA, "min_survivors": 5, "bits": 16} | changes))


def finding(report: Audit, part: str) -> tuple[str, str]:
    check = next(check for check in report.checks if part in check.name)
    return check.verdict, check.finding


def test_record_level_ledgers_by_three_accountants(tmp_path: Path, make_run: MakeRun) -> None:
    run = record_run(tmp_path, make_run)
    rows = accountants_of(run)
    assert [row.holder for row in rows] == ["a", "b"]
    for row in rows:
        assert row.pld == pytest.approx(row.dp_accounting, rel=1e-4)
        assert row.rdp is not None
        assert row.pld is not None
        assert row.pld < row.rdp < 1.4 * row.pld
        assert row.verdict == "holds"
        assert row.prv_low is not None
        assert row.prv_high is not None
        assert row.prv_low < row.pld < row.prv_high < row.prv_low + 0.05
        ledger = Ledger(tmp_path / "run" / "ledger" / f"{row.holder}.jsonl")
        assert (row.head, row.steps) == (ledger.head, 30)
    assert finding(audit(run), "accountants agree")[0] == "holds"


def record_run(tmp_path: Path, make_run: MakeRun) -> Run:
    event = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=1.0, steps=30)
    sizes = {"a": 90, "b": 120}
    cost = record_level.epsilon([event], DELTA)
    folder = tmp_path / "run"
    run = make_run("federated-dp", parties=sizes, epsilon=cost, rounds=3)
    spent = {
        name: dataclasses.replace(spent, epsilon=cost, delta=DELTA, steps=30) for name, spent in run.info.spent.items()
    }
    privacy = {"epsilon": cost * 1.01, "delta": DELTA, "max_grad_norm": 1.0, "epochs": 1}
    make_run(
        "federated-dp", parties=sizes, rounds=3, history=run.history, spent=spent, privacy=privacy
    ).save(folder)  # fmt: skip
    (folder / "ledger").mkdir()
    for name in sizes:
        ledger = Ledger(folder / "ledger" / f"{name}.jsonl", holder=name)
        ledger.bind(name, DELTA)
        ledger.append(event, after=0)
    return Run.load(folder)


@pytest.mark.parametrize(
    ("broken", "value"),
    [
        ("epsilon_by_dp_accounting", 3.0),
        ("epsilon_rdp", 1.0),
        ("epsilon", None),
        ("epsilon_by_prv", (1.0, 2.0)),
        ("epsilon_by_prv", (20.0, 21.0)),
    ],
)
def test_an_accountant_that_disagrees_is_found(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, broken: str, value: Any
) -> None:
    run = record_run(tmp_path, make_run)

    def wrong(*_: Any, **__: Any) -> Any:
        if value is None:
            raise AccountingError("one is wrong")
        return value

    monkeypatch.setattr(record_level if hasattr(record_level, broken) else other_accountants, broken, wrong)
    assert {row.verdict for row in accountants_of(run)} == {"unverified"}


def test_a_single_changed_character_of_a_ledger_is_found(tmp_path: Path, make_run: MakeRun) -> None:
    run = record_run(tmp_path, make_run)
    path = tmp_path / "run" / "ledger" / "a.jsonl"
    path.write_text(path.read_text().replace('"noise_multiplier":1.0', '"noise_multiplier":9.0'))
    with pytest.raises(LedgerError, match="chain of hashes"):
        audit(run)


def test_client_level_with_dropouts_is_counted_by_who_survived(job: Any, tmp_path: Path) -> None:
    federate(
        **job, privacy=promise(), secure_sum=Masked(min_survivors=5, corrupt=1, dropouts=3), dropout_rate=0.2,
        out=tmp_path / "run", seed=1,
    )  # fmt: skip
    report = audit(tmp_path / "run")
    part = report.participation
    assert part is not None
    assert part.realised == sum(entry.survivors for entry in Run.load(tmp_path / "run").history)
    assert (part.planned, part.parties, part.completed) == (16, 8, 2)
    assert part.realised < part.planned
    assert part.claimed_minimum == 5
    assert finding(report, "Noise was counted")[0] == "holds"
    assert finding(report, "fewer parties")[0] == "holds"
    assert part.epsilon_realised == pytest.approx(report.budgets[0].recomputed)
    row = report.accountants[0]
    assert row.floor is not None
    assert row.rdp is not None
    assert row.floor < row.rdp < 1.3 * row.floor


@pytest.mark.parametrize(
    ("noise", "edited"),
    [("distributed", "local"), ("distributed", "central"), ("distributed", "server"), ("central", "distributed"),
     ("central", "local"), ("local", "central")],
)  # fmt: skip
def test_noise_that_is_said_to_be_added_elsewhere_is_found(job: Any, tmp_path: Path, noise: str, edited: str) -> None:
    federate(**job, privacy=promise(noise=noise), out=tmp_path / "run")
    names = [check.name for check in audit(tmp_path / "run").checks]
    assert not any("noise is added where" in name for name in names)
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    content["privacy"]["noise"] = edited
    path.write_text(json.dumps(content))
    report = audit(tmp_path / "run")
    assert (report.verdict, report.exit_code) == ("violated", 1)
    assert "the ledger was charged for" in finding(report, "noise is added where")[1]


def test_central_noise_has_an_exact_cost(job: Any, tmp_path: Path) -> None:
    federate(**job, privacy=promise(noise="central", min_survivors=None), out=tmp_path / "run")
    row = audit(tmp_path / "run").accountants[0]
    assert row.pld == pytest.approx(row.floor, rel=1e-3)
    assert row.verdict == "holds"


def test_noise_calibrated_for_all_with_half_of_them_gone_is_caught(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer charges, and draws, shares for eight clients, whoever is there."""
    decode = client.ClientRound.decode
    monkeypatch.setattr(
        client.ClientRound, "decode", lambda self, total, *_: decode(self, total, self._engine.clients)
    )  # fmt: skip
    monkeypatch.setattr(codecs.ClientCodec, "begin", lambda it, *_: setattr(it, "_round", it._privacy_engine.begin()))
    federate(
        **job, privacy=promise(min_survivors=8), secure_sum=Plain(), dropout_rate=0.5, out=tmp_path / "run", seed=3
    )  # fmt: skip
    report = audit(tmp_path / "run")
    assert (report.verdict, report.exit_code) == ("violated", 1)
    verdict, said = finding(report, "Noise was counted")
    assert verdict == "violated"
    assert "7 noise shares" in said
    part = report.participation
    assert part is not None
    assert part.epsilon_realised is not None
    assert part.epsilon_realised > 20.0
    assert finding(report, "fewer parties")[0] == "violated"
    assert [row.verdict for row in report.budgets] == ["holds"]  # the ledger alone shows nothing


def test_survivors_below_the_secure_sums_minimum_are_caught(make_run: MakeRun) -> None:
    run = make_run("federated-masked", secure_sum={"name": "masked", "min_survivors": 6})
    history = [msgspec.structs.replace(entry, survivors=5 if entry.round == 3 else 6) for entry in run.history]
    verdict, said = finding(audit(dataclasses.replace(run, history=tuple(history))), "fewer parties")
    assert verdict == "violated"
    assert "Round 3 has 5 of 10" in said


def test_a_ledger_that_also_holds_a_round_that_was_cut_short_is_no_alarm(job: Any, tmp_path: Path) -> None:
    federate(**job, privacy=promise(min_survivors=8), out=tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / "ledger" / "clients.jsonl")
    ledger.bind("clients", DELTA, unit="client")
    releases = ledger.releases
    ledger.append(releases[-1], after=len(releases))
    assert finding(audit(tmp_path / "run"), "Noise was counted")[0] == "holds"


def test_an_audit_with_all_of_this_survives_json(job: Any, tmp_path: Path) -> None:
    federate(**job, privacy=promise(), secure_sum=Masked(min_survivors=5, corrupt=1, dropouts=1), out=tmp_path / "run")
    report = audit(tmp_path / "run")
    saved = report.save(tmp_path / "report.json")
    assert Audit.load(saved) == report
    assert json.loads(saved.read_text())["accountants"][0]["head"] == report.accountants[0].head
    words = report.save(tmp_path / "report.html").read_text("utf-8")
    for needed in ("Several accountants", "Planned and realised participation", report.accountants[0].head[:16]):
        assert needed in words


def test_a_private_search_has_a_phase_and_the_renyi_bound_of_two_programs(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = PoissonSampledGaussian(sample_rate=0.1, noise_multiplier=2.0, steps=10)
    run = record_run(tmp_path, make_run)
    path = tmp_path / "run" / "ledger" / "a.jsonl"
    ledger = Ledger(path)
    ledger.bind("a", DELTA)
    ledger.append(Search(tries=(event,), mean=3.0), after=1)
    row = accountants_of(run)[0]
    assert (row.pld, row.prv_low, row.verdict) == (None, None, "holds")
    assert row.rdp == pytest.approx(row.dp_accounting, rel=1e-6)
    assert [phase.mechanism.split()[0] for phase in row.phases] == ["Poisson-sampled", "search"]
    report = audit(run)  # the search was never claimed
    assert report.budgets[0].verdict == "violated"
    monkeypatch.setattr(renyi, "best_of", lambda search, orders, curve: 1.5 * curve)
    assert accountants_of(run)[0].verdict == "unverified"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (3.0, 3.0, "holds"),
        (3.0, None, "holds"),
        (3.0, 3.001, "unverified"),
        (3.0, math.inf, "unverified"),
        (math.inf, 3.0, "unverified"),
        (math.inf, math.inf, "unverified"),
        (math.nan, 3.0, "unverified"),
    ],
)
def test_two_bounds_of_a_search_are_the_same_or_nothing_is_verified(
    ours: float, theirs: float | None, verdict: str
) -> None:
    assert accountants._searches_agree(ours, theirs)[0] == verdict


def clients_with(mechanism: Any, deviation: float) -> Ledger:
    """One sum of clients' vectors, its noise so many clipping norms."""
    ledger = Ledger(holder="clients")
    ledger.bind("clients", DELTA, unit="client")
    variance = float(deviation**2)
    ledger.append(
        ClientRelease(mechanism=mechanism, sensitivity_squared=1, share_variance=variance, shares=1, length=1), after=0
    )
    return ledger


@pytest.mark.parametrize(
    ("mechanism", "above", "verdict"),
    [
        *(("gaussian", above, "holds") for above in (-1.05e-3, 0.0, 1.05e-3)),  # a thousandth, and 1e-4 of about 1
        *(("gaussian", above, "unverified") for above in (-1.15e-3, 1.15e-3, math.inf)),
        *(("skellam", above, "holds") for above in (-1.05e-3, 0.5)),
        *(("skellam", above, "unverified") for above in (-1.15e-3, math.nan)),
    ],
)
def test_a_bound_of_clients_below_the_exact_cost_or_beside_it_is_found(
    monkeypatch: pytest.MonkeyPatch, mechanism: Any, above: float, verdict: str
) -> None:
    """The exact cost of Gaussian noise is known; integer noise may cost more, and not less."""
    ledger = clients_with(mechanism, 2.6)
    floor = accountants._of_clients("clients", ledger, DELTA).floor
    assert floor is not None
    assert 0.9 < floor < 1.1
    monkeypatch.setattr(client_level, "epsilon", lambda *_: floor * (1.0 + above))
    assert accountants._of_clients("clients", ledger, DELTA).verdict == verdict


@pytest.mark.parametrize("mechanism", ["gaussian", "discrete_gaussian"])
@pytest.mark.parametrize("deviation", [100, 10**6], ids=["little", "nothing at this delta"])
def test_a_cost_of_clients_near_nothing_agrees_within_rounding(mechanism: Any, deviation: int) -> None:
    row = accountants._of_clients("clients", clients_with(mechanism, deviation), DELTA)
    assert row.floor is not None
    assert row.floor < 0.02
    assert row.verdict == "holds"
    assert ("%" in row.finding) == (row.floor > 0.0) == (deviation == 100)  # nothing has no share


def test_sums_of_shares_are_said_to_be_that() -> None:
    from choral.audits.budgets.phases import phases_of
    from choral.privacy import Ledger, PoissonSampledShares

    step = PoissonSampledShares(
        sample_rate=0.05, share=1.06, honest=8, parties=10, deviation=8.5, length=9, stretch=0.0, failure=1e-12, steps=1
    )  # fmt: skip
    ledger = Ledger()
    ledger.bind("north", 1e-5)
    for place in range(3):
        ledger.append(step, after=place)
    (phase,) = phases_of(ledger)
    assert (phase.mechanism, phase.steps, phase.first, phase.last) == (
        "Poisson-sampled Gaussian in shares, 8 unknown", 3, 1, 3
    )  # fmt: skip
    assert phase.noise_multiplier == step.noise_multiplier
    row = accountants._of_records("north", ledger, 1e-5)
    assert row.verdict == "holds"
    assert row.steps == 3
    assert None not in (row.pld, row.dp_accounting, row.prv_low, row.rdp)
