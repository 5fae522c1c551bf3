"""What a run with noise in shares says of itself, and what the audit finds where its books were edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from choral import Keep, Masked, Plain, Privacy, audit, federate
from choral.audits import Audit
from choral.privacy import Ledger
from choral.privacy.accounting.other_accountants import epsilon_by_dp_accounting
from choral.trainers import FedSGD, Task

PROMISE = Privacy(4.0, 1e-4, noise="distributed", max_grad_norm=0.5)
STEPS = FedSGD(batch_size=40, steps_per_round=3)
Make = Callable[..., Task]


def trained(task: Task, out: Path, secure_sum: Any = None) -> Path:
    made = secure_sum or Masked(corrupt=1, dropouts=1, min_survivors=4)
    federate(task, rounds=2, algorithm=STEPS, privacy=PROMISE, secure_sum=made, keep=Keep(out=out))
    return out


def edited(out: Path, **changes: Any) -> Audit:
    info = json.loads((out / "run.json").read_bytes())
    for key, value in changes.items():
        if value is None:
            del info["privacy"][key]
        else:
            info["privacy"][key] = value
    (out / "run.json").write_text(json.dumps(info))
    return audit(out)


def test_the_claim_names_record_neighbours_adversary_worst_case_and_what_it_rests_on(
    task: Make, tmp_path: Path
) -> None:
    found = audit(trained(task(), tmp_path / "run"))
    assert found.verdict == "holds"
    for words in (
        "differentially private for each record: datasets are neighbours by “zero out one record”",
        "anyone who sees every opened sum and every model of the training, the server included, together with up to 1"
        " of the other parties",
        "a sum opened over 4 parties of which 3 are honest, whoever dropped out",
        "A step that was tried again is counted again",
        "rests on the secure sum: on the computational assumptions that it states, and on 2^-40 for each sum, which is"
        " within δ",
        "the time of a party's answers",
        "no answer waits for a fixed time; every step of every party is padded to",
    ):
        assert words in found.claim
    assert "adds its own noise before anything leaves" not in found.claim
    info = json.loads((tmp_path / "run" / "run.json").read_bytes())
    promised = {"noise": "distributed", "colluders": 1, "min_survivors": 4, "epsilon": 4.0, "max_grad_norm": 0.5}
    assert info["privacy"].items() >= promised.items()
    assert "epochs" not in info["privacy"]
    assert info["algorithm"]["batch_size"] == 40
    assert info["fixed_point"]["noise_multiplier"] > 0
    assert f"padded to {info['fixed_point']['rows']} rows, the most that one may draw" in found.claim
    assert any(check.finding == "30 steps, each for 3 unknown shares." for check in found.checks)


def test_a_run_that_does_not_say_how_many_rows_its_steps_had_claims_none(task: Make, tmp_path: Path) -> None:
    out = trained(task(), tmp_path / "run")
    info = json.loads((out / "run.json").read_bytes())
    del info["fixed_point"]["rows"]
    (out / "run.json").write_text(json.dumps(info))
    assert "nothing here says how that was kept from it" in audit(out).claim


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_rate": 0.125}, "charged for the rate 0.125, and run.json says 0.25"),
        ({"share": 9.0}, "charged for shares of 9 clipping norms, and run.json says"),
    ],
)
def test_a_ledger_of_cheaper_steps_than_were_made_is_found(
    changes: dict[str, float], said: str, task: Make, tmp_path: Path
) -> None:
    """A chain of its own, that costs less: of the same steps at a smaller rate, or with more noise."""
    for path in (trained(task(), tmp_path / "run") / "ledger").iterdir():
        events, name = Ledger(path).events, str(Ledger(path).holder)
        path.unlink()
        ledger = Ledger(path, holder=name)
        ledger.bind(name, PROMISE.delta)
        for after, event in enumerate(events):
            ledger.append(msgspec.structs.replace(event, **changes), after=after)
    (check,) = [each for each in audit(tmp_path / "run").checks if each.name.startswith("Noise in shares is counted")]
    assert check.verdict == "violated"
    assert said in check.finding


def test_without_ledgers_nothing_is_said_of_how_shares_were_counted(task: Make, tmp_path: Path) -> None:
    shutil.rmtree(trained(task(), tmp_path / "run") / "ledger")
    found = audit(tmp_path / "run")
    assert found.checks[0].verdict == "unverified"
    assert found.verdict == "violated"  # the manifest that the parties signed has ledgers
    assert not any("Noise in shares" in check.name for check in found.checks)


def test_a_plain_sum_claims_for_outsiders_only(task: Make, tmp_path: Path) -> None:
    found = audit(trained(task(), tmp_path / "run", Plain()))
    assert found.verdict == "holds"
    assert "holds against outsiders, who see every model of the training" in found.claim
    assert "the server is not among them" in found.claim
    assert "The server sees each party's gradients with a share of the noise alone" in found.claim
    assert "the server included" not in found.claim
    assert "3 parties of which 2 are honest" in found.claim  # a majority of five, where nothing was said


def test_the_price_is_the_ledgers_and_agrees_with_another_accountant(task: Make, tmp_path: Path) -> None:
    found = audit(trained(task(), tmp_path / "run"))
    events = Ledger(tmp_path / "run" / "ledger" / "north.jsonl", holder="north").events
    assert sum(event.steps for event in events) == 6
    known = epsilon_by_dp_accounting(events, 1e-4)
    row = next(row for row in found.budgets if row.holder == "north")
    assert row.recomputed == pytest.approx(known, rel=2e-3)
    assert 3.9 < known <= 4.0
    assert row.guarantee == pytest.approx(row.recomputed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": None}, "charged for noise in shares, and run.json does not say so"),
        ({"min_survivors": 5}, "charged for 3 unknown shares, and 4 are promised"),
        ({"colluders": 2}, "charged for 3 unknown shares, and 2 are promised"),
        ({"min_survivors": 5, "colluders": 2}, "colluders = 2 is promised, and the secure sum has corrupt = 1"),
        ({"min_survivors": 5, "colluders": 2}, "min_survivors = 5 is promised, and the secure sum has min_"),
    ],
)
def test_a_claim_of_more_than_was_charged_for_is_found(
    task: Make, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    found = edited(trained(task(), tmp_path / "run"), **changes)
    assert found.verdict == "violated"
    assert any(words in check.finding for check in found.checks if check.verdict == "violated")


def test_sums_of_more_parties_than_were_charged_for_are_found(task: Make, tmp_path: Path) -> None:
    """Each party's rounding is in the price: a sixth one's was not paid for."""
    out = trained(task(), tmp_path / "run")
    info = json.loads((out / "run.json").read_bytes())
    info["parties"]["sixth"] = 20
    (out / "run.json").write_text(json.dumps(info))
    found = audit(out)
    assert any("charged for sums of 5 parties, of 6" in check.finding for check in found.checks)


def test_shares_said_of_noise_that_was_none_are_found(task: Make, tmp_path: Path) -> None:
    out = tmp_path / "run"
    own = Privacy(4.0, 1e-3, epochs=1)
    federate(task(fit=_fit), rounds=1, privacy=own, secure_sum=Masked(), keep=Keep(out=out))
    found = edited(out, noise="distributed", min_survivors=4, colluders=1)
    assert any("noise of another kind" in check.finding for check in found.checks if check.verdict == "violated")


def _fit(model: Any, optimizer: Any, loader: Any) -> None:
    from torch.nn.functional import cross_entropy

    for batch, target in loader:
        optimizer.zero_grad()
        cross_entropy(model(batch), target).backward()
        optimizer.step()
