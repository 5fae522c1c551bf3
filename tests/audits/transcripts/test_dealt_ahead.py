"""Transcripts of sums in two and three trips: their messages are read, their survivors and masks are looked at.

No false alarm fails a test here: of the two statistical checks it is asked that they were made, of the others what
they found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from flat_arguments import federate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, audit
from choral.audits.transcripts.recorded_sums import RecordedSession, decode, recorded_sessions
from choral.audits.transcripts.transcript_audit import _survivors, transcript_audit
from choral.protocols.masking import messages
from choral.protocols.masking.ahead.messages import AheadSetup, SignedRoster, SignedSurvivors
from choral.trainers import Run
from choral.trainers.run_folder.transcript import Recorded

torch.set_num_threads(1)
STATISTICAL = {"No mask was used twice", "No message says anything of a single party's vector"}


def made(folder: Path, trips: Any, detail: Any) -> Run:
    """Five parties, four rounds, in one of which a party is missing."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(5 * 8, 40, generator=generator)
    parties = {f"p{i}": TensorDataset(points[8 * i : 8 * i + 8], points[8 * i : 8 * i + 8, 0]) for i in range(5)}

    def build(dataset: TensorDataset) -> Any:
        model = nn.Linear(40, 8)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=8)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, round: int) -> None:
        for batch, target in loader:
            if round == 2 and torch.equal(batch, parties["p3"].tensors[0][: len(batch)]):
                raise RuntimeError("away")
            optimizer.zero_grad()
            (model(batch).mean(1) - target).square().mean().backward()
            optimizer.step()

    def steady(dataset: TensorDataset) -> Any:
        model, optimizer, _ = build(dataset)
        return model, optimizer, DataLoader(dataset, batch_size=8, shuffle=False)

    given: Mapping[str, Any] = {"build": steady, "fit": fit, "evaluate": lambda model: 0.5, "parties": parties}
    return federate(
        **given, rounds=4, secure_sum=Masked(corrupt=1, dropouts=1, trips=trips), transcript=detail, out=folder
    )


@pytest.fixture(scope="module", params=[2, 3])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("run") / "run", request.param, "rehearsal")


def trips_of(run: Run) -> int:
    return int((run.info.secure_sum or {})["trips"])


def decoded(run: Run, *, ahead: bool = True) -> list[RecordedSession]:
    recorded = Recorded.of(run.folder)
    assert recorded is not None
    sessions = recorded_sessions(recorded)
    for session in sessions:
        decode(session, recorded, ahead=ahead)
    return sessions


def test_an_honest_run_holds(run: Run) -> None:
    assert [entry.survivors for entry in run.history] == [0, 5, 4, 5, 5]
    found = transcript_audit(run)
    assert found is not None
    verdicts = {check.name: check.verdict for check in found.checks if check.name not in STATISTICAL}
    assert set(verdicts.values()) == {"holds"}
    assert verdicts.keys() >= {
        "The messages hold nothing that is not declared",
        "The bytes that were counted are those of the messages",
        "No key, nonce, commitment or message was used twice",
        "All parties of a sum were shown the same model",
        "Everybody was told the same survivors, and enough of them",
    }
    assert {check.name for check in found.checks} >= STATISTICAL
    assert (found.unread, found.uploads, found.vectors) == (0, 19, 19)
    assert found.tests > 19 * 18 // 2
    assert audit(run).transcript is not None


def test_every_message_of_the_page_is_read(run: Run) -> None:
    (session,) = decoded(run)
    assert session.strange == []
    assert isinstance(session.setup, AheadSetup)
    two = trips_of(run) == 2
    assert len(list(session.of(SignedRoster))) == (19 if two else 0)
    assert len(list(session.of(SignedSurvivors))) == (19 if two else 0)
    assert len(list(session.of(messages.Survivors))) == (0 if two else 19)
    assert len(list(session.of(messages.Upload))) == 19


def test_they_are_declared_by_sums_in_few_trips_alone(run: Run) -> None:
    """A server of four trips that asks for less would be found."""
    strange = [said for session in decoded(run, ahead=False) for said in session.strange]
    assert any(said.startswith("round 0, down") for said in strange)
    assert any("up" in said for said in strange) is (trips_of(run) == 2)


def test_a_message_that_is_longer_than_it_may_be_is_strange(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from choral.protocols.masking.ahead import messages as dealt_ahead

    monkeypatch.setattr(dealt_ahead, "roster_limit", lambda neighbours: 60)
    monkeypatch.setattr(dealt_ahead, "survivors_limit", lambda parties: 60)
    (session,) = decoded(run)
    assert len(session.strange) == (38 if trips_of(run) == 2 else 0)


@pytest.mark.parametrize("what", ["different", "few"])
def test_other_survivors_than_were_told_or_agreed_on_are_found(what: str, run: Run) -> None:
    (session,) = decoded(run)
    assert [check.verdict for check in _survivors(run, [session])] == ["holds"]
    kind = SignedSurvivors if trips_of(run) == 2 else messages.Survivors
    places = [place for place, (_, message) in enumerate(session.decoded) if isinstance(message, kind)]
    for place in places[:1] if what == "different" else places:
        seen, message = session.decoded[place]
        session.decoded[place] = seen, msgspec.structs.replace(message, bitmap=b"\x07")
    (check,) = _survivors(run, [session])
    assert check.verdict == "violated"
    expected = "different sets of survivors" if what == "different" else "opened over 3 parties, at least 4 were agreed"
    assert expected in check.finding
