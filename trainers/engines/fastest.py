"""One by one or stacked, whichever is faster for this model, these parties and this machine: measured, not guessed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import torch

from choral.trainers.algorithms.interface import Done, Failed, LocalTrainer, Work
from choral.trainers.engines.cohort import Cohort
from choral.trainers.engines.direct import Direct, planned
from choral.trainers.local_steps.epochs import Epochs
from choral.trainers.local_steps.resident_model import Resident

_TRIED = 16  # parties that are trained both ways, once in a run
_LONG = 1.0  # seconds, beside which warming up is little


class Fastest:
    """The default trainer. Where ``fit`` is the user's own code, it is the resident trainer.

    Where it is `Epochs`, the first parties of the first round are trained by :class:`Direct` and by :class:`Cohort`,
    the results thrown away, and the faster one is kept for the whole run. Both give the same weights up to rounding.
    """

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.chosen: LocalTrainer | None = None

    @property
    def length(self) -> int:
        return self.resident.length

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        """See :class:`choral.trainers.algorithms.interface.LocalTrainer`."""
        orders = iter(orders)
        if self.chosen is None:
            first = list(islice(orders, _TRIED))
            self.chosen = self._choose(first, weights, round_number)
            orders = chain(first, orders)
        yield from self.chosen.do(orders, weights, round_number)

    def _choose(self, first: list[tuple[str, Work]], weights: torch.Tensor, round_number: int) -> LocalTrainer:
        compile = self.resident.arithmetic.compile
        if not isinstance(self.resident.fit, Epochs):
            return self.resident
        direct, cohort = Direct(self.resident), Cohort(self.resident)
        if len([party for party, work in first if planned(self.resident, party, work, round_number) is not None]) < 2:
            return direct
        tried: list[LocalTrainer] = [direct, *([Direct(self.resident, compiled=False)] if compile else []), cohort]
        seconds = {id(trainer): _seconds(trainer, first, weights, round_number, twice=compile) for trainer in tried}
        there = [trainer for trainer in tried if trainer is not cohort or cohort.stackable]
        return min(there, key=lambda trainer: seconds[id(trainer)])


def _seconds(
    trainer: LocalTrainer, orders: list[tuple[str, Work]], weights: torch.Tensor, round_number: int, *, twice: bool
) -> float:
    """Of the better of two goes after a first one, which also allocates and fills caches; of a long first one, unless
    `twice`, of that one. torch.compile does its work in the first.
    """
    # Of one thread processor time, with which other programs on the machine interfere less.
    alone = weights.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    goes: list[float] = []
    for _ in range(3):
        started = clock()
        for _party, _done in trainer.do(orders, weights, round_number):
            pass
        if weights.device.type == "cuda":
            torch.cuda.synchronize(weights.device)
        goes.append(clock() - started)
        if goes[-1] > _LONG and len(goes) > twice:
            break
    return min(goes[1:] or goes)
