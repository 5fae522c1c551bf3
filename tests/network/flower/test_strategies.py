"""What strategies make of a secure mean, what of an evaluation passes, and whole jobs of Choral over Flower."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flower_federation import (
    ACCURACY,
    FLOWER,
    FlowerSites,
    NodesHere,
    arrays_of,
    bare_app,
    client_app,
    config,
    new_model,
    rehearsed,
    same,
    socket_owner,
    started,
)
from site_doors import coordinators_folder, doors
from site_federation import Federation, approved_at, offer_for, private_sites, same_weights, toml_of
from site_federation import rehearsed as rehearsed_job

from choral.errors import ConfigError
from choral.jobs.engines.default_trips import with_trips
from choral.jobs.settings import PrivacySettings
from choral.network.site.budget import open_ledger
from choral.protocols import Masked
from choral.trainers.task.settings import Training

AVERAGING = ["FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedAdagrad", "FedYogi"]
ROUNDING = 1e-4
"""More than the encoding moves a weight in three rounds, of which FedAdam makes a hundred times as much at most."""


@pytest.mark.parametrize("promise", [False, True])
def test_whole_jobs_go_over_flower_trained_by_the_sites_processes(tmp_path: Path, place: Path, promise: bool) -> None:
    """By `serve`: the ClientApp trains nothing; promises, ledgers and the run's folder are those of `choral serve`."""
    from choral.network.flower import secure_sum_mod, serve

    federation = private_sites(tmp_path, "record") if promise else Federation(tmp_path)
    privacy = PrivacySettings(epsilon=4.0, delta=1e-3) if promise else PrivacySettings()
    settings = federation.settings(training=Training(rounds=2, batch_size=8, learning_rate=0.1), privacy=privacy)
    settings = replace(settings, serve=replace(settings.serve, job="visits"))
    job = coordinators_folder(federation) / "visits.toml"
    job.touch(0o600)
    job.write_text(toml_of(settings))
    offer = offer_for(federation, with_trips(settings, federation.names, "flower"))
    for name in federation.names:
        approved_at(federation, name, offer)

    def trains_nothing(message: Any, context: Any) -> Any:
        raise AssertionError("the site's process trains")

    with doors(federation, place) as sockets:
        grid = NodesHere(lambda message, context: secure_sum_mod(message, context, trains_nothing), sockets)
        run = serve(grid, job, out=tmp_path / "run")
    assert [entry.survivors for entry in run.history] == [0, 3, 3]
    assert (run.info.secure_sum or {})["trips"] == 2
    assert all(set(content) == {"choral"} for content in grid.seen)
    if promise:
        assert (run.info.privacy or {})["epsilon"] == 4.0
        assert all(open_ledger(federation.site(name), "points").segments for name in federation.names)
    else:
        assert same_weights(run, rehearsed_job(federation, settings))


@pytest.mark.parametrize("kind", AVERAGING if FLOWER else ["FedAvg", "FedAdam"])
def test_a_strategy_makes_of_the_secure_mean_what_it_makes_of_the_replies(
    tmp_path: Path, place: Path, kind: str
) -> None:
    """Beside Flower's own, of the same sites' replies in the clear: equal but for the rounding of the encoding."""
    from flwr.serverapp import strategy as flower

    given: dict[str, dict[str, float]] = {"FedAvgM": {"server_momentum": 0.9}, "FedProx": {"proximal_mu": 0.1}}

    def inner() -> Any:
        return getattr(flower, kind)(fraction_evaluate=0.0, **given.get(kind, {}))

    sites = FlowerSites(tmp_path, place)
    with sites.doors() as sockets:
        bare = inner().start(
            NodesHere(bare_app(socket_owner(sites)), sockets), arrays_of(new_model()), 3, train_config=config()
        )
        secure = started(sites, NodesHere(client_app(socket_owner(sites)), sockets), inner())
    plain = rehearsed(sites.names, 3, Masked()).state
    wrong = max(float(abs(secure.arrays[key].numpy() - bare.arrays[key].numpy()).max()) for key in plain)
    other = max(float(abs(secure.arrays[key].numpy() - plain[key].numpy()).max()) for key in plain)
    assert wrong < ROUNDING
    assert (other > 100 * ROUNDING) == (kind not in ("FedAvg", "FedProx"))


