"""What a run costs, in the cloud and as a federation, and where the one becomes cheaper than the other.

A bill is a list of items: a quantity, whether it was measured in the run or is modelled, and the price that it is
multiplied by. What is modelled is said at the item, in words. Money is US dollars, energy joules.

The crossover compares, for n parties of m examples of r bytes each, pooled training in the cloud with the federation:

    cloud       n m (r egress + r storage + R t_a accelerator)
    federation  n R (B bandwidth + m t_d energy) + (R (wait + 8 B / line) + R m t_d) server

with R rounds, t_a and t_d seconds of training per example and round on an accelerator and on a party's device, and B
bytes per party and round; where a round asks a share of the parties only, n is that share of them in the federation's
bandwidth and energy. Both are linear in m, so for every n there is one m above which the federation is cheaper, or
none; the same for the time, where parties train and upload at the same time. It is a model: it has no salaries, no
failed rounds, no minimum billing, and takes B and R not to change with n and m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from choral.audits.costs.prices import Price, Prices

if TYPE_CHECKING:
    from choral.trainers.run_folder.info import RoundRecord
    from choral.trainers.run_folder.run import Run

Basis = Literal["measured", "modelled"]
GB = 1e9
_RAW, _STORAGE = "raw data moved to the cloud", "storage"
KWH = 3.6e6  # joules
PARTIES = tuple(2 * 10 ** (i / 8) for i in range(46))  # 2 to about a million, for drawing
RECORD_BYTES = (100.0, 10_000.0, 1_000_000.0)  # a row of a table, a small picture, a photograph


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


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the crossover is computed from. All per example are means over the run's parties.

    device_seconds, accelerator_seconds: of training, per example and round. up_bytes, down_bytes: sent and received by
    a party that is asked, per round. asked: the share of the parties that a round asks.
    """

    federated: str
    cloud: str
    parties: int
    examples: float
    record_bytes: float
    rounds: int
    up_bytes: float
    down_bytes: float
    device_seconds: float
    accelerator_seconds: float
    accelerator_basis: Basis
    asked: float = 1.0


class CrossoverLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For records of one size: examples per party at which both cost the same, by the number of parties.

    examples: None where the federation costs more whatever the examples. kind: what is compared.
    """

    kind: Literal["usd", "seconds"]
    record_bytes: float
    parties: tuple[float, ...]
    examples: tuple[float | None, ...]


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bills of all arms, the crossover where there is a cloud and a federation, and the prices used."""

    as_of: str
    origin: str
    prices: dict[str, Price]
    bills: tuple[Bill, ...]
    workload: Workload | None = None
    crossover: tuple[CrossoverLine, ...] = ()


def bill(name: str, runs: Sequence[Run], prices: Prices) -> Bill | None:
    """The bill of one arm, None where its runs did not record what it needs. ``runs`` are alike but for their seed."""
    if not runs[0].history or not all(run.info.raw_bytes for run in runs):
        return None
    make = _cloud_bill if runs[0].info.kind == "centralized" else _federation_bill
    return make(name, runs, prices)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _compute(runs: Sequence[Run]) -> float:
    return _mean([run.info.processes * math.fsum(entry.seconds for entry in run.history) for run in runs])


def _measured_joules(runs: Sequence[Run]) -> float | None:
    """Of the machine's meters, None unless every round of every run has a reading."""
    readings = [entry.joules for run in runs for entry in run.history if entry.round]
    if not readings or any(reading is None for reading in readings):
        return None
    return math.fsum(reading or 0.0 for reading in readings) / len(runs)


def _cloud_bill(name: str, runs: Sequence[Run], prices: Prices) -> Bill:
    raw = _mean([sum(run.info.raw_bytes.values()) for run in runs])
    largest = _mean([max(run.info.raw_bytes.values()) for run in runs])
    compute, joules = _compute(runs), _measured_joules(runs)
    busy, basis = _accelerator_seconds(runs, compute, prices)
    how = "wall clock of training, on an accelerator"
    if basis == "modelled":
        how = f"{compute:.3g} s measured on {runs[0].info.device}, over a speed-up of {prices['accelerator_speedup']:g}"
    metered = joules is not None and basis == "measured"
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
            quantity=busy / 3600,
            unit="hours",
            basis=basis,
            how=how,
            usd=busy / 3600 * prices["accelerator_hour"],
            joules=joules if metered else busy * prices["accelerator_watts"],
        ),
    )
    return _bill(
        name, runs, items, up=largest, down=0.0, seconds=8e-6 * largest / prices["party_mbps"] + busy, metered=metered
    )


