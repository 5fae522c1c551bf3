"""The crossover: how many examples make a federation cheaper, or faster, than pooled training in the cloud.

It compares, for n parties of m examples of r bytes each, pooled training in the cloud with the federation:

    cloud       n m (r egress + r storage + R t_a accelerator)
    federation  n R (B bandwidth + m t_d energy) + (R (wait + 8 B / line) + R m t_d) server

with R rounds, t_a and t_d seconds of training per example and round on an accelerator and on a party's device, and B
bytes per party and round; where a round selects a share of the parties only, n is that share in the federation's
bandwidth and energy. Both are linear in m, so for every n there is one m above which the federation is cheaper, or
none; the same for the time, where parties train and upload at the same time. It is a model: it has no salaries, no
failed rounds, no minimum billing, and takes B and R not to change with n and m.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from choral.audits.costs.bills import (
    GB,
    KWH,
    Basis,
    accelerator_seconds,
    federated_seconds,
    mean,
    share_selected,
    training_seconds,
)
from choral.audits.costs.prices import Prices

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

PARTIES = tuple(2 * 10 ** (i / 8) for i in range(46))  # 2 to about a million, for drawing
RECORD_BYTES = (100.0, 10_000.0, 1_000_000.0)  # a row of a table, a small picture, a photograph


_KEYS = {"selected": "asked"}  # in report.json, since version 1


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_KEYS):
    """What the crossover is computed from. All per example are means over the run's parties.

    device_seconds, accelerator_seconds: of training, per example and round. up_bytes, down_bytes: sent and received by
    a party that is selected, per round. selected: the share of the parties that a round selects.
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
    selected: float = 1.0


class CrossoverLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For records of one size: examples per party at which both cost the same, by the number of parties.

    examples: None where the federation costs more whatever the examples. kind: what is compared.
    """

    kind: Literal["usd", "seconds"]
    record_bytes: float
    parties: tuple[float, ...]
    examples: tuple[float | None, ...]


def workload(
    federated: str, federation: Sequence[Run], cloud: str, pooled: Sequence[Run], prices: Prices
) -> Workload | None:
    """What both kinds of training do per example, party and round; None where the runs did not record it."""
    first, rounds = federation[0].info, federation[0].history[-1].round
    examples = mean([sum(run.info.parties.values()) for run in federation])
    raw = mean([sum(run.info.raw_bytes.values()) for run in federation])
    trained = pooled[0].history[-1].round * mean([sum(run.info.parties.values()) for run in pooled])
    selected = share_selected(federation)
    if not (rounds and examples and raw and trained and selected):
        return None
    busy, basis = accelerator_seconds(pooled, training_seconds(pooled), prices)
    return Workload(
        federated=federated,
        cloud=cloud,
        parties=len(first.parties),
        examples=examples / len(first.parties),
        record_bytes=raw / examples,
        rounds=rounds,
        up_bytes=mean([sum(entry.bytes_up for entry in run.history) for run in federation]) / rounds,
        down_bytes=mean([sum(entry.bytes_down for entry in run.history) for run in federation]) / rounds,
        device_seconds=training_seconds(federation) / (rounds * examples * selected),
        accelerator_seconds=busy / trained,
        accelerator_basis=basis,
        selected=selected,
    )


def examples_to_be_cheaper(work: Workload, prices: Prices, parties: float, record_bytes: float) -> float | None:
    """Examples per party from which the federation costs less money, by the module's model; None if it never does."""
    per_second = work.selected * parties * prices["device_watts"] * prices["kwh"] / KWH + prices["server_hour"] / 3600
    moved = record_bytes / GB * (prices["party_egress_gb"] + prices["storage_months"] * prices["storage_gb_month"])
    pooled = parties * (moved + work.rounds * work.accelerator_seconds * prices["accelerator_hour"] / 3600)
    prices_of_bytes = work.up_bytes * prices["party_egress_gb"] + work.down_bytes * prices["server_egress_gb"]
    wire = work.selected * parties / GB * prices_of_bytes
    fixed = wire + _idle_seconds(work, prices) * prices["server_hour"] / 3600
    return _break_even(work.rounds * fixed, pooled - work.rounds * work.device_seconds * per_second)


def examples_to_be_faster(work: Workload, prices: Prices, parties: float, record_bytes: float) -> float | None:
    """Examples per party from which the federation takes less time; None if it never does."""
    upload = 8e-6 * record_bytes / prices["party_mbps"]
    gained = upload + work.rounds * (parties * work.accelerator_seconds - work.device_seconds)
    return _break_even(work.rounds * _idle_seconds(work, prices), gained)


def _idle_seconds(work: Workload, prices: Prices) -> float:
    """What a round takes besides training."""
    return federated_seconds(1, 0.0, work.up_bytes, work.down_bytes, prices)


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
