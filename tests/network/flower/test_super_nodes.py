"""Flower itself: a SuperLink and three SuperNodes with TLS and node authentication run the example.

Run by `make test-engines`, where Flower is installed. Sites are processes of their own, as `choral join --local` makes
them, each beside its SuperNode.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flower_federation import ENGINE, VISITS, FlowerSites, new_model, rehearsed
from flower_nodes import PATIENT, Flower
from site_federation import approved_at, offer_for, toml_of, until_tomorrow
from site_federation import rehearsed as rehearsed_job
from site_processes import below, pinned_wrong, until
from site_secrets import files_below, found_in, memory_of, secrets_of
from site_taps import STEPS

from choral.jobs.engines.default_trips import with_trips
from choral.network.site.files.private import write_private
from choral.protocols import Masked
from choral.trainers import Run
from choral.trainers.task.settings import Training

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed: run by `make test-engines`"
)


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    place = Path(tempfile.mkdtemp(prefix="fl-"))
    made = Flower(FlowerSites(tmp_path_factory.mktemp("sites"), place), place, tapped=True)
    try:
        made.begin()
        yield made
    finally:
        for name in list(made.running):
            made.kill(name)
        for tap in made.taps.values():
            tap.close()
        shutil.rmtree(place, ignore_errors=True)


def approve_what_comes(flower: Flower, job: str) -> None:
    """As an officer does at each site: the offer is looked at once it was made, and approved."""
    for name in flower.sites.names:
        folder = flower.sites.federation.site(name)
        until(lambda folder=folder: [each for each in folder.offers.all() if each.job == job], "the offer")  # type: ignore[misc]
        (offer,) = (each for each in folder.offers.all() if each.job == job)
        flower.run(
            sys.executable, "-m", "choral", "site", "approve", offer.digest, "--site", str(folder.path),
            "--until", f"{until_tomorrow()}",
        )  # fmt: skip


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def lost(flower: Flower, name: str) -> None:
    """The machine is switched off."""
    flower.kill(f"{name}-node")
    flower.kill(f"{name}-site")


def test_who_refuses_says_why_at_home_and_nowhere_else(flower: Flower) -> None:
    """north: nobody approved it; south: terms below its own; east: it has pinned another key of the coordinator."""
    federation = flower.sites.federation
    try:
        federation.configure("south", ENGINE, ("minimum_cohort = 2", "minimum_cohort = 4"))
        with pinned_wrong(federation, "east", "hub"):
            flower.site_anew("east")
            flower.submit("refused", 1, approve=["south", "east"], wait=60)
            flower.over("refused")
    finally:
        federation.configure("south", ENGINE)
        flower.site_anew("east")
    assert "0 of 3 sites took the job" in flower.said("refused")
    said = flower.said("refused") + flower.said("superlink")
    reasons = {"north": "nobody approved it", "south": "at least 4", "east": "its key did not sign for east"}
    for name, reason in reasons.items():
        assert reason in flower.said(f"{name}-site")
        assert reason not in said


def test_another_sites_key_that_is_not_the_pinned_one_is_refused_by_who_pinned_it(flower: Flower) -> None:
    """north has pinned another key for south: it goes into no sum with it, and the others go on."""
    try:
        with pinned_wrong(flower.sites.federation, "north", "south"):
            flower.site_anew("north")
            flower.submit("pins", 1, approve=flower.sites.names)
            flower.over("pins")
    finally:
        flower.site_anew("north")
    assert same(flower.model("pins"), rehearsed(flower.sites.names, 1, Masked(), without={1: "north"}).state)
    reason = "the Hello of south is not signed by south's pinned identity"
    assert reason in flower.said("north-site")
    assert "going on without north: refused" in flower.said("pins")
    assert reason not in flower.said("pins") + flower.said("superlink")


SERVER = """
from flwr.serverapp import ServerApp

from choral.network.flower import serve

app = ServerApp()


@app.main()
def main(grid, context):
    serve(grid, context.run_config["job"], out=context.run_config["out"])
"""
CLIENT = """
from flwr.clientapp import ClientApp

from choral.network.flower import secure_sum_mod

app = ClientApp(mods=[secure_sum_mod])


@app.train()
def train(message, context):
    raise RuntimeError("the site's process trains")
