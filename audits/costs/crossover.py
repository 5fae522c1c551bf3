"""Acceleration or distribution: from how many examples on a federation is cheaper, or faster, than pooled training.

For n parties of m examples of r bytes each, pooled training on k accelerators against the federation:

    cloud money       n m (r (egress + storage) + R_c t_a accelerator_hour k / K)
    cloud time        8 m r / line + n m R_c t_a / K
    federation money  n s R (B bandwidth + m t_d energy) + R (w + 8 B / line + o + m t_d) server
    federation time   R max(w + 8 B / line + o + m t_d, pause)

R_c and R are the rounds of each side, which differ; t_a and t_d seconds of training per example and round, on an
accelerator and on a party's device; K = 1 + (k - 1) e what k accelerators are worth together, e their efficiency; B
bytes per party and round; s the share of the parties that a round selects; w the waits of a round; o what a round takes
besides its training: encoding, secure sum and server. pause: a day over the rounds a day, or what the run's clock says
from round to round. The server is paid while a round goes on, not until the next one.

Money is linear in m on both sides, so for every n there is one m above which distribution is cheaper, or none; time is
linear beyond the point where training fills the time between two rounds. It is a model: it has no salaries, no failed
rounds, no minimum billing, and takes R, B and o not to change with n and m.
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
    between_rounds,
    federated_seconds,
    mean,
    period_of,
    share_selected,
    summed,
    together,
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

    rounds, cloud_rounds: of each side; None is as many as the federation's. device_seconds, accelerator_seconds: of
    training, per example and round. sum_seconds: of a round besides its training, all parties one after another.
    up_bytes, down_bytes: sent and received by a party that is selected, per round. selected: the share of the parties
    that a round selects. model_bytes: of the weights, float32; 0 in the reports of earlier versions. period: seconds
    from round to round by the federation's own clock, 0 where they follow on one another.
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
    cloud_rounds: int | None = None
    sum_seconds: float = 0.0
    model_bytes: float = 0.0
    period: float = 0.0

    @property
    def passes(self) -> int:
        """Rounds of the pooled training."""
        return self.rounds if self.cloud_rounds is None else self.cloud_rounds


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
    passes = pooled[0].history[-1].round
    in_cloud = passes * mean([sum(run.info.parties.values()) for run in pooled])
    selected = share_selected(federation)
    if not (rounds and examples and raw and in_cloud and selected):
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
        accelerator_seconds=busy / in_cloud,
        accelerator_basis=basis,
        selected=selected,
        cloud_rounds=passes,
        sum_seconds=mean([sum(summed(run, entry) for entry in run.history) for run in federation]) / rounds,
        model_bytes=4.0 * first.parameters,
        period=period_of(federation[0]),
    )


def cloud_usd(work: Workload, prices: Prices, parties: float, examples: float, record_bytes: float) -> float:
    """Of the module's model, as of the three functions below. examples: of each party."""
    moved = record_bytes / GB * (prices["party_egress_gb"] + prices["storage_months"] * prices["storage_gb_month"])
    hours = work.passes * work.accelerator_seconds / 3600 * prices["accelerators"] / together(prices)
    return parties * examples * (moved + hours * prices["accelerator_hour"])


def cloud_seconds(work: Workload, prices: Prices, parties: float, examples: float, record_bytes: float) -> float:
    upload = 8e-6 * record_bytes / prices["party_mbps"]
    return examples * (upload + parties * work.passes * work.accelerator_seconds / together(prices))


def federation_usd(work: Workload, prices: Prices, parties: float, examples: float) -> float:
    taking_part, device = work.selected * parties, examples * work.device_seconds
    wire = work.up_bytes * prices["party_egress_gb"] + work.down_bytes * prices["server_egress_gb"]
    energy = device * prices["device_watts"] * prices["kwh"] / KWH
    server = (_besides_training(work, prices) + device) * prices["server_hour"] / 3600
    return work.rounds * (taking_part * (wire / GB + energy) + server)


def federation_seconds(work: Workload, prices: Prices, examples: float) -> float:
    """Of however many parties: they train at the same time."""
    busy = _besides_training(work, prices) + examples * work.device_seconds
    return work.rounds * max(busy, between_rounds(prices, work.period))


def examples_to_be_cheaper(work: Workload, prices: Prices, parties: float, record_bytes: float) -> float | None:
    """Examples per party from which the federation costs less money, by the module's model; None if it never does."""
    fixed = federation_usd(work, prices, parties, 0.0)
    more = federation_usd(work, prices, parties, 1.0) - fixed
    return _break_even(fixed, cloud_usd(work, prices, parties, 1.0, record_bytes) - more)


def examples_to_be_faster(work: Workload, prices: Prices, parties: float, record_bytes: float) -> float | None:
    """Examples per party from which the federation takes less time; None if it never does."""
    pooled = cloud_seconds(work, prices, parties, 1.0, record_bytes)
    between, idle = between_rounds(prices, work.period), _besides_training(work, prices)
    if pooled and between > idle:  # first while training fits between two rounds
        waited = work.rounds * between / pooled
        if idle + waited * work.device_seconds <= between:
            return waited
    return _break_even(work.rounds * idle, pooled - work.rounds * work.device_seconds)


def _besides_training(work: Workload, prices: Prices) -> float:
    """Seconds of a round."""
    return federated_seconds(1, work.sum_seconds, work.up_bytes, work.down_bytes, prices)


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
