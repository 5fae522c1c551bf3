"""The bill of the reader's own job, by hand; device classes from dated sheets; and calendars of rounds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from choral.audits import Comparison, Job, compare, read_prices
from choral.audits.costs.bills import bill
from choral.audits.costs.crossover import (
    cloud_seconds,
    cloud_usd,
    federation_seconds,
    federation_usd,
    workload,
)
from choral.audits.costs.devices import accelerator, device_table, speedup
from choral.audits.costs.job_bills import JobBill, job_bills
from choral.audits.costs.prices import PriceSettings
from choral.audits.costs.target import costs_to_target
from choral.errors import ConfigError
from choral.trainers import Run
from choral.trainers.run_folder.info import RoundTimes

MakeRun = Callable[..., Run]
PRICES = read_prices()
TIMES = RoundTimes(training=0.05, server=0.001, evaluation=0.002, processor=0.2, training_processor=0.06)


def timed(run: Run) -> Run:
    history = [msgspec.structs.replace(entry, times=TIMES if entry.round else None) for entry in run.history]
    return dataclasses.replace(run, history=tuple(history))


@pytest.fixture
def arms(make_run: MakeRun) -> dict[str, list[Run]]:
    names = ("cloud", "cloud-dp", "federated-masked", "federated-dp")
    return {name: [timed(make_run(name))] for name in names}


def job_of(arms: dict[str, list[Run]], **given: Any) -> JobBill:
    return job_bills(arms, None, Job(**given), PRICES)[0]


def test_every_number_of_a_scaled_job_is_that_of_arithmetic_by_hand(arms: dict[str, list[Run]]) -> None:
    """A hospital's: phones and small servers in equal numbers, eight H100, a tenth of the parties there each night."""
    found = job_of(
        arms, parties=20_000, records=500, record_bytes=1e6, parameters=6500, rounds=30, cloud_rounds=12,
        selected=0.5, available=0.1, accelerator="h100", accelerators=8, devices=("phone", "small-server"),
    )  # fmt: skip
    measured = sum(arms["cloud"][0].info.parties.values())  # 1,365 records among ten parties, 650 parameters
    core = 0.06 / measured * 10  # seconds of a record and round on one core, of ten times the parameters
    on_h100 = core / (20 * 66.9 / 37.4)
    worth = 1 + 7 * 0.9
    raw, alone = 20_000 * 500 * 1e6, 20_000 * 500 * 12 * on_h100
    paid = alone / worth * 8
    assert found.cloud.usd == pytest.approx(raw / 1e9 * (0.09 + 0.023) + paid / 3600 * 3.85)
    assert found.cloud.joules == pytest.approx(raw * 1.4e-5 + paid * 700)
    assert found.cloud.seconds == pytest.approx(500 * 1e6 * 8 / 10e6 + alone / worth)
    there = 20_000 * 0.05
    up, down = 26_500 * 10, 22_100 * 10
    beside = 5 * 0.2 + 0.14 * 10 * there / 10
    phone, server = (beside + (up + down) * 8 / line + 500 * core / speed for line, speed in ((10e6, 0.5), (100e6, 4)))
    energy = there * 30 * 500 * core * (3 / 0.5 + 55 / 4) / 2
    usd = there * 30 * (up + down) / 1e9 * 0.09 + energy / 3.6e6 * 0.165 + 30 * max(phone, server) / 3600 * 0.096
    assert found.federation.usd == pytest.approx(usd)
    assert found.federation.joules == pytest.approx(
        there * 30 * (up + down) * 1.4e-5 + energy + 30 * max(phone, server) * 50
    )
    assert found.federation.seconds == 30 * 86_400, "phones take part once a day"
    assert (found.federation.bytes_up, found.federation.bytes_down) == pytest.approx((30 * 0.05 * up, 30 * 0.05 * down))
    assert (found.parties, found.records, found.parameters, found.taking_part) == (20_000, 500, 6500, 0.05)
    awake = job_of(arms, parties=20_000, records=500, parameters=6500, rounds=30, selected=0.5, available=0.1,
                   devices=("phone", "small-server"), rounds_per_day=0.0)  # fmt: skip
    assert awake.federation.seconds == pytest.approx(30 * max(phone, server))


def test_a_job_of_the_measured_size_is_the_crossovers_own_point(arms: dict[str, list[Run]]) -> None:
    """Nothing is scaled by what is left out; rounds are those to the target, where it was reached."""
    found = job_of(arms, parties=10)
    work = workload("federated-masked", arms["federated-masked"], "cloud", arms["cloud"], PRICES)
    assert work is not None
    n, m, r = 10, work.examples, work.record_bytes
    assert found.cloud.usd == pytest.approx(cloud_usd(work, PRICES, n, m, r))
    assert found.cloud.seconds == pytest.approx(cloud_seconds(work, PRICES, n, m, r))
    assert found.federation.usd == pytest.approx(federation_usd(work, PRICES, n, m))
    assert found.federation.seconds == pytest.approx(federation_seconds(work, PRICES, m))
    target = costs_to_target(arms, "accuracy", "cloud", PRICES)
    assert target is not None
    reached = job_bills(arms, target, Job(parties=10), PRICES)[0]
    rounds = {name: target.arms[name][0].round for name in ("cloud", "federated-masked")}
    assert (reached.cloud.rounds, reached.federation.rounds) == (rounds["cloud"], rounds["federated-masked"])


