"""The bill of the reader's own job: what was measured here, scaled to its parties, records, model, rounds and devices.

Training per record and the bytes of a round grow in proportion to the model's parameters; what a round takes beside its
training (encoding, secure sum, server) also to the parties in it. Of parties' devices in several classes each class has
the same share, energy is the mean over them, and a round lasts as long as the slowest class takes. All else is the
model of :mod:`choral.audits.costs.crossover`, at equal accuracy and privacy as in :mod:`choral.audits.costs.winners`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from choral.audits.costs.bills import DAY, GB, KWH, Bill, Item, together
from choral.audits.costs.crossover import Workload, workload
from choral.audits.costs.devices import Accelerator, DeviceClass, accelerator, device, speedup
from choral.audits.costs.job import Job
from choral.audits.costs.prices import Prices
from choral.audits.costs.target import Target, rounds_to
from choral.audits.costs.winners import equal_pairs

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run


class JobBill(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Both sides of the job for one pair of configurations at equal privacy. epsilon: of both, None without.

    parties, records, record_bytes, parameters, taking_part: the share of the parties in a round. pause: seconds from
    the beginning of a round to the next, at least; 0 where they follow on one another. hardware: what was chosen, with
    its figures and pages, a line each.
    """

    epsilon: float | None
    parties: float
    records: float
    record_bytes: float
    parameters: float
    taking_part: float
    pause: float
    hardware: tuple[str, ...]
    cloud: Bill
    federation: Bill


class _Class(NamedTuple):
    """Of devices. speed: times the measured core."""

    speed: float
    watts: float
    mbps: float


class _Sized(NamedTuple):
    """A workload at the job's size, and what it runs on. records: of each party. slowest: of the parties' lines."""

    work: Workload
    parties: float
    records: float
    classes: tuple[_Class, ...]
    chosen: Accelerator | None
    accelerators: float
    pause: float

    @property
    def slowest_line(self) -> float:
        return min(each.mbps for each in self.classes)


def job_bills(
    arms: Mapping[str, Sequence[Run]], target: Target | None, job: Job | None, prices: Prices
) -> tuple[JobBill, ...]:
    """For each pair of configurations at equal privacy; empty without a job, or where runs did not record enough."""
    made = []
    for cloud, federated, epsilon in equal_pairs(arms) if job is not None and job != Job() else ():
        work = workload(federated, arms[federated], cloud, arms[cloud], prices)
        if work is None or not work.model_bytes or job is None:
            continue
        reached = {name: rounds_to(target, name) for name in (cloud, federated)} if target else {}
        sized = _sized(work, job, prices, reached.get(federated), reached.get(cloud))
        made.append(
            JobBill(
                epsilon=epsilon,
                parties=sized.parties,
                records=sized.records,
                record_bytes=sized.work.record_bytes,
                parameters=sized.work.model_bytes / 4.0,
                taking_part=sized.work.selected,
                pause=sized.pause,
                hardware=_hardware(job, sized, prices),
                cloud=_cloud(sized, prices),
                federation=_federation(sized, prices),
            )
        )
    return tuple(made)


def _sized(work: Workload, job: Job, prices: Prices, rounds: float | None, cloud_rounds: float | None) -> _Sized:
    grown = 1.0 if job.parameters is None else job.parameters / (work.model_bytes / 4.0)
    slower = grown if job.core_seconds is None else job.core_seconds / work.device_seconds
    chosen = accelerator(job.accelerator) if job.accelerator else None
    faster = 1.0
    if chosen is not None and work.accelerator_basis == "modelled":  # the table's speed-up is in it
        faster = speedup(chosen, 1.0)
    taking_part = (work.selected if job.selected is None else job.selected) * (job.available or 1.0)
    parties = float(job.parties or work.parties)
    there = parties * taking_part / (work.parties * work.selected)
    devices = [device(name) for name in job.devices]
    own = _Class(1.0, prices["device_watts"], prices["party_mbps"])
    return _Sized(
        work=msgspec.structs.replace(
            work,
            record_bytes=work.record_bytes if job.record_bytes is None else job.record_bytes,
            rounds=job.rounds or math.ceil(rounds or work.rounds),
            cloud_rounds=job.cloud_rounds or math.ceil(cloud_rounds or work.passes),
            up_bytes=work.up_bytes * grown,
            down_bytes=work.down_bytes * grown,
            device_seconds=work.device_seconds * slower,
            accelerator_seconds=work.accelerator_seconds * slower / faster,
            sum_seconds=work.sum_seconds * grown * there,
            selected=taking_part,
            model_bytes=work.model_bytes * grown,
        ),
        parties=parties,
        records=work.examples if job.records is None else job.records,
        classes=tuple(_Class(each.speed, each.watts, each.mbps) for each in devices) or (own,),
        chosen=chosen,
        accelerators=float(job.accelerators or prices["accelerators"]),
        pause=_pause(job, devices, work, prices),
    )


def _pause(job: Job, devices: Sequence[DeviceClass], work: Workload, prices: Prices) -> float:
    """Seconds from round to round: the job's own, or of the slowest class, or of prices and the run's clock."""
    a_day = job.rounds_per_day
    if a_day is None:
        given = [each.rounds_per_day for each in devices if each.rounds_per_day]
        a_day = min(given) if given else prices["rounds_per_day"] or (DAY / work.period if work.period else 0.0)
    return DAY / a_day if a_day else 0.0


