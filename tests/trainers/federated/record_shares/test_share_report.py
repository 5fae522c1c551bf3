"""The first sentence of a comparison with noise in shares: what they gained, in which worst case, against whom."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from torch import nn

from choral import Keep, Masked, Participation, Plain, Privacy, centralize, compare, federate
from choral.audits.comparison.shares_trust import shares_trust
from choral.audits.report.html import lead
from choral.audits.report.markdown import comparison_markdown
from choral.audits.report.shares_gain import shares_gain
from choral.privacy import Ledger
from choral.privacy.accounting import record_level
from choral.trainers import FedSGD, Run, Task
from choral.trainers.federated.participation import Dropouts

STEPS = FedSGD(batch_size=40, steps_per_round=3)
MASKED = Masked(corrupt=1, dropouts=1, min_survivors=4)
Make = Callable[..., Task]


def fit(model: Any, optimizer: Any, loader: Any) -> None:
    for batch, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()


def in_shares(task: Make, out: Path, **changes: Any) -> Run:
    promise = Privacy(4.0, 1e-4, noise="distributed")
    given: dict[str, Any] = {"secure_sum": MASKED, "participation": None, "privacy": promise} | changes
    return federate(task(), rounds=2, algorithm=STEPS, keep=Keep(out=out), **given)


def own(task: Make, out: Path) -> Run:
    return federate(task(fit=fit), rounds=2, privacy=Privacy(4.0, 1e-4), secure_sum=Masked(), keep=Keep(out=out))


def test_the_report_begins_with_what_shares_gained_and_under_which_trust(task: Make, tmp_path: Path) -> None:
    shares, other = in_shares(task, tmp_path / "shares"), own(task, tmp_path / "own")
    cloud = centralize(task(fit=fit), rounds=2, privacy=Privacy(4.0, 1e-4), keep=Keep(out=tmp_path / "cloud"))
    report = compare({"cloud-dp": cloud, "own": other, "shares": shares})
    gain = shares_gain(report)
    for words in (
        "Noise in shares reaches",
        "(shares), where each party's own noise reaches",
        "(own), and",
        "with a cloud that is trusted with all records",
        "gained, with nobody who is trusted with records or vectors, under the secure sum, if any 3 honest parties of 5"
        " do: 4 are left in each sum and one of the parties colludes",
        "in that worst case, and realised ε",
        "which holds only if who drops out does not depend on what was released",
    ):
        assert words in gain, gain
    assert lead(report).startswith(gain)
    assert gain.split(" (shares)")[0] in comparison_markdown(report).split("\n\n")[1]
    said = io.StringIO()
    report.print(Console(file=said, width=10_000))
    assert gain in said.getvalue()
    path = report.save(tmp_path / "compare.json")
    assert shares_gain(type(report).load(path)) == gain


def test_the_realised_figure_is_of_who_survived_and_never_above_the_promise(task: Make, tmp_path: Path) -> None:
    """All five, of which four are not colluders; and the promise's own figure where the fewest survived."""
    run = in_shares(task, tmp_path / "run")
    trust = shares_trust([run])
    assert trust is not None
    assert (trust.honest, trust.colluders, trust.min_survivors, trust.secure_sum) == (3, 1, 4, "masked")
    event = Ledger(tmp_path / "run" / "ledger" / "north.jsonl", holder="north").events[0]
    known = record_level.epsilon([msgspec.structs.replace(event, honest=4, steps=6)], 1e-4)
    assert trust.realised == pytest.approx(known)
    assert known < run.info.spent["north"].epsilon - 0.2
    lost = Participation(dropouts=Dropouts(vector=0.15), patience=9)
    fewer = in_shares(task, tmp_path / "fewer", participation=lost)
    opened = [entry for entry in fewer.history if entry.round and not entry.failed]
    trust = shares_trust([fewer])
    assert trust is not None
    assert trust.realised is not None
    assert trust.realised <= fewer.info.spent["north"].epsilon + 1e-9
    if opened and all(entry.survivors == 4 for entry in opened):
        assert trust.realised == pytest.approx(fewer.info.spent["north"].epsilon)


def test_nothing_is_gained_by_survivors_whom_nobody_confirmed(task: Make, tmp_path: Path) -> None:
    """In two trips all five may be said to have survived, and four are in the sum for certain."""
    run = in_shares(task, tmp_path / "run", secure_sum=replace(MASKED, trips=2))
    assert [entry.survivors for entry in run.history if entry.round] == [5, 5]
    trust = shares_trust([run])
    assert trust is not None
    assert (trust.honest, trust.min_survivors) == (3, 4)
    assert trust.realised == pytest.approx(run.info.spent["north"].epsilon)


def test_the_realised_figure_is_for_the_neighbours_that_are_promised(task: Make, tmp_path: Path) -> None:
    """One record replaced costs more than one zeroed out, and so does what was realised."""
    promise = Privacy(4.0, 1e-4, noise="distributed", neighbours="replace one record")
    run = in_shares(task, tmp_path / "run", privacy=promise)
    ledger = Ledger(tmp_path / "run" / "ledger" / "north.jsonl", holder="north")
    events = [msgspec.structs.replace(ledger.events[0], honest=4, steps=6)]
    known = record_level.epsilon(events, 1e-4, neighbours="replace one record")
    assert known > record_level.epsilon(events, 1e-4) + 0.5
    trust = shares_trust([run])
    assert trust is not None
    assert trust.realised == pytest.approx(known)


def test_a_plain_sum_is_said_to_trust_its_server(task: Make, tmp_path: Path) -> None:
    shares, other = in_shares(task, tmp_path / "shares", secure_sum=Plain()), own(task, tmp_path / "own")
    gain = shares_gain(compare({"own": other, "shares": shares}))
    assert "with a server that is trusted with every party's vector, and against outsiders" in gain
    assert "nobody who is trusted" not in gain
    assert "cloud" not in gain


def test_without_shares_or_what_they_are_compared_with_nothing_is_said(task: Make, tmp_path: Path) -> None:
    shares, other = in_shares(task, tmp_path / "shares"), own(task, tmp_path / "own")
    assert shares_gain(compare({"a": other, "b": other})) == ""
    assert shares_gain(compare({"shares": shares, "b": shares})) == ""
    assert shares_trust([other]) is None


def test_a_damaged_ledger_gives_no_realised_figure(task: Make, tmp_path: Path) -> None:
    run = in_shares(task, tmp_path / "run")
    path = tmp_path / "run" / "ledger" / "north.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"honest":3', b'"honest":4', 1))
    trust = shares_trust([run])
    assert trust is not None
    assert trust.realised is None


def test_a_ledger_with_another_jobs_steps_gives_no_realised_figure(task: Make, tmp_path: Path) -> None:
    run = in_shares(task, tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / "ledger" / "north.jsonl", holder="north")
    ledger.bind("north", 1e-4)
    other = msgspec.structs.replace(ledger.events[0], share=ledger.events[0].share * 2, steps=1)
    ledger.append(other, after=len(ledger.events))
    trust = shares_trust([run])
    assert trust is not None
    assert trust.realised is None
