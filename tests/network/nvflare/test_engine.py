"""NVFlare itself: its simulator, and a provisioned deployment under mutual TLS in processes of its own.

Run by `make test-engines`, whose environment has NVFlare; skipped elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from site_federation import approved_at, offer_for, rehearsed, same_weights
from site_processes import PATIENT, pinned_wrong, until
from site_secrets import files_below, found_in, memory_of, secrets_of
from site_taps import STEPS

from choral.jobs.settings import Settings, SumSettings
from choral.trainers import Participation
from choral.trainers.task.settings import Training

pytest.importorskip("nvflare", reason="run by `make test-engines`")
if TYPE_CHECKING:
    from nvflare_sites import Deployment, DoorSites

pytestmark = pytest.mark.filterwarnings("default")  # NVFlare's own


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorSites]:
    from nvflare_sites import DoorSites

    made = DoorSites(tmp_path_factory.mktemp("sites"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def deployed(sites: DoorSites) -> Iterator[Deployment]:
    from nvflare_sites import Deployment

    made = Deployment(sites)
    yield made
    made.close()


def rounds(sites: DoorSites, number: int, **waits: Any) -> Settings:
    settings = sites.settings(
        training=Training(rounds=number, batch_size=8, learning_rate=0.1), participation=Participation(patience=2)
    )
    return replace(settings, serve=replace(settings.serve, **waits))


@pytest.mark.parametrize("trips", [None, 2, 3])
def test_two_rounds_in_the_simulator_end_at_the_weights_of_federate(
    trips: Any, sites: DoorSites, tmp_path: Path
) -> None:
    from nvflare.recipe.sim_env import SimEnv

    from choral.network.nvflare import write_local

    settings, job = replace(rounds(sites, 2), secure_sum=SumSettings(trips=trips)), f"simulated-{trips}"
    recipe = sites.recipe(job, settings)
    local = tmp_path / job / "local"
    local.mkdir(parents=True)
    write_local(local, door=sites.door(), coordinator=str(sites.hub), runs=str(tmp_path / "runs"))
    recipe.execute(SimEnv(clients=list(sites.federation.names), workspace_root=str(tmp_path)))
    from choral.trainers import Run

    run = Run.load(tmp_path / "runs" / job)
    assert [entry.survivors for entry in run.history] == [0, 3, 3]
    assert (run.info.secure_sum or {}).get("trips") == trips
    assert same_weights(run, rehearsed(sites.federation, settings))


def test_a_job_carries_no_code(sites: DoorSites, tmp_path: Path) -> None:
    sites.recipe("exported", rounds(sites, 2)).export(str(tmp_path))
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names <= {"meta.json", "config_fed_server.json", "config_fed_client.json", ".nvflare_job_export"}
    client = next(tmp_path.rglob("config_fed_client.json")).read_text()
    assert "choral.network.nvflare.site.ChoralSite" in client


def test_a_deployment_trains_exactly_and_no_record_leaves_a_site(deployed: Deployment, sites: DoorSites) -> None:
    """A site's process that is killed in a round costs that round, and nothing of NVFlare's."""
    settings = rounds(sites, 4, step=20.0)
    secrets = {f"{name}: {what}": secret for name in sites.federation.names
               for what, secret in secrets_of(sites.federation, name).items()}  # fmt: skip
    assert len(secrets) == 30
    with sites.paused("south", 2), sites.paused("north", 2):
        number = deployed.submit(sites.recipe("watched", settings))
        until(lambda: sites.in_fit("south") == "2", "the training of round 2")
        few = {name: secret for name, secret in secrets.items() if name in ("south: key", "south: numbers 0")}
        for process in (deployed.job_process("server"), deployed.job_process("south")):
            assert found_in(few, memory_of(process)) == set()
        assert found_in(few, memory_of(sites.sites["south"].pid)) == set(few)
        sites.start_anew("south")
    assert deployed.wait(number) == "FINISHED:COMPLETED"
    run = sites.run("watched")
    assert [entry.survivors for entry in run.history] == [0, 3, 2, 3, 3]
    assert same_weights(run, rehearsed(sites.federation, settings, without={2: ["south"]}))
    assert found_in(secrets, files_below(sites.path / "nvflare")) == set()
    assert found_in(secrets, files_below(sites.path / "runs")) == set()
    assert found_in(secrets, files_below(sites.hub)) == set()


@pytest.mark.parametrize(("trips", "step"), [*((4, step) for step in STEPS), (2, "deliveries"), (2, "roster")])
def test_a_node_that_is_killed_at_a_step_is_missed_and_the_sum_is_exact(
    deployed: Deployment, sites: DoorSites, trips: Any, step: str
) -> None:
    """Its parent and its job's process at once, in round 2, when it has that request: NVFlare's job lives on, and so
    does the run. Its vector is in the sum of that round where it was sent before. In two trips it has dealt for the
    round before it; with the survivors it is sent the keys of the next one, as it was in round 1, after those of that.
    """
    from nvflare_sites import JOINED

    settings = replace(rounds(sites, 4, step=20.0, away=6.0), secure_sum=SumSettings(trips=trips))
    job = f"lost-at-{step}-in-{trips}"
    seen, killed, times = list[str](), list[float](), 3 if (trips, step) == (2, "roster") else 2

    def before(kind: str) -> bool | None:
        seen.append(kind)
        if kind != step or seen.count(step) != times:
            return None
        deployed.kill("south")
        killed.append(time.monotonic())
        return False

    deployed.taps["south"].before = before
    try:
        assert deployed.wait(deployed.submit(sites.recipe(job, settings))) == "FINISHED:COMPLETED"
        assert time.monotonic() - killed[0] < PATIENT  # and not for as long as training may take
    finally:  # whatever was found, the tests after this one have all three nodes
        deployed.taps["south"].before = lambda kind: None
        if killed:
            known = deployed.log("south").count(JOINED)
            deployed.start("south")
            until(lambda: deployed.log("south").count(JOINED) > known, "the client")
    run = sites.run(job)
    sent = step in (("roster",) if trips == 2 else ("survivors", "confirmations"))
    assert [entry.survivors for entry in run.history] == [0, 3, 3 if sent else 2, 2, 2]
    without = {number: ["south"] for number in ((3, 4) if sent else (2, 3, 4))}
    assert same_weights(run, rehearsed(sites.federation, settings, without=without))
    assert max(entry.seconds for entry in run.history[3:]) < 5.0  # one short look a round, not an answer's wait


def test_who_refuses_says_why_at_home(deployed: Deployment, sites: DoorSites) -> None:
    """north: nobody approved it; south: terms below its own; east: another coordinator's key is pinned."""
    settings = replace(rounds(sites, 2, wait=6.0), participation=Participation())
    federation = sites.federation
    recipe = sites.recipe("refused", settings, approve=False)
    offer = offer_for(federation, replace(settings, serve=replace(settings.serve, job="refused")))
    for name in ("south", "east"):
        approved_at(federation, name, offer)
    try:
        federation.configure("south", ("minimum_cohort = 2", "minimum_cohort = 4"))
        with pinned_wrong(federation, "east", "hub"):
            sites.start_anew("east")
            status = deployed.wait(deployed.submit(recipe))
    finally:
        federation.configure("south")
        sites.start_anew("east")
    assert status == "FINISHED:EXECUTION_EXCEPTION"
    assert "0 of 3 sites took the job" in deployed.log("server")
    assert "nobody approved it" in sites.log("north")
    assert "at least 4" in sites.log("south")
    assert "its key did not sign for east" in sites.log("east")
    for reason in ("nobody approved", "at least 4", "did not sign"):
        assert reason not in deployed.log("server")


def test_another_sites_key_that_is_not_the_pinned_one_is_refused_by_who_pinned_it(
    deployed: Deployment, sites: DoorSites
) -> None:
    """north has pinned another key for south: it goes into no sum with it, and the others go on."""
    settings = rounds(sites, 1)
    try:
        with pinned_wrong(sites.federation, "north", "south"):
            sites.start_anew("north")
            sites.job("pins", settings)
            assert deployed.wait(deployed.submit_by_example("pins")) == "FINISHED:COMPLETED"
    finally:
        sites.start_anew("north")
    run = sites.run("pins")
    assert run.history[1].survivors == 2
    assert "north" in run.history[1].dropped
    assert same_weights(run, rehearsed(sites.federation, settings, without={1: ["north"]}))
    reason = "the Hello of south is not signed by south's pinned identity"
    assert reason in sites.log("north")
    assert reason not in deployed.log("server")
    assert "going on without north: refused" in deployed.log("server")