def _hardware(job: Job, sized: _Sized, prices: Prices) -> tuple[str, ...]:
    lines = []
    if (chosen := sized.chosen) is not None:
        times = speedup(chosen, prices["accelerator_speedup"])
        rate = f"{times:.3g} times one core, in proportion to {chosen.tflops:g} Tflop/s"
        if sized.work.accelerator_basis == "measured":
            rate = f"of {chosen.tflops:g} Tflop/s, at the rate of the accelerator that was measured"
        lines.append(f"{sized.accelerators:g} x {chosen.name}: {rate} ({chosen.arithmetic}). {chosen.page}")
    for name in dict.fromkeys(job.devices):
        kind = device(name)
        figures = f"{kind.speed:g} times the measured core, {kind.watts:g} W, {kind.mbps:g} Mbit/s"
        share = job.devices.count(name) / len(job.devices)
        pages = kind.page or "An assumption."
        lines.append(f"{100 * share:.3g} % of the parties: {kind.name} ({figures}; speed and line assumed). {pages}")
    return tuple(lines)


def _cloud(sized: _Sized, prices: Prices) -> Bill:
    work, chosen = sized.work, sized.chosen
    watts = prices["accelerator_watts"] if chosen is None or chosen.watts is None else chosen.watts
    hour = prices["accelerator_hour"] if chosen is None or chosen.usd_hour is None else chosen.usd_hour
    worth = together(prices, sized.accelerators)
    largest = sized.records * work.record_bytes
    raw, alone = sized.parties * largest, sized.parties * sized.records * work.passes * work.accelerator_seconds
    paid = alone / worth * sized.accelerators
    kept = raw / GB * prices["storage_months"]
    items = (
        Item(
            name="raw data moved to the cloud", quantity=raw / GB, unit="GB", basis="modelled", how="sent once",
            usd=raw / GB * prices["party_egress_gb"], joules=raw * prices["network_joules_per_byte"],
        ),
        Item(
            name="storage", quantity=kept, unit="GB-months", basis="modelled", how="as in the price table",
            usd=kept * prices["storage_gb_month"],
        ),
        Item(
            name="accelerator", quantity=paid / 3600, unit="hours", basis="modelled", joules=paid * watts,
            how=f"{sized.accelerators:g}, worth {worth:.3g} of one, at {watts:g} W and {hour:g} USD an hour",
            usd=paid / 3600 * hour,
        ),
    )  # fmt: skip
    seconds = 8e-6 * largest / sized.slowest_line + alone / worth
    return _bill(work.cloud, "centralized", work.passes, items, largest, 0.0, alone, seconds)


def _federation(sized: _Sized, prices: Prices) -> Bill:
    work, rounds = sized.work, sized.work.rounds
    messages = work.up_bytes + work.down_bytes
    waits = prices["round_trips"] * prices["round_trip_seconds"] + work.sum_seconds
    train = sized.records * work.device_seconds
    busy = max(waits + 8e-6 * messages / each.mbps + train / each.speed for each in sized.classes)
    spent = math.fsum(train / each.speed * each.watts for each in sized.classes) / len(sized.classes)
    there = sized.parties * work.selected * rounds
    sent, received, energy, clock = there * work.up_bytes, there * work.down_bytes, there * spent, rounds * busy
    items = (
        Item(
            name="sent by the parties", quantity=sent / GB, unit="GB", basis="modelled", how="as measured, scaled",
            usd=sent / GB * prices["party_egress_gb"], joules=sent * prices["network_joules_per_byte"],
        ),
        Item(
            name="sent by the server", quantity=received / GB, unit="GB", basis="modelled", how="as measured, scaled",
            usd=received / GB * prices["server_egress_gb"], joules=received * prices["network_joules_per_byte"],
        ),
        Item(
            name="the parties' devices", quantity=energy / KWH, unit="kWh", basis="modelled", joules=energy,
            how=f"{train:.3g} s of training a round on the measured core", usd=energy / KWH * prices["kwh"],
        ),
        Item(
            name="server", quantity=clock / 3600, unit="hours", basis="modelled", joules=clock * prices["server_watts"],
            how="while rounds go on", usd=clock / 3600 * prices["server_hour"],
        ),
    )  # fmt: skip
    each = rounds * work.selected
    return _bill(
        work.federated, "federated", rounds, items, each * work.up_bytes, each * work.down_bytes,
        there * train, rounds * max(busy, sized.pause),
    )  # fmt: skip


def _bill(
    arm: str, kind: str, rounds: int, items: tuple[Item, ...], up: float, down: float, compute: float, seconds: float
) -> Bill:
    return Bill(
        arm=arm,
        kind="federated" if kind == "federated" else "centralized",
        rounds=rounds,
        bytes_up=up,
        bytes_down=down,
        compute_seconds=compute,
        seconds=seconds,
        usd=math.fsum(item.usd or 0.0 for item in items),
        joules=math.fsum(item.joules or 0.0 for item in items),
        energy="modelled",
        items=items,
    )
