"""Many parties at once: their models as one stack, their gradients by ``torch.func.vmap``.

A step costs one call of each operation for the whole stack, where small models spend most of their time on calling;
on an accelerator more still. The weights equal those of one party after the other up to the rounding of floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch.func import functional_call, grad, vmap

from choral.trainers.algorithms.seam import Done, Train, Work
from choral.trainers.engines.direct import Direct, path_of, planned
from choral.trainers.epochs import Plan, per_record
from choral.trainers.local import Resident, refuse_diverged, seeded

AT_ONCE = 64  # parties in a stack, at most
_NUMBERS = 1 << 26  # of all models in a stack and their gradients, 256 MiB


class Member(NamedTuple):
    """One party of a stack."""

    party: str
    plan: Plan
    work: Train


class Cohort:
    """Stacks of the parties whose training is `Epochs` on tensors; what it does not know is left to `Direct`.

    at_once: parties in a stack; by default as many as memory allows, up to 64. The model may not draw random numbers
    (dropout) or change buffers: torch refuses that within vmap, and such parties take their turns one by one.
    """

    def __init__(self, resident: Resident, at_once: int | None = None) -> None:
        self.resident, self._direct = resident, Direct(resident)
        self.at_once = at_once or max(1, min(AT_ONCE, _NUMBERS // (4 * resident.length)))
        self.stackable = True  # until torch says otherwise
        names = list(resident.layout.shapes)

        def loss(flat: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
            weights = dict(zip(names, resident.layout.pieces(flat), strict=True))
            outputs = functional_call(resident.model, weights, (inputs,))
            return (per_record(resident.fit.criterion, outputs, targets) * share).sum()  # type: ignore[attr-defined]

        self._gradients = vmap(grad(loss))

    @property
    def length(self) -> int:
        return self.resident.length

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done]]:
        """See :class:`choral.trainers.algorithms.seam.LocalTrainer`; a stack is read ahead."""
        orders = iter(orders)
        while chunk := list(islice(orders, self.at_once)):
            done = dict(self._stacked(chunk, weights, round_number))
            for party, work in chunk:
                if party in done:
                    yield party, done.pop(party)
                else:
                    yield from self._direct.do([(party, work)], weights, round_number)

    def _stacked(
        self, chunk: Sequence[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done]]:
        """The results of the parties that fit into one stack: those whose optimizer has the first one's settings."""
        members: list[Member] = []
        for party, work in chunk:
            plan = planned(self.resident, party, work) if self.stackable else None
            if plan is not None and isinstance(work, Train) and _alike(plan, members):
                members.append(Member(party, plan, work))
        if len(members) < 2:
            return
        members.sort(key=lambda member: -member.plan.steps)
        try:
            vectors = self._train(members, weights, round_number)
        except RuntimeError as error:
            if "vmap" not in str(error) and "functorch" not in str(error):
                raise
            self.stackable = False  # random numbers, changed buffers, data-dependent control flow
            return
        self.resident.check_fixed(members[0].party)
        for member, vector in zip(members, vectors, strict=True):
            refuse_diverged(vector, member.party, round_number)
            yield member.party, Done(vector=vector, steps=member.plan.steps, path=path_of(member.plan))

    def _train(self, members: list[Member], weights: torch.Tensor, round_number: int) -> torch.Tensor:
        """The changes of all members' weights, shape (members, d). Members are sorted by falling number of steps."""
        self.resident.model.train()
        index, share = self._batches(members, round_number)
        inputs = torch.cat([member.plan.inputs for member in members])
        targets = torch.cat([member.plan.targets for member in members])
        now = weights.expand(len(members), -1).clone()
        first = members[0].plan
        rates = weights.new_tensor([[member.plan.learning_rate] for member in members])
        pulls = weights.new_tensor([[member.work.pull] for member in members])
        shifts = _shifts(members, weights)
        velocity = torch.zeros_like(now) if first.momentum else None
        steps = [member.plan.steps for member in members]
        active = len(members)
        for step in range(steps[0]):
            while steps[active - 1] <= step:
                active -= 1
            rows = index[:active, step]
            mine = now[:active]
            slope = self._gradients(mine, inputs[rows], targets[rows], share[:active, step])
            if bool(pulls.any()):
                slope = slope + pulls[:active] * (mine - weights)
            if shifts is not None:
                slope = slope + shifts[:active]
            if first.weight_decay:
                slope = slope + first.weight_decay * mine
            if velocity is not None:
                mass = velocity[:active]
                mass.mul_(first.momentum).add_(slope)
                slope = slope + first.momentum * mass if first.nesterov else mass
            mine.addcmul_(rates[:active], slope, value=-1.0)
        return now - weights

    def _batches(self, members: list[Member], round_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the concatenated records and their share of the mean, both of shape (members, steps, batch)."""
        width = max(min(member.plan.batch_size, member.plan.records) for member in members)
        shape = (len(members), members[0].plan.steps, width)
        index, share, offset = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), 0
        for place, member in enumerate(members):
            with seeded(self.resident.seed, round_number, member.party):
                for step, batch in enumerate(member.plan.batches()):
                    index[place, step, : len(batch)] = batch + offset
                    share[place, step, : len(batch)] = 1.0 / len(batch)
            offset += member.plan.records
        device = members[0].plan.inputs.device
        return index.to(device), share.to(device)


def _alike(plan: Plan, members: list[Member]) -> bool:
    if not members:
        return True
    first = members[0].plan
    shapes_agree = (plan.inputs.shape[1:], plan.targets.shape[1:]) == (first.inputs.shape[1:], first.targets.shape[1:])
    types_agree = (plan.inputs.dtype, plan.targets.dtype) == (first.inputs.dtype, first.targets.dtype)
    settings = [(p.momentum, p.weight_decay, p.nesterov) for p in (plan, first)]
    return shapes_agree and types_agree and settings[0] == settings[1]


def _shifts(members: list[Member], weights: torch.Tensor) -> torch.Tensor | None:
    if all(member.work.shift is None for member in members):
        return None
    none = torch.zeros_like(weights)
    return torch.stack([none if m.work.shift is None else m.work.shift.to(weights) for m in members])