def test_a_job_with_evaluation_is_evaluated_at_the_coordinator_and_asks_no_site(tmp_path: Path, place: Path) -> None:
    """Although the strategy wants it, and the ClientApp would answer."""
    from flwr.app import MetricRecord
    from flwr.serverapp.strategy import FedAvg

    sites, calls = FlowerSites(tmp_path, place), list[str]()
    with sites.doors() as sockets:
        grid = NodesHere(client_app(socket_owner(sites), calls), sockets)
        result = started(
            sites,
            grid,
            FedAvg(fraction_evaluate=1.0),
            rounds=2,
            evaluate_fn=lambda number, _: MetricRecord({"loss": number / 4}),
        )
    assert sorted(calls) == sorted(sites.names * 2)  # they trained
    assert not result.evaluate_metrics_clientapp
    assert {number: result.evaluate_metrics_serverapp[number]["loss"] for number in (1, 2)} == {1: 0.25, 2: 0.5}


def test_what_a_site_evaluates_passes_in_no_message(tmp_path: Path, place: Path) -> None:
    """Also where the app's author puts a request that the site would train for into an evaluation."""
    from flwr.app import Message, RecordDict

    from choral.network.door.client import FAILED

    sites, replies, calls = FlowerSites(tmp_path, place), list[Any](), list[str]()
    with sites.doors() as sockets:
        app = client_app(socket_owner(sites), calls)
        grid = NodesHere(app, sockets)

        def evaluated(name: str, message: Any) -> None:
            if name == "north" and "choral-model" in message.content:
                asked = Message(RecordDict(dict(message.content)), dst_node_id=1, message_type="evaluate")
                replies.append(app(asked, grid.context(name)).content)

        grid.before = evaluated
        result = started(sites, grid, rounds=1)
    assert same(result, rehearsed(sites.names, 1, Masked()))
    assert calls.count("north") == 2  # once of them it evaluated
    assert [set(each) for each in replies] == [{"choral"}] * len(replies)
    assert bytes([FAILED]) in [each["choral"]["bytes"].data for each in replies]
    accuracy = struct.pack("<d", ACCURACY)
    for content in [*grid.seen, *replies]:
        raw = content["choral"]["bytes"].data
        assert accuracy not in raw
        assert b"accuracy" not in raw


def test_strategies_that_look_at_single_replies_are_refused_by_name(tmp_path: Path, place: Path) -> None:
    from flwr.serverapp import strategy as flower

    from choral.network.flower import Secure

    job = FlowerSites(tmp_path, place).job()

    class Named(flower.FedAvg):  # type: ignore[misc]
        """It changes who is asked what, and leaves the averaging as it is."""

    for kind in (
        flower.FedAvg,
        flower.FedProx,
        flower.FedAvgM,
        flower.FedAdam,
        flower.FedAdagrad,
        flower.FedYogi,
        Named,
    ):
        assert Secure(kind(), job)
    for kind in (flower.FedMedian, flower.Krum):
        with pytest.raises(ConfigError, match=f"{kind.__name__} looks at single replies"):
            Secure(kind(), job)
    with pytest.raises(ConfigError, match=r"str is no strategy"):
        Secure("FedAvg", job)
    with pytest.raises(ConfigError, match=r"0.5 of the nodes"):
        Secure(flower.FedAvg(fraction_train=0.5), job)
    with pytest.raises(ConfigError, match="waits for 4 nodes"):
        Secure(flower.FedAvg(min_available_nodes=4), job)


def test_arrays_that_cannot_be_averaged_are_refused_by_name(tmp_path: Path, place: Path) -> None:
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    from choral.network.flower import Secure

    counter = ArrayRecord({"bn.num_batches_tracked": Array(np.zeros((), np.int64))})
    with pytest.raises(ConfigError, match=r"bn.num_batches_tracked.*int64"):
        Secure(FedAvg(), FlowerSites(tmp_path, place).job()).start(NodesHere(lambda *_: None, {}), counter)
