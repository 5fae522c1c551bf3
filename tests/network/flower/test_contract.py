"""The mod and the strategy against Flower's messages: as recorded where Flower is not installed, else its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recorded_flwr
import torch
from flower_federation import (
    FLOWER,
    FlowerSites,
    NodesHere,
    arrays_of,
    client_app,
    config,
    new_model,
    rehearsed,
    same,
    socket_owner,
    started,
    trained,
)

from choral.jobs.settings import ServeSettings, SumSettings
from choral.network import make_identity
from choral.network.coordinator.engine_rounds import EngineRounds
from choral.protocols import Masked
from choral.protocols.errors import DisputedSharesError, SpecError, TooFewSurvivorsError
from choral.trainers import Participation


@pytest.mark.parametrize(("trips", "asked"), [(None, 7 + 2 + 2), (2, 7 + 2 + 2), (3, 8 + 3 + 3), (4, 8 + 4 + 4)])
def test_the_weights_are_those_of_federate_bit_by_bit(tmp_path: Path, place: Path, trips: Any, asked: int) -> None:
    """asked: requests to each site, of the offer and three rounds, and one when the job ends."""
    sites, calls, requests = FlowerSites(tmp_path, place), list[str](), list[str]()
    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites), calls), sockets)
        grid.before = lambda name, _: requests.append(name)
        result = started(sites, grid, secure_sum=SumSettings(trips=trips))
    assert {requests.count(name) for name in sites.names} == {asked + 1}
    assert same(result, rehearsed(sites.names, 3, Masked()))
    assert sorted(calls) == sorted(sites.names * 3)
    log = (tmp_path / "north" / "log.jsonl").read_text()
    assert log.count('"trained"') == 3


def test_nothing_of_one_site_passes_in_the_clear(tmp_path: Path, place: Path) -> None:
    import numpy as np

    sites = FlowerSites(tmp_path, place)
    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites)), sockets)
        result = started(sites, grid, rounds=1)
    ours = {"choral", "choral-model", "config"}
    assert all(set(content) <= ours for content in grid.seen)
    replies = [content for content in grid.seen if set(content) == {"choral"}]
    raw = b"".join(content["choral"]["bytes"].data for content in replies)
    state = new_model().state_dict()
    for name in sites.names:
        new, _ = trained(name, state)
        for values in (new["0.weight"], new["0.weight"] - state["0.weight"]):
            assert values.numpy().astype(np.float32).tobytes()[:16] not in raw
    assert b"train_loss" not in raw
    assert b"num-examples" not in raw
    assert not result.train_metrics_clientapp.get(1)


def test_a_message_that_comes_again_trains_no_second_time_and_gets_the_same_reply(tmp_path: Path, place: Path) -> None:
    sites, calls = FlowerSites(tmp_path, place), list[str]()
    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites), calls), sockets)
        grid.repeat = 2
        result = started(sites, grid, rounds=2)
    assert same(result, rehearsed(sites.names, 2, Masked()))
    assert sorted(calls) == sorted(sites.names * 2)


def test_a_second_vector_of_a_round_is_never_sent(tmp_path: Path, place: Path) -> None:
    """The engine's process hands in another vector for the same request: the reply is the first one's."""
    from choral.network.door.client import relay
    from choral.network.door.trained import Trained, handed, wanted

    sites, replies = FlowerSites(tmp_path, place), []
    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites)), sockets)

        def first(name: str, message: Any) -> None:
            request = message.content["choral"]["bytes"].data
            if name == "north" and (weights := wanted(relay(sockets[name], request))) is not None:
                for value in (0.5, 0.25):
                    vector = torch.full((len(weights) // 4,), value).numpy().tobytes()
                    replies.append(relay(sockets[name], handed(request, Trained(40, vector))))

        grid.before = first
        started(sites, grid, rounds=1)
    assert len(replies) == 2
    assert replies[0] == replies[1]
    assert len(replies[0]) > 100


@pytest.mark.parametrize("wrong", ["examples", "shape", "nan", "raises"])
def test_a_client_app_that_answers_otherwise_is_out_of_the_round(tmp_path: Path, place: Path, wrong: str) -> None:
    from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

    from choral.network.flower import secure_sum_mod

    sites = FlowerSites(tmp_path, place)
    honest, name_of = client_app(socket_owner(sites)), socket_owner(sites)

    def train(message: Any, context: Any) -> Any:
        if wrong == "raises":
            raise RuntimeError("a record of a patient")
        if wrong == "error":
            return Message(Error(8, "a record of a patient"), reply_to=message)
        arrays = {key: each.numpy() for key, each in message.content["arrays"].items()}
        if wrong == "shape":
            arrays["0.bias"] = arrays["0.bias"][:2]
        if wrong == "nan":
            arrays["0.bias"] = arrays["0.bias"] * float("nan")
        metrics = MetricRecord({"num-examples": 39 if wrong == "examples" else 40})
        record = ArrayRecord({key: Array(each) for key, each in arrays.items()})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    def app(message: Any, context: Any) -> Any:
        return secure_sum_mod(message, context, train) if name_of(context) == "north" else honest(message, context)

    with sites.doors() as sockets:
        grid = NodesHere(app, sockets)
        result = started(sites, grid, rounds=1)
    assert same(result, rehearsed(sites.names, 1, Masked(), without={1: "north"}))
    assert b"a record of a patient" not in b"".join(
        content["choral"]["bytes"].data for content in grid.seen if "choral" in content
    )


def test_a_message_without_a_request_is_answered_nothing_in_the_clear(tmp_path: Path, place: Path) -> None:
    from flwr.app import Message, RecordDict

    sites = FlowerSites(tmp_path, place)
    app = client_app(socket_owner(sites))
    for kind in ("train", "evaluate", "query"):
        message = Message(
            RecordDict({"arrays": arrays_of(new_model()), "config": config()}), dst_node_id=1, message_type=kind
        )
        reply = app(message, None)
        assert reply.has_error()
        assert reply.error.code == recorded_flwr.CODES["MOD_FAILED_PRECONDITION"]


def test_nodes_without_names_are_asked_which_part_they_are(tmp_path: Path, place: Path) -> None:
    sites = FlowerSites(tmp_path, place)
    with sites.doors() as sockets:
        for number, name in enumerate(sites.names):
            (place / str(number)).symlink_to(place / name)
        grid = NodesHere(client_app(socket_owner(sites)), sockets, named=False)
        result = started(sites, grid, rounds=1)
    assert same(result, rehearsed(sites.names, 1, Masked()))


LOST = [(2, 0, 0), (2, 1, 1), (2, 3, 1), (2, 4, 1), (2, 5, 1), (2, 6, 0), (2, 7, 2), (2, 8, 0)]
LOST += [(4, 3, 1), (4, 6, 0), (4, 7, 0), (4, 8, 2)]


@pytest.mark.parametrize(("trips", "message", "without"), LOST)
def test_a_site_that_is_lost_at_a_message_costs_its_part_of_that_round_at_most(
    tmp_path: Path, place: Path, trips: Any, message: int, without: int
) -> None:
    """East gets no reply back once: of the offer, the opening, the keys, the shares, the vector, or of what comes after
    it. without: in which round its vector is missing; 0, in none. It is in the next one."""
    sites, asked = FlowerSites(tmp_path, place), list[str]()

    def lose(name: str, _: Any) -> bool:
        asked.append(name)
        return name != "east" or asked.count("east") != message + 1

    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites)), sockets)
        grid.before = lose
        result = started(
            sites, grid, serve=ServeSettings(wait=20, step=0.4, training=0.6), secure_sum=SumSettings(trips=trips)
        )
    assert asked.count("east") > message
    assert same(result, rehearsed(sites.names, 3, Masked(), without={without: "east"}))


def test_a_job_that_nobody_approved_or_with_weaker_terms_is_refused_and_trains_nothing(
    tmp_path: Path, place: Path
) -> None:

    sites, calls = FlowerSites(tmp_path, place), list[str]()
    quick = ServeSettings(wait=0.5, step=5, training=5)
    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites), calls), sockets)
        with pytest.raises(TooFewSurvivorsError, match="refused"):
            started(sites, grid, approve=False, serve=quick)
        for name in sites.names:
            sites.federation.configure(name, *[
                ('[tasks."linear.py"]\ndata = "points"', '[tasks.flower-app]\ndata = "points"\ntrained_by = "engine"'),
                ("corrupt = 0", "corrupt = 1"), ("minimum_cohort = 2", "minimum_cohort = 3"),
            ])  # fmt: skip
        with pytest.raises(TooFewSurvivorsError, match="refused"):
            started(sites, grid, serve=quick, secure_sum=SumSettings(kind="masked", min_survivors=2))
    assert calls == []
    said = (tmp_path / "north" / "log.jsonl").read_text()
    assert "nobody approved it" in said
    replies = [content["choral"]["bytes"].data for content in grid.seen if set(content) == {"choral"}]
    assert all(b"corrupt" not in each for each in replies)


@pytest.mark.parametrize(
    "error", [DisputedSharesError("north", ["east"], survivors=1, needed=2), SpecError("something else")]
)
def test_patience_is_for_rounds_with_too_few_and_for_nothing_else(
    error: Exception, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a side lies, or the coordinator itself is wrong, the run ends; too few are waited for in the next round."""
    sites, rounds, real = FlowerSites(tmp_path, place), list[int](), EngineRounds.mean

    def mean(self: EngineRounds, number: int, weights: torch.Tensor) -> Any:
        rounds.append(number)
        if number == 1:
            raise TooFewSurvivorsError("too few", survivors=1, needed=2)
        if number == 3:
            raise error
        return real(self, number, weights)

    monkeypatch.setattr(EngineRounds, "mean", mean)
    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites), []), sockets)
        with pytest.raises(type(error)):
            started(sites, grid, rounds=4, participation=Participation(patience=3))
    assert rounds == [1, 2, 3]