def _accelerator_seconds(runs: Sequence[Run], compute: float, prices: Prices) -> tuple[float, Basis]:
    if runs[0].info.device == "cuda":
        return compute, "measured"
    return compute / prices["accelerator_speedup"], "modelled"


def _federation_bill(name: str, runs: Sequence[Run], prices: Prices) -> Bill:
    info, count = runs[0].info, len(runs[0].info.parties)
    up = _mean([sum(entry.bytes_up for entry in run.history) for run in runs])
    down = _mean([sum(entry.bytes_down for entry in run.history) for run in runs])
    all_up = _mean([sum(entry.bytes_up * _asked(run, entry) for entry in run.history) for run in runs])
    all_down = _mean([sum(entry.bytes_down * _asked(run, entry) for entry in run.history) for run in runs])
    compute, joules = _compute(runs), _measured_joules(runs)
    rounds = runs[0].history[-1].round
    first = float((info.start or {}).get("bytes", 0))
    turn = _mean([math.fsum(entry.seconds / max(_asked(run, entry), 1) for entry in run.history) for run in runs])
    clock = _federated_seconds(rounds, info.processes * turn, up, down + first, prices)
    metered = joules is not None
    spent = compute * prices["device_watts"] if joules is None else joules
    busiest = f"the busiest party's, times {count} parties: an upper bound"
    if _share_asked(runs) < 1:
        busiest = "the busiest party's of each round, times the parties that it asked: an upper bound"
    meter = "" if metered else f", at {prices['device_watts']:g} W"
    items: tuple[Item, ...] = (
        Item(
            name="sent by the parties",
            quantity=all_up / GB,
            unit="GB",
            basis="measured",
            how=busiest,
            usd=all_up / GB * prices["party_egress_gb"],
            joules=all_up * prices["network_joules_per_byte"],
        ),
        Item(
            name="sent by the server",
            quantity=all_down / GB,
            unit="GB",
            basis="measured",
            how=f"{busiest}, models included",
            usd=all_down / GB * prices["server_egress_gb"],
            joules=all_down * prices["network_joules_per_byte"],
        ),
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
    )
    if first:
        weights = Item(
            name="weights to start from",
            quantity=first * count / GB,
            unit="GB",
            basis="measured",
            how="their size, sent to each party once",
            usd=first * count / GB * prices["server_egress_gb"],
            joules=first * count * prices["network_joules_per_byte"],
        )
        items = (*items, weights)
    return _bill(name, runs, items, up=up, down=down + first, seconds=clock, metered=metered)


def _asked(run: Run, entry: RoundRecord) -> int:
    """How many parties a round began with; a run of before they were recorded asked all."""
    return len(run.info.parties) if entry.asked is None else entry.asked


def _share_asked(runs: Sequence[Run]) -> float:
    """Of the parties, by a round, the mean over rounds and runs."""
    rounds = [(run, entry) for run in runs for entry in run.history if entry.round]
    return _mean([_asked(run, entry) / len(run.info.parties) for run, entry in rounds]) if rounds else 1.0


def _federated_seconds(rounds: int, party_compute: float, up: float, down: float, prices: Prices) -> float:
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
    share = seconds / compute if (compute := _compute(runs)) else 0.0
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
        compute_seconds=_compute(runs),
        seconds=seconds,
        usd=math.fsum(item.usd or 0.0 for item in items),
        joules=math.fsum(item.joules or 0.0 for item in items),
        energy="partly measured" if metered else "modelled",
        items=items,
    )