"""


def test_a_whole_job_goes_over_flower_trained_by_the_sites_processes(flower: Flower) -> None:
    """The second way of docs/flower.md: by code that is installed at the sites, and none that Flower ships."""
    federation, out = flower.sites.federation, flower.place / "run"
    app = flower.place / "serving"
    shutil.copytree(VISITS, app)
    (app / "visits" / "server_app.py").write_text(SERVER)
    (app / "visits" / "client_app.py").write_text(CLIENT)
    settings = federation.settings(training=Training(rounds=2, batch_size=8, learning_rate=0.1))
    settings = replace(settings, serve=replace(PATIENT, job="whole"))
    job = flower.sites.hub.path / "whole.toml"
    write_private(job, toml_of(settings).encode())
    write_private(flower.sites.hub.path / "tasks" / "linear.py", federation.code.encode())
    try:
        for name in federation.names:
            federation.configure(name)
            approved_at(federation, name, offer_for(federation, with_trips(settings, federation.names, "flower")))
        flower.submit_app("whole", app, f'job="{job}" out="{out}"')
        flower.over("whole")
    finally:
        for name in federation.names:
            federation.configure(name, ENGINE)
    assert (out / "run.json").is_file(), flower.said("whole")[-4000:]
    run = Run.load(out)
    assert [entry.survivors for entry in run.history] == [0, 3, 3]
    assert same(run.state, rehearsed_job(federation, settings).state)


def test_two_rounds_and_one_node_killed_and_no_record_at_the_coordinator(flower: Flower) -> None:
    """Unapproved at first; then round 1 with all; in round 2 one machine is switched off when it has its order, and
    another one trains only when the coordinator's processes have been searched.
    """
    orders, asked, ordered, searched = itertools.count(1), itertools.count(1), threading.Event(), threading.Event()

    def east(kind: str) -> bool | None:
        if kind != "deliveries" or next(orders) != 2:
            return None
        lost(flower, "east")
        return False

    def north(kind: str) -> None:
        if kind == "deliveries" and next(asked) == 2:
            ordered.set()
            searched.wait(300)

    flower.taps["east"].before, flower.taps["north"].before = east, north
    flower.submit("killed", 2)
    approve_what_comes(flower, "killed")
    assert ordered.wait(400), flower.said("killed")[-4000:]
    secrets = {f"{name}: {what}": secret for name in flower.sites.names
               for what, secret in secrets_of(flower.sites.federation, name).items()}  # fmt: skip
    few = {name: secret for name, secret in secrets.items() if name in ("north: key", "north: numbers 0")}
    few["weights"] = new_model().state_dict()["0.weight"].numpy().tobytes()
    found = [found_in(few, memory_of(number)) for number in coordinators_processes(flower)]
    here = found_in(few, memory_of(flower.running["north-site"].pid))
    searched.set()
    assert set().union(*found) == {"weights"}  # what is there is found
    assert "north: key" in here
    flower.over("killed")
    flower.taps["east"].before = flower.taps["north"].before = lambda kind: None
    assert same(flower.model("killed"), rehearsed(flower.sites.names, 2, Masked(), without={2: "east"}).state)
    assert found_in(secrets, files_below(flower.place / "home")) == set()
    assert found_in(secrets, files_below(flower.sites.hub.path)) == set()
    for name in ("killed", "superlink"):
        assert found_in(secrets, iter([(flower.place / f"{name}.log").read_bytes()])) == set()


def coordinators_processes(flower: Flower) -> list[int]:
    """The SuperLink and the ServerApp, which it started."""
    link = flower.running["superlink"].pid
    apps = [number for number in below(link) if b"flwr-serverapp" in Path(f"/proc/{number}/cmdline").read_bytes()]
    assert apps
    return [link, *apps]


@pytest.mark.slow
def test_a_node_killed_at_each_step_of_a_round(flower: Flower) -> None:
    """In each round at another step, after a whole one; it is back for the next. Killed before its vector was sent it
    is in no sum of that round, and later it is: the weights are exact.
    """
    steps, killed, back = list(STEPS), list[str](), threading.Lock()
    begun = threading.Event()

    def east(kind: str) -> bool | None:
        if not begun.is_set() or not steps or kind != steps[0] or len(killed) + len(steps) > len(STEPS):
            return None
        killed.append(kind)
        lost(flower, "east")
        return False

    def north(kind: str) -> None:
        """It holds the last step of a round up until east is there again."""
        if kind != "confirmations":
            return
        with back:
            if not begun.is_set():
                begun.set()
                return
            if steps:
                until(lambda: len(killed) + len(steps) > len(STEPS), f"the death at {steps[0]}")
                start_again(flower, "east")
                del steps[0]

    if "east-site" not in flower.running:
        start_again(flower, "east")
    flower.taps["east"].before, flower.taps["north"].before = east, north
    flower.submit("steps", 1 + len(STEPS), approve=flower.sites.names, trips=4)
    flower.over("steps", 1500)
    assert killed == list(STEPS)
    without = {2: "east", 3: "east"}
    assert same(flower.model("steps"), rehearsed(flower.sites.names, 1 + len(STEPS), Masked(), without=without).state)


def start_again(flower: Flower, name: str) -> None:
    """Site and node, until Flower knows of it."""
    flower.site_anew(name)
    before = flower.said("superlink").count(ACTIVATED)
    flower.node(name)
    flower.wait_for("superlink", ACTIVATED, times=before + 1)
    time.sleep(3)


ACTIVATED = "activate-node"