def test_a_coordinator_with_another_key_reaches_no_site(tmp_path: Path, place: Path) -> None:

    sites, calls = FlowerSites(tmp_path, place), list[str]()
    (tmp_path / "coordinator" / "hub.key").unlink()
    (tmp_path / "coordinator" / "hub.crt").unlink()
    with sites.doors() as sockets:
        made = make_identity(tmp_path / "other", "hub")
        for name in ("hub.key", "hub.crt"):
            shutil.copy2(made.key_path.parent / name, tmp_path / "coordinator" / name)
        grid = NodesHere(client_app(socket_owner(sites), calls), sockets)
        with pytest.raises(TooFewSurvivorsError):
            started(sites, grid, serve=ServeSettings(wait=0.5, step=5, training=5))
    assert calls == []


@pytest.mark.skipif(not FLOWER, reason="Flower is not installed: run by `make test-engines`")
def test_what_was_recorded_is_what_flower_has() -> None:
    import inspect

    import flwr
    from flwr.common.constant import ErrorCode

    for path, names in recorded_flwr.SIGNATURES.items():
        found: Any = flwr
        for part in path.split("."):
            found = getattr(found, part)
        parameters = [name for name in inspect.signature(found).parameters if name not in ("self", "args")]
        assert tuple(parameters) == names, path
    for name, code in recorded_flwr.CODES.items():
        assert getattr(ErrorCode, name) == code


def test_the_mod_imports_the_standard_library_and_its_own_chapter_in_a_tenth_of_a_second() -> None:
    code = (
        "import sys, time; before = time.process_time(); from choral.network.flower import secure_sum_mod;"
        "spent = time.process_time() - before;"
        "print(spent, [name for name in ('torch', 'numpy', 'msgspec', 'Crypto', 'flwr', 'choral.protocols',"
        "'choral.trainers', 'choral.network.host', 'choral.network.site') if name in sys.modules])"
    )
    spent, rest = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        maxsplit=1
    )
    assert float(spent) < 0.1
    assert rest.strip() == "[]"
