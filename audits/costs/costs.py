"""What a comparison, or one run, costs: bills of all arms, and where the one becomes cheaper than the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from choral.audits.costs.bills import Bill, bill
from choral.audits.costs.crossover import CrossoverLine, Workload, crossover, workload
from choral.audits.costs.job_bills import JobBill
from choral.audits.costs.on_device import OneCore
from choral.audits.costs.prices import Price, Prices
from choral.audits.costs.target import Target
from choral.audits.costs.winners import WinnerMap

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bills of all arms, the crossover where there is a cloud and a federation, and the prices used.

    target: what each run cost until it was as good as stated, or as 95 % of the baseline; None of a single run. maps:
    who wins, over parties and sizes of records, at equal accuracy and privacy. job: bills of the reader's own job.
    on_device: what inference, a local epoch and the full data ask of one core, None where nobody measured it.
    """

    as_of: str
    origin: str
    prices: dict[str, Price]
    bills: tuple[Bill, ...]
    workload: Workload | None = None
    crossover: tuple[CrossoverLine, ...] = ()
    target: Target | None = None
    maps: tuple[WinnerMap, ...] = ()
    job: tuple[JobBill, ...] = ()
    on_device: OneCore | None = None


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
