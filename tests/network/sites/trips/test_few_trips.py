"""Jobs with sites whose sums take two and three trips; between the sites and the coordinator are function calls."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from site_federation import ALGORITHMS, Direct, Federation, algorithm, private_sites, rehearsed, same_weights, served
from site_rounds import InRound, a_job

from choral.audits import audit
from choral.cli.command_line import main
from choral.errors import ConfigError
from choral.jobs.settings import PrivacySettings, Settings, SumSettings
from choral.network.errors import PeerLostError
from choral.network.host.messages import StepTaken, read_reply
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.masking import messages
from choral.protocols.masking.ahead import messages as ahead
from choral.protocols.wire_format import read
from choral.trainers import Participation, Run
from choral.trainers.run_folder.evidence.receipts import read as receipts_in
from choral.trainers.task.settings import Training

TRIPS = [2, 3]
MESSAGES = [(2, 0), (2, 1), *(pytest.param(3, place, marks=pytest.mark.slow) for place in range(3))]
"""Trips, and the place of a message among those to a site in a round that it has dealt for."""


@pytest.fixture(scope="module")
def open_sites(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("open"))


def in_trips(federation: Federation, job: str, trips: Any, **changed: Any) -> Settings:
    return a_job(federation, job, secure_sum=SumSettings(trips=trips), **changed)


class Sent(Direct):
    """What every site sent of each round of each session, by kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sent: dict[tuple[Any, ...], set[bytes]] = defaultdict(set)

    def _one(self, name: str, raw: bytes, limit: int) -> Any:
        reply = super()._one(name, raw, limit)
        if isinstance(reply, memoryview) and isinstance(taken := read_reply(reply, limit=limit), StepTaken):
            for part in taken.parts:
                message: Any = read(ahead.ToServer, part, sender=name, limit=limit)
                self.sent[name, type(message), message.session, getattr(message, "round", 0)].add(part)
        return reply


@pytest.mark.parametrize(
    ("name", "trips"),
    [
        ("fedavg", 2),
        ("fedavg", 3),
        ("dane", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ALGORITHMS if name not in ("fedavg", "dane")),
    ],
)
def test_the_weights_are_those_of_federate_bit_by_bit(name: str, trips: Any, open_sites: Federation) -> None:
    """And of four trips; after the first round a sum is so many messages to each site."""
    settings = in_trips(open_sites, f"same-{trips}", trips, algorithm=algorithm(name, **ALGORITHMS[name]))
    settings = replace(settings, training=replace(settings.training, rounds=3))
    rounds = {number: replace(settings, training=replace(settings.training, rounds=number)) for number in (1, 3)}
    carriers = {number: Direct(open_sites) for number in rounds}
    runs = {number: served(carriers[number], rounds[number])[0] for number in rounds}
    assert [entry.survivors for entry in runs[3].history] == [0, 3, 3, 3]
    assert same_weights(runs[3], rehearsed(open_sites, settings))
    assert same_weights(runs[3], rehearsed(open_sites, replace(settings, secure_sum=SumSettings())))
    exchanges = {"fedavg": 1, "dane": 2}.get(name)
    asked = {carriers[3].asked[site] - carriers[1].asked[site] for site in open_sites.names}
    assert asked == {2 * trips * exchanges} if exchanges else min(asked) > 0


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("trips", "place"), MESSAGES)
def test_a_site_that_is_killed_at_any_message_is_in_the_next_round(
    trips: Any, place: int, late: bool, open_sites: Federation
) -> None:
    """It had dealt for the round that it was killed in, and gives no second answer with the keys of it."""
    carrier = Sent(open_sites)

    def killed() -> None:
        carrier.start("south")
        raise PeerLostError("was away for 0.5 s", peer="south")

    hook = InRound(carrier, "south", 2, place, killed, late=late)
    settings = in_trips(open_sites, f"killed-{trips}-{place}-{late}", trips)
    run, said = served(carrier, settings)
    assert hook.done
    assert "going on without south: was away for 0.5 s" in said
    assert "south is back, and goes on" in said
    in_sum = place >= 1  # its vector had come
    assert [entry.survivors for entry in run.history] == [0, 3, 3 if in_sum else 2, 3, 3]
    assert same_weights(run, rehearsed(open_sites, settings, without={} if in_sum else {2: ["south"]}))
    assert all(len(different) == 1 for different in carrier.sent.values())
    dealt = {number for site, kind, _, number in carrier.sent if (site, kind) == ("south", messages.DealtShares)}
    sent = {number for site, kind, _, number in carrier.sent if (site, kind) == ("south", messages.Upload)}
    assert dealt >= sent
    assert len({session for _, _, session, number in carrier.sent if number}) == 1  # none was opened anew


@pytest.mark.parametrize(("trips", "place"), MESSAGES)
def test_a_coordinator_that_is_stopped_at_any_message_goes_on(
    trips: Any, place: int, open_sites: Federation, tmp_path: Path
) -> None:
    class Stopped(BaseException):
        pass

    def stop() -> None:
        raise Stopped

    carrier = Sent(open_sites)
    settings = in_trips(open_sites, f"stopped-{trips}-{place}", trips)
    InRound(carrier, "east", 2, place, stop)
    with pytest.raises(Stopped):
        served(carrier, settings, out=tmp_path / "run")
    carrier.before = None
    with pytest.raises(ConfigError, match=f"trips was {trips}, now it is not set"):
        served(carrier, replace(settings, secure_sum=SumSettings()), out=tmp_path / "run", resume=True)
    run, said = served(carrier, settings, out=tmp_path / "run", resume=True)
    assert [entry.survivors for entry in run.history] == [0, 3, 0, 3, 3]
    assert said[0] == "round 2 was interrupted, and is given up: sites may have trained for it"
    assert all(len(different) == 1 for different in carrier.sent.values())
    given_up = a_job(open_sites, "", participation=Participation(patience=1))
    assert same_weights(run, rehearsed(open_sites, given_up, without={2: ["north", "south"]}))