def workload(
    federated: str, federation: Sequence[Run], cloud: str, pooled: Sequence[Run], prices: Prices
) -> Workload | None:
    """What both kinds of training do per example, party and round; None where the runs did not record it."""
    first, rounds = federation[0].info, federation[0].history[-1].round
    examples = _mean([sum(run.info.parties.values()) for run in federation])
    raw = _mean([sum(run.info.raw_bytes.values()) for run in federation])
    trained = pooled[0].history[-1].round * _mean([sum(run.info.parties.values()) for run in pooled])
    asked = _share_asked(federation)
    if not (rounds and examples and raw and trained and asked):
        return None
    busy, basis = _accelerator_seconds(pooled, _compute(pooled), prices)
    return Workload(
        federated=federated,
        cloud=cloud,
        parties=len(first.parties),
        examples=examples / len(first.parties),
        record_bytes=raw / examples,
        rounds=rounds,
        up_bytes=_mean([sum(entry.bytes_up for entry in run.history) for run in federation]) / rounds,
        down_bytes=_mean([sum(entry.bytes_down for entry in run.history) for run in federation]) / rounds,
        device_seconds=_compute(federation) / (rounds * examples * asked),
        accelerator_seconds=busy / trained,
        accelerator_basis=basis,
        asked=asked,
    )


def examples_to_be_cheaper(work: Workload, prices: Prices, parties: float, record_bytes: float) -> float | None:
    """Examples per party from which the federation costs less money, by the module's model; None if it never does."""
    per_second = work.asked * parties * prices["device_watts"] * prices["kwh"] / KWH + prices["server_hour"] / 3600
    moved = record_bytes / GB * (prices["party_egress_gb"] + prices["storage_months"] * prices["storage_gb_month"])
    pooled = parties * (moved + work.rounds * work.accelerator_seconds * prices["accelerator_hour"] / 3600)
    prices_of_bytes = work.up_bytes * prices["party_egress_gb"] + work.down_bytes * prices["server_egress_gb"]
    wire = work.asked * parties / GB * prices_of_bytes
    fixed = wire + _idle_seconds(work, prices) * prices["server_hour"] / 3600
    return _break_even(work.rounds * fixed, pooled - work.rounds * work.device_seconds * per_second)


def examples_to_be_faster(work: Workload, prices: Prices, parties: float, record_bytes: float) -> float | None:
    """Examples per party from which the federation takes less time; None if it never does."""
    upload = 8e-6 * record_bytes / prices["party_mbps"]
    gained = upload + work.rounds * (parties * work.accelerator_seconds - work.device_seconds)
    return _break_even(work.rounds * _idle_seconds(work, prices), gained)


def _idle_seconds(work: Workload, prices: Prices) -> float:
    """What a round takes besides training."""
    return _federated_seconds(1, 0.0, work.up_bytes, work.down_bytes, prices)


def _break_even(fixed: float, gained_per_example: float) -> float | None:
    return fixed / gained_per_example if gained_per_example > 0 else None


def crossover(work: Workload, prices: Prices) -> tuple[CrossoverLine, ...]:
    """The lines of the drawing: for this run's record size and for three others, by money and by time."""
    sizes = sorted({work.record_bytes, *RECORD_BYTES})

    def line(kind: Literal["usd", "seconds"], size: float) -> CrossoverLine:
        solve = examples_to_be_cheaper if kind == "usd" else examples_to_be_faster
        examples = tuple(solve(work, prices, count, size) for count in PARTIES)
        return CrossoverLine(kind=kind, record_bytes=size, parties=PARTIES, examples=examples)

    return tuple(line("usd", size) for size in sizes) + tuple(line("seconds", size) for size in sizes)


def costs_of(arms: Mapping[str, Sequence[Run]], prices: Prices) -> Costs | None:
    """Bills and crossover of a comparison, or of one run; None where no run recorded what a bill needs.

    The crossover sets the first pooled arm without privacy against the first federated one whose updates the server
    does not see (else the first federated one), both without privacy if there are such.
    """
    bills = [made for name, runs in arms.items() if (made := bill(name, runs, prices))]
    if not bills:
        return None
    pooled, federated = (_first(arms, bills, kind) for kind in ("centralized", "federated"))
    work = None
    if pooled and federated:
        work = workload(federated, arms[federated], pooled, arms[pooled], prices)
    return Costs(
        as_of=prices.as_of,
        origin=prices.origin,
        prices=dict(prices.entries),
        bills=tuple(bills),
        workload=work,
        crossover=crossover(work, prices) if work else (),
    )


def _first(arms: Mapping[str, Sequence[Run]], bills: Sequence[Bill], kind: str) -> str | None:
    def rank(name: str) -> tuple[bool, bool]:
        info = arms[name][0].info
        return info.privacy is not None, (info.secure_sum or {}).get("name") == "plain"

    names = [made.arm for made in bills if made.kind == kind]
    return min(names, key=rank, default=None)
