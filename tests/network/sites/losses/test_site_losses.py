"""Sites and coordinators that drop out at each message of a round, and come back; between them are function calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from site_federation import Direct, Federation, algorithm, private_sites, rehearsed, same_weights, served
from site_rounds import InRound, a_job

from choral.jobs.settings import PrivacySettings
from choral.network.coordinator.serve import Progress
from choral.network.errors import PeerLostError
from choral.network.host.messages import TakeStep, read_request
from choral.privacy import Ledger
from choral.protocols.errors import TooFewSurvivorsError
from choral.trainers import Participation, RoundRecord, Run
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.run_folder.recorder import Recorder

STEPS = range(4)  # of a round after the first, to each site: shares, vector, confirmation, unmasking


@pytest.fixture(scope="module")
def open_sites(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("open"))


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", STEPS)
def test_a_site_that_is_killed_at_any_message_is_in_the_next_round(
    place: int, late: bool, open_sites: Federation
) -> None:
    """Its process is started anew at once; the sum is over those who are in it, exactly."""
    carrier = Direct(open_sites)

    def killed() -> None:
        carrier.start("south")
        raise PeerLostError("was away for 0.5 s", peer="south")

    hook = InRound(carrier, "south", 2, place, killed, late=late)
    settings = a_job(open_sites, f"killed-{place}-{late}")
    run, said = served(carrier, settings)
    assert hook.done
    assert "going on without south: was away for 0.5 s" in said
    assert "south is back, and goes on" in said
    survivors = [entry.survivors for entry in run.history]
    in_sum = place >= 2  # its vector had come
    assert survivors == [0, 3, 3 if in_sum else 2, 3, 3]
    assert same_weights(run, rehearsed(open_sites, settings, without={} if in_sum else {2: ["south"]}))


@pytest.mark.parametrize("place", STEPS)
def test_a_coordinator_that_is_stopped_at_any_message_goes_on(
    place: int, open_sites: Federation, tmp_path: Path
) -> None:
    class Stopped(BaseException):
        pass

    def stop() -> None:
        raise Stopped

    carrier = Direct(open_sites)
    settings = a_job(open_sites, f"stopped-{place}")
    InRound(carrier, "east", 2, place, stop)
    with pytest.raises(Stopped):
        served(carrier, settings, out=tmp_path / "run")
    carrier.before = None
    run, said = served(carrier, settings, out=tmp_path / "run", resume=True)
    assert [entry.survivors for entry in run.history] == [0, 3, 0, 3, 3]
    assert run.history[2].failed == "the coordinator was stopped in this round"
    assert said[0] == "round 2 was interrupted, and is given up: sites may have trained for it"
    assert same_weights(run, Run.load(tmp_path / "run"))
    assert same_weights(
        run, rehearsed(open_sites, a_job(open_sites, "", participation=Participation(patience=1)),
                       without={2: ["north", "south"]})
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["fedavg", "scaffold"])
def test_a_round_that_fails_is_left_as_if_it_had_not_been(kind: str, open_sites: Federation) -> None:
    """What the algorithm has parties remember, too: each is told that the round came to nothing."""
    carrier = Direct(open_sites)

    def away() -> None:
        carrier.stop("north")
        carrier.stop("south")
        raise PeerLostError("was away for 0.5 s", peer="south")

    InRound(carrier, "south", 2, 1, away)
    real = carrier.wait_for

    def back(*given: Any, **options: Any) -> frozenset[str]:
        carrier.gone.clear()
        return real(*given, **options)

    carrier.wait_for = back  # type: ignore[method-assign]
    settings = a_job(open_sites, f"failed-{kind}", algorithm=algorithm(kind), participation=Participation(patience=1))
    run, _ = served(carrier, settings)
    assert [entry.survivors for entry in run.history] == [0, 3, 0, 3, 3]
    assert same_weights(run, rehearsed(open_sites, settings, without={2: ["north", "south"]}))


def test_a_run_ends_where_too_few_sites_come(open_sites: Federation) -> None:
    """No wait is without end: who is missing is said, and the run can be gone on with."""
    carrier = Direct(open_sites)
    carrier.stop("south")
    settings = a_job(open_sites, "missing")
    with pytest.raises(
        TooFewSurvivorsError, match="2 of 3 sites took the job within 1 s, 3 are needed; missing: south"
    ):
        served(carrier, settings)


def test_a_quorum_begins_without_the_rest_and_who_comes_later_joins(open_sites: Federation) -> None:
    carrier = Direct(open_sites)
    carrier.stop("south")

    def come() -> None:
        carrier.gone.clear()

    InRound(carrier, "north", 2, 2, come)
    settings = a_job(open_sites, "quorum")
    settings = replace(settings, serve=replace(settings.serve, quorum=2, wait=0.2))
    run, said = served(carrier, settings)
    assert [entry.survivors for entry in run.history] == [0, 2, 2, 3, 3]
    assert "south took the job (3 of 3)" in said
    assert same_weights(run, rehearsed(open_sites, settings, without={1: ["south"], 2: ["south"]}))


def test_every_training_is_on_the_ledger_whenever_a_site_dies(tmp_path: Path) -> None:
    """Of a private job, at each message of the round: the ledger holds as many rounds as were trained, or more."""

    federation = private_sites(tmp_path, "record")
    carrier = Direct(federation)
    ledger = tmp_path / "south" / "ledgers" / "points.jsonl"
    settings = a_job(
        federation, "ledger", privacy=PrivacySettings(epsilon=4.0, delta=1e-3, noise="local"),
        participation=Participation(patience=3),
    )  # fmt: skip
    steps = []

    def killed() -> None:
        carrier.start("south")
        steps.append(len(Ledger(ledger, holder="south").events))
        raise PeerLostError("was away for 0.5 s", peer="south")

    InRound(carrier, "south", 2, 1, killed, late=True)
    run, _ = served(carrier, settings, out=tmp_path / "run")
    assert [entry.survivors for entry in run.history] == [0, 3, 2, 3, 3]
    one = steps[0] // 2  # of a round; the second was trained, and its vector never came
    assert len(Ledger(ledger, holder="south").events) == 4 * one


def test_what_the_coordinator_goes_on_from_is_on_disk_before_what_depends_on_it(
    open_sites: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round, before any site hears of it; how its exchange ended, before the round counts as complete."""
    carrier, seen = Direct(open_sites), []
    path, add = tmp_path / "run" / "sites.json", Recorder.add

    def at_disk() -> tuple[int, set[int]]:
        kept = msgspec.json.decode(path.read_bytes(), type=Progress)
        return kept.begun, {past.number for past in kept.past.values() if past.survived}

    def before(_: str, raw: bytes) -> None:
        asked = read_request(raw, limit=1 << 30)
        if isinstance(asked, TakeStep) and asked.told:
            number = Told.read(asked.told, length=7, kept={}).number
            assert at_disk() == (number, {number - 1} if number > 1 else set())
            seen.append(("told", number))

    def complete(recorder: Recorder, entry: RoundRecord, *given: Any, **named: Any) -> None:
        if entry.round:
            assert at_disk() == (entry.round, {entry.round})
            seen.append(("complete", entry.round))
        add(recorder, entry, *given, **named)

    carrier.before = before
    monkeypatch.setattr(Recorder, "add", complete)
    served(carrier, a_job(open_sites, "on-disk"), out=tmp_path / "run")
    expected = [(what, number) for number in range(1, 5) for what in ("told", "complete")]
    assert list(dict.fromkeys(seen)) == expected
