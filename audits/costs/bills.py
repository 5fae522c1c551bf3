"""Bills: what each arm cost, in the cloud and as a federation.

A bill is a list of items: a quantity, whether it was measured in the run or is modelled, and the price that it is
multiplied by. What is modelled is said at the item, in words. Money is US dollars, energy joules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from choral.audits.costs.prices import Prices

if TYPE_CHECKING:
    from choral.trainers.run_folder.info import RoundRecord
    from choral.trainers.run_folder.run import Run

Basis = Literal["measured", "modelled"]
GB = 1e9
KWH = 3.6e6  # joules
DAY = 86_400.0
_RAW, _STORAGE = "raw data moved to the cloud", "storage"


class Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a bill. usd, joules: None where the item has no price, or no energy, of its own.

    basis: of the quantity; a price is always as good as its source. how: where the quantity comes from.
    """

    name: str
    quantity: float
    unit: str
    basis: Basis
    how: str
    usd: float | None = None
    joules: float | None = None


class Bill(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one arm costs, per run, as the mean over its seeds.

    bytes_up, bytes_down: of the busiest party in the whole run, measured; raw data uploaded once for a pooled run.
    compute_seconds: of all parties together, measured. seconds: how long it would take with parties at work at the
    same time and lines of ``party_mbps``, modelled.
    """

    arm: str
    kind: Literal["centralized", "federated"]
    rounds: int
    bytes_up: float
    bytes_down: float
    compute_seconds: float
    seconds: float
    usd: float
    joules: float
    energy: Literal["measured", "modelled", "partly measured"]
    items: tuple[Item, ...]


def bill(name: str, runs: Sequence[Run], prices: Prices) -> Bill | None:
    """The bill of one arm, None where its runs did not record what it needs. ``runs`` are alike but for their seed."""
    if not runs[0].history or not all(run.info.raw_bytes for run in runs):
        return None
    make = _cloud_bill if runs[0].info.kind == "centralized" else _federation_bill
    return make(name, runs, prices)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def training_seconds(runs: Sequence[Run]) -> float:
    """Of one run, all rounds and parties together: processor time of the training alone, which a busy machine does not
    lengthen; on an accelerator, and in the runs of earlier versions, by the clock.
    """
    return mean([run.info.processes * math.fsum(trained(run, entry) for entry in run.history) for run in runs])


def trained(run: Run, entry: RoundRecord) -> float:
    """Seconds of a round's training."""
    if entry.times is None:
        return entry.seconds
    return entry.times.training if run.info.device == "cuda" else entry.times.training_processor


def summed(run: Run, entry: RoundRecord) -> float:
    """Seconds of a round beside its training: encoding, secure sum and server, all parties' parts one after another."""
    if entry.times is None:
        return 0.0
    if run.info.device == "cuda":
        return max(entry.seconds - entry.times.training, 0.0)
    return max(entry.times.processor - entry.times.training_processor, 0.0)


def _measured_joules(runs: Sequence[Run]) -> float | None:
    """Of the machine's meters, None unless every round of every run has a reading."""
    readings = [entry.joules for run in runs for entry in run.history if entry.round]
    if not readings or any(reading is None for reading in readings):
        return None
    return math.fsum(reading or 0.0 for reading in readings) / len(runs)


def _cloud_bill(name: str, runs: Sequence[Run], prices: Prices) -> Bill:
    raw = mean([sum(run.info.raw_bytes.values()) for run in runs])
    largest = mean([max(run.info.raw_bytes.values()) for run in runs])
    compute, joules = training_seconds(runs), _measured_joules(runs)
    busy, basis = accelerator_seconds(runs, compute, prices)
    how = "training by the clock, on an accelerator"
    if basis == "modelled":
        how = f"{compute:.3g} s measured on {runs[0].info.device}, over a speed-up of {prices['accelerator_speedup']:g}"
    metered = joules is not None and basis == "measured"
    paid = busy * prices["accelerators"] / together(prices)
    if prices["accelerators"] > 1:
        how += f"; {prices['accelerators']:g} of them, worth {together(prices):.3g} of one"
    items = (
        Item(
            name=_RAW,
            quantity=raw / GB,
            unit="GB",
            basis="measured",
            how="size of all parties' examples as tensors, sent once",
            usd=raw / GB * prices["party_egress_gb"],
            joules=raw * prices["network_joules_per_byte"],
        ),
        Item(
            name=_STORAGE,
            quantity=raw / GB * prices["storage_months"],
            unit="GB-months",
            basis="modelled",
            how=f"kept for {prices['storage_months']:g} month{'s' if prices['storage_months'] != 1 else ''}",
            usd=raw / GB * prices["storage_months"] * prices["storage_gb_month"],
        ),
        Item(
            name="accelerator",
            quantity=paid / 3600,
            unit="hours",
            basis=basis,
            how=how,
            usd=paid / 3600 * prices["accelerator_hour"],
            joules=joules if metered else paid * prices["accelerator_watts"],
        ),
    )
    seconds = 8e-6 * largest / prices["party_mbps"] + busy / together(prices)
    return _bill(name, runs, items, up=largest, down=0.0, seconds=seconds, metered=metered)


def accelerator_seconds(runs: Sequence[Run], compute: float, prices: Prices) -> tuple[float, Basis]:
    if runs[0].info.device == "cuda":
        return compute, "measured"
    return compute / prices["accelerator_speedup"], "modelled"


def together(prices: Prices, count: float | None = None) -> float:
    """What so many accelerators, by default the table's, are worth together, of one: more of them never take longer."""
    return 1.0 + ((prices["accelerators"] if count is None else count) - 1.0) * prices["accelerator_efficiency"]


def between_rounds(prices: Prices, period: float = 0.0) -> float:
    """Seconds from the beginning of a round to that of the next, at least; 0 where they follow on one another.

    period: of the run's own clock, which holds where the price table names no rounds a day.
    """
    return DAY / prices["rounds_per_day"] if prices["rounds_per_day"] else period


def period_of(run: Run) -> float:
    """Seconds from round to round by the clock of the run's participation; 0 where each begins when the last ends."""
    clock = (run.info.participation or {}).get("clock") or {}
    return float(clock.get("period", 0.0))


def _calendar(runs: Sequence[Run], rounds: int, busy: float, prices: Prices) -> tuple[float, Item | None]:
    """How long all rounds take, and the line that says so where they do not simply follow on one another.

    busy: seconds of all rounds themselves. By the price table's rounds a day; else by the times at which the run's
    participation had its rounds begin and end, devices and deadlines included.
    """
    simulated = [[entry for entry in run.history if entry.simulated_start is not None] for run in runs]
    if prices["rounds_per_day"]:
        whole, how = rounds * between_rounds(prices), f"{prices['rounds_per_day']:g} rounds a day, by the price table"
    elif all(simulated):
        spans = [(each[-1].simulated_start or 0) - (each[0].simulated_start or 0) for each in simulated]
        whole = mean(spans) + mean([each[-1].simulated_seconds or 0.0 for each in simulated])
        period = period_of(runs[0])
        how = f"by the run's participation, {f'a round every {period / DAY:.3g} days' if period else 'round by round'}"
        how += f", {100 * share_selected(runs):.3g} % of the parties in a round"
    else:
        return busy, None
    whole = max(whole, busy)
    return whole, Item(name="calendar", quantity=whole / DAY, unit="days", basis="modelled", how=how)


def _federation_bill(name: str, runs: Sequence[Run], prices: Prices) -> Bill:
    info = runs[0].info
    up = mean([sum(entry.bytes_up for entry in run.history) for run in runs])
    down = mean([sum(entry.bytes_down for entry in run.history) for run in runs])
    compute, joules = training_seconds(runs), _measured_joules(runs)
    rounds = runs[0].history[-1].round
    first = float((info.start or {}).get("bytes", 0))
    turn = mean(
        [math.fsum(trained(run, entry) / max(_selected(run, entry), 1) for entry in run.history) for run in runs]
    )
    sums = mean([math.fsum(summed(run, entry) for entry in run.history) for run in runs])
    clock = federated_seconds(rounds, info.processes * turn + sums, up, down + first, prices)
    whole, calendar = _calendar(runs, rounds, clock, prices)
    metered = joules is not None
    spent = compute * prices["device_watts"] if joules is None else joules
    meter = "" if metered else f", at {prices['device_watts']:g} W"
    items = (
        *_traffic(runs, prices),
        Item(
            name="the parties' devices",
            quantity=spent / KWH,
            unit="kWh",
            basis="measured" if metered else "modelled",
            how=f"{compute:.3g} s of training, all parties, measured on {info.device}{meter}",
            usd=spent / KWH * prices["kwh"],
            joules=spent,
        ),
        Item(
            name="server",
            quantity=clock / 3600,
            unit="hours",
            basis="modelled",
            how="rounds one after another, parties at the same time, lines and waits as in the price table",
            usd=clock / 3600 * prices["server_hour"],
            joules=clock * prices["server_watts"],
        ),
        *_initial_weights(first * len(info.parties), prices),
        *([calendar] if calendar else []),
    )
    return _bill(
        name,
        runs,
        items,
        up=up,
        down=down + first,
        seconds=whole,
        metered=metered,
    )


def _traffic(runs: Sequence[Run], prices: Prices) -> tuple[Item, Item]:
    """What all parties sent and received in the rounds, as if each had as much to send as the busiest."""
    up = mean([sum(entry.bytes_up * _selected(run, entry) for entry in run.history) for run in runs])
    down = mean([sum(entry.bytes_down * _selected(run, entry) for entry in run.history) for run in runs])
    busiest = f"the busiest party's, times {len(runs[0].info.parties)} parties: an upper bound"
    if share_selected(runs) < 1:
        busiest = "the busiest party's of each round, times the parties that it selected: an upper bound"
    sent = Item(
        name="sent by the parties",
        quantity=up / GB,
        unit="GB",
        basis="measured",
        how=busiest,
        usd=up / GB * prices["party_egress_gb"],
        joules=up * prices["network_joules_per_byte"],
    )
    received = Item(
        name="sent by the server",
        quantity=down / GB,
        unit="GB",
        basis="measured",
        how=f"{busiest}, models included",
        usd=down / GB * prices["server_egress_gb"],
        joules=down * prices["network_joules_per_byte"],
    )
    return sent, received


def _initial_weights(size: float, prices: Prices) -> tuple[Item, ...]:
    """size: in bytes, to all parties together; nothing where the seed makes the weights."""
    if not size:
        return ()
    item = Item(
        name="initial weights",
        quantity=size / GB,
        unit="GB",
        basis="measured",
        how="their size, sent to each party once",
        usd=size / GB * prices["server_egress_gb"],
        joules=size * prices["network_joules_per_byte"],
    )
    return (item,)


def _selected(run: Run, entry: RoundRecord) -> int:
    """How many parties a round began with; a run of before they were recorded selected all."""
    return len(run.info.parties) if entry.selected is None else entry.selected


def share_selected(runs: Sequence[Run]) -> float:
    """Of the parties, by a round, the mean over rounds and runs."""
    rounds = [(run, entry) for run in runs for entry in run.history if entry.round]
    return mean([_selected(run, entry) / len(run.info.parties) for run, entry in rounds]) if rounds else 1.0


def federated_seconds(rounds: int, party_compute: float, up: float, down: float, prices: Prices) -> float:
    """Of all rounds: waiting, moving bytes, and a party's training."""
    waits = rounds * prices["round_trips"] * prices["round_trip_seconds"]
    return waits + 8e-6 * (up + down) / prices["party_mbps"] + party_compute


def _tuning_item(runs: Sequence[Run], items: Sequence[Item]) -> Item | None:
    """The tries that chose the settings, each priced as the run's own training is; raw data moves, and lies, once."""
    tunings = [run.info.tuning for run in runs if run.info.tuning]
    if not tunings:
        return None
    seconds = math.fsum(tuning["seconds"] for tuning in tunings) / len(runs)
    tries = sum(len(tuning["tries"]) for tuning in tunings) / len(runs)
    own = mean([run.info.processes * math.fsum(entry.seconds for entry in run.history) for run in runs])
    share = seconds / own if own else 0.0
    again = [item for item in items if item.name not in (_RAW, _STORAGE)]
    return Item(
        name="tuning",
        quantity=tries,
        unit="tries",
        basis="measured",
        how=f"{seconds:.3g} s of training to choose the settings, {share:.3g} times those of the run, priced alike",
        usd=share * math.fsum(item.usd or 0.0 for item in again),
        joules=share * math.fsum(item.joules or 0.0 for item in again),
    )


def _bill(
    name: str, runs: Sequence[Run], items: tuple[Item, ...], *, up: float, down: float, seconds: float, metered: bool
) -> Bill:
    if tuning := _tuning_item(runs, items):
        items = (*items, tuning)
    return Bill(
        arm=name,
        kind=runs[0].info.kind,
        rounds=runs[0].history[-1].round,
        bytes_up=up,
        bytes_down=down,
        compute_seconds=training_seconds(runs),
        seconds=seconds,
        usd=math.fsum(item.usd or 0.0 for item in items),
        joules=math.fsum(item.joules or 0.0 for item in items),
        energy="partly measured" if metered else "modelled",
        items=items,
    )