@pytest.mark.parametrize("trips", TRIPS)
def test_a_site_that_is_away_for_a_round_is_in_the_one_after(trips: Any, open_sites: Federation) -> None:
    """What it had dealt for the round is of no use to anybody: all deal anew, without it, and then with it."""
    carrier = Sent(open_sites)
    hooks: list[InRound] = []

    def leave() -> None:
        carrier.stop("south")
        hooks.append(InRound(carrier, "north", 3, 1, carrier.gone.clear))
        raise PeerLostError("was away for 0.5 s", peer="south")

    hooks.append(InRound(carrier, "south", 2, 0, leave))
    settings = in_trips(open_sites, f"away-{trips}", trips)
    settings = replace(settings, serve=replace(settings.serve, quorum=2, wait=0.2))
    run, _ = served(carrier, settings)
    assert [hook.done for hook in hooks] == [True, True]
    assert [entry.survivors for entry in run.history] == [0, 3, 2, 2, 3]
    assert same_weights(run, rehearsed(open_sites, settings, without={2: ["south"], 3: ["south"]}))
    assert all(len(different) == 1 for different in carrier.sent.values())


@pytest.mark.parametrize("trips", TRIPS)
def test_what_sites_sign_of_a_run_is_verified(trips: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In two trips no receipt names the survivors, since nobody signs them; what a site was told stands in it."""
    federation = private_sites(tmp_path, "record")
    settings = federation.settings(
        privacy=PrivacySettings(epsilon=4.0, delta=1e-3),
        secure_sum=SumSettings(trips=trips),
        training=Training(rounds=2, batch_size=8, learning_rate=0.1),
    )
    run, _ = served(Direct(federation), settings, out=tmp_path / "run")
    stated = run.info.secure_sum
    assert stated is not None
    assert (stated["trips"], stated["honest_floor"], stated["min_survivors"]) == (trips, 2, 2)
    files = [next((tmp_path / name / "receipts").glob("*.jsonl")) for name in federation.names]
    said = [content for file in files for content, _ in receipts_in(file) if content["kind"] == "round"]
    assert len(said) == 6
    for each in (each for content in said for each in content["sums"]):
        assert (each["in_sum"], each["vector"], len(each["roster"])) == (True, True, 3)
        assert each["dropped"] == (None if trips == 2 else [])
        assert bool(each["signatures"]) is (trips == 3)
    assert main(["verify", *map(str, files), str(tmp_path / "run" / "manifest.json")]) == 0
    told = capsys.readouterr().out
    assert len(re.findall("fedavg, on the coordinator's word alone", told)) == (6 if trips == 2 else 0)
    assert main(["verify", str(tmp_path / "run")]) == 0
    found = audit(Run.load(tmp_path / "run"))
    assert {check.verdict for check in found.checks if "signed" in check.name} == {"holds"}
    assert not [check for check in found.checks if check.verdict == "violated"]
    found.save(tmp_path / "audit.html")
    assert ("nobody confirms who is in it" in (tmp_path / "audit.html").read_text()) is (trips == 2)


def test_noise_that_sites_share_is_paid_for_by_the_floor(tmp_path: Path) -> None:
    """Two of three sites are in a sum of two trips for certain, whoever is said to have survived."""
    spent = {}
    for trips in (4, 2):
        federation = private_sites(tmp_path / str(trips), "client")
        for site in federation.names:
            federation.configure(site, ("delta = 1e-3", "delta = 0.2"))
        noise = {"noise": "distributed", "colluders": 0, "min_survivors": 2}
        settings = federation.settings(
            privacy=PrivacySettings(epsilon=4.0, delta=0.2, unit="client", **noise),
            secure_sum=SumSettings(min_survivors=2, trips=trips),
            training=Training(rounds=2, batch_size=8, learning_rate=0.1),
        )
        run, _ = served(Direct(federation), settings, out=tmp_path / str(trips) / "run")
        assert [entry.survivors for entry in run.history] == [0, 3, 3]
        spent[trips] = run.info.spent["clients"].epsilon
        assert audit(Run.load(tmp_path / str(trips) / "run")).verdict == "holds"
    assert spent[2] > 1.1 * spent[4]


def test_a_session_of_fewer_sites_is_not_opened_over_fewer_than_is_stated(tmp_path: Path) -> None:
    """Of seven, at worst six are in a sum, and so it is stated; of six who are there it would be five."""
    names = tuple(f"s{place}" for place in range(7))
    federation = Federation(tmp_path, names=names)
    carrier = Direct(federation)
    carrier.stop("s6")
    settings = in_trips(federation, "fewer", 2, participation=Participation(patience=1))
    settings = replace(
        settings,
        secure_sum=replace(settings.secure_sum, corrupt=0, dropouts=1),
        serve=replace(settings.serve, quorum=2, wait=0.2),
        training=replace(settings.training, rounds=2),
    )
    with pytest.raises(TooFewSurvivorsError, match="of the 6 sites that are there may be over 5, and 6 are stated"):
        served(carrier, settings)
    stated = replace(settings, secure_sum=replace(settings.secure_sum, min_survivors=5))
    run, _ = served(carrier, replace(stated, serve=replace(stated.serve, job="stated")))
    assert [entry.survivors for entry in run.history] == [0, 6, 6]
    assert (run.info.secure_sum or {})["min_survivors"] == 5