def test_a_job_is_billed_at_each_equal_privacy_and_stands_in_the_report(
    arms: dict[str, list[Run]], tmp_path: Path
) -> None:
    job = Job(parties=1000, record_bytes=1e6, devices=("phone",), accelerator="tpu-v5e")
    runs = {name: found[0] for name, found in arms.items()}
    report = compare(runs, prices=read_prices(job=job))
    assert report.costs is not None
    assert [(each.epsilon, each.cloud.arm, each.federation.arm) for each in report.costs.job] == [
        (None, "cloud", "federated-masked"),
        (8.0, "cloud-dp", "federated-dp"),
    ]
    assert Comparison.load(report.save(tmp_path / "r.json")).costs == report.costs
    page = report.save(tmp_path / "r.html").read_text("utf-8")
    assert page.count("Your job, ") == 2
    assert "of the parties in a round, one round a day. " in page
    assert "Cheaper is distribution (federated-masked)" in page
    assert "Google TPU v5e, one chip" in page
    assert "cloud.google.com/tpu/docs/v5e" in page
    assert compare(runs).costs.job == ()  # type: ignore[union-attr]


def test_an_accelerator_that_was_measured_keeps_its_rate(arms: dict[str, list[Run]], make_run: MakeRun) -> None:
    arms["cloud"] = [timed(make_run("cloud", device="cuda"))]
    one, h100 = (job_of(arms, parties=10, accelerator=name) for name in ("", "h100"))
    assert h100.cloud.compute_seconds == one.cloud.compute_seconds
    assert "at the rate of the accelerator that was measured" in h100.hardware[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parties": 0}, r"report\.job\.parties is 0, expected a finite number > 0"),
        ({"available": 1.5}, r"report\.job\.available is 1\.5, .* <= 1"),
        ({"record_bytes": float("nan")}, "record_bytes is nan"),
        ({"rounds_per_day": -1.0}, "expected a finite number >= 0"),
        ({"accelerator": "h10"}, "devices.toml does not have"),
        ({"devices": ("fone",)}, "devices.toml does not have"),
        ({"devices": "phone"}, "expected tuple or list"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Job(**given)


def test_device_classes_are_dated_and_sourced() -> None:
    table = device_table()
    assert {"p100", "tpu-v2", "h100", "h200", "tpu-v5e"} == set(table.accelerators)
    assert {"phone", "laptop", "small-server"} == set(table.devices)
    for kind in (*table.accelerators.values(), *table.devices.values()):
        assert bool(kind.page) == bool(kind.as_of), kind.name
        if kind.page:
            assert re.match(r"https://[^ ,]+", kind.page), kind.name
            assert re.search(r"of 20\d\d|without a date", kind.page), kind.name
    for chip in table.accelerators.values():  # every figure stands in the words of its page
        for figure in (chip.tflops, chip.watts):
            assert figure is None or f"{figure:g}" in chip.page, chip.name
    assert speedup(accelerator("p100"), 20.0) == pytest.approx(20 * 9.3 / 37.4)


def test_a_run_with_a_clock_of_its_own_takes_as_long_as_its_clock_says(make_run: MakeRun) -> None:
    """Rounds once a day: twenty of them end nineteen days and the last round later, and cost the same money."""
    run = make_run("federated-masked")
    history = [
        msgspec.structs.replace(
            entry,
            simulated_start=7200 + 86_400.0 * (entry.round - 1) if entry.round else None,
            simulated_seconds=120.0 if entry.round else None,
            selected=4 if entry.round else None,
        )
        for entry in run.history
    ]
    info = msgspec.structs.replace(run.info, participation={"clock": {"first": 7200.0, "period": 86_400.0}})
    nightly = dataclasses.replace(run, info=info, history=tuple(history))
    made, once = bill("f", [nightly], PRICES), bill("f", [make_run("federated-masked")], PRICES)
    assert made is not None
    assert once is not None
    assert made.seconds == 19 * 86_400 + 120
    calendar = made.items[-1]
    assert (calendar.name, calendar.usd, calendar.quantity) == ("calendar", None, pytest.approx(19 + 120 / 86_400))
    assert "a round every 1 days, 40 % of the parties in a round" in calendar.how
    assert "calendar" not in {item.name for item in once.items}
    hourly = read_prices(changes=PriceSettings(rounds_per_day=24.0))
    stated = bill("f", [nightly], hourly)
    assert stated is not None
    assert stated.seconds == 20 * 3600, "what the price table says goes before the run's own clock"
    work = workload("f", [nightly], "c", [make_run("cloud")], PRICES)
    assert work is not None
    assert work.period == 86_400
    assert federation_seconds(work, PRICES, 1.0) == 20 * 86_400
    assert federation_seconds(work, hourly, 1.0) == 20 * 3600
