"""Many parties at once: their models as one stack, their gradients by ``torch.func.vmap``.

A step costs one call of each operation for the whole stack, where small models spend most of their time on calling;
on an accelerator more still. The weights equal those of one party after the other up to the rounding of floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from choral.trainers.algorithms.interface import Done, Failed, Train, Work
from choral.trainers.engines.direct import Direct, path_of, planned
from choral.trainers.local_steps.epochs import Criterion, EpochPlan, has_hooks, per_record
from choral.trainers.local_steps.resident_model import Resident, attempted
from choral.trainers.task.seeding import drawn_since, luck, seed_of, seeded

AT_ONCE = 64  # parties in a stack, at most
# Whose mean is the mean of their records' values, if no class is ignored.
MEANS_OF_RECORDS = (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.smooth_l1_loss)
_NUMBERS = 1 << 26  # of all models in a stack and their gradients, 256 MiB


class StackedParty(NamedTuple):
    """One party of a stack."""

    party: str
    plan: EpochPlan
    work: Train


class Cohort:
    """Stacks of the parties whose training is `Epochs` on tensors; what it does not know is left to `Direct`.

    at_once: parties in a stack; by default as many as memory allows, up to 64. Parties take their turns one by one
    where the model draws random numbers (dropout) or changes buffers, which torch refuses within vmap; has hooks, other
    numbers than float32, or parameters without a gradient. Batches of unequal length are padded where one record's
    loss depends on that record alone; else only parties of equal size are stacked. Precision is the run's; stacks are
    not compiled, since each new size would be compiled again.
    """

    def __init__(self, resident: Resident, at_once: int | None = None) -> None:
        self.resident, self._direct = resident, Direct(resident)
        self.at_once = at_once or max(1, min(AT_ONCE, _NUMBERS // (4 * resident.length)))
        single = all(parameter.dtype == torch.float32 for parameter in resident.layout.parameters)
        self.stackable = single and not has_hooks(resident.model)  # until torch says otherwise
        self.pads: bool | None = None  # unknown yet
        names = list(resident.layout.shapes)

        def outputs_of(flat: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            weights = dict(zip(names, resident.layout.pieces(flat), strict=True))
            with resident.arithmetic.reduced():
                outputs = functional_call(resident.model, weights, (inputs,))
            reduced: torch.Tensor = resident.arithmetic.returned(outputs)
            return reduced

        def mean(flat: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self._criterion(outputs_of(flat, inputs), targets, reduction="mean")

        def padded(flat: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
            return (per_record(self._criterion, outputs_of(flat, inputs), targets) * part).sum()

        self._mean, self._mean_padded = vmap(grad(mean)), vmap(grad(padded))

    @property
    def length(self) -> int:
        return self.resident.length

    @property
    def _criterion(self) -> Criterion:
        criterion: Criterion = self.resident.fit.criterion  # type: ignore[attr-defined]
        return criterion

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        """See :class:`choral.trainers.algorithms.interface.LocalTrainer`; a stack is read ahead."""
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
    ) -> Iterator[tuple[str, Done | Failed]]:
        """The results of the parties that fit into one stack: those whose optimizer has the first one's settings."""
        members: list[StackedParty] = []
        for party, work in chunk:
            plan = planned(self.resident, party, work, round_number) if self.stackable else None
            if plan is None or not isinstance(work, Train):
                continue
            if self.pads is None:
                self._examine(StackedParty(party, plan, work), weights, round_number)
            if self.stackable and _alike(plan, members, padded=bool(self.pads) and keeps_all(plan)):
                members.append(StackedParty(party, plan, work))
        if len(members) < 2:
            return
        members.sort(key=lambda member: -member.plan.steps)
        try:
            vectors = self._train(members, weights, round_number)
            self.resident.check_fixed(members[0].party)
        except Exception:  # random numbers, changed buffers, control flow by data: whatever it is, Direct will tell
            self.stackable = False
            self.resident.recover()
            return
        for member, vector in zip(members, vectors, strict=True):
            done = Done(vector=vector, steps=member.plan.steps, path=path_of(member.plan))
            yield member.party, attempted(partial(_same, done), member.party, round_number)

    def _examine(self, member: StackedParty, weights: torch.Tensor, round_number: int) -> None:
        """See on one batch whether the model can be stacked, and whether records that weigh nothing change nothing."""
        model, layout, plan = self.resident.model, self.resident.layout, member.plan
        layout.write(weights)
        model.train()
        self.pads = False
        try:
            with seeded(self.resident.seed, round_number, member.party):
                rows = next(plan.batches())
                inputs, targets = plan.inputs[rows.to(plan.inputs.device)], plan.targets[rows.to(plan.inputs.device)]
                before = luck()
                outputs = model(inputs)  # in float32: rounding would hide what is looked for
                draws = drawn_since(before) or bool(self.resident.own_generators)
                mean = self._criterion(outputs, targets, reduction="mean")
                slopes = torch.autograd.grad(mean, layout.parameters, allow_unused=True)
                with torch.no_grad():
                    more = model(torch.cat([inputs, inputs[:1], inputs[:1]]))
                    labels = torch.cat([targets, targets[:1], targets[:1]])
                    part = per_record(self._criterion, more, labels)[: len(rows)].mean()
        except Exception:  # Direct will tell what is wrong, if anything is
            self.stackable = False
            return
        self.stackable = not draws and all(slope is not None for slope in slopes)
        self.pads = self._criterion in MEANS_OF_RECORDS and _close(more[: len(rows)], outputs) and _close(part, mean)

    def _train(self, members: list[StackedParty], weights: torch.Tensor, round_number: int) -> torch.Tensor:
        """The changes of all members' weights, shape (members, d). Members are sorted by falling number of steps."""
        self.resident.model.train()
        index, share, lengths = self._batches(members, round_number)
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
            mine = now[:active]
            if len(lengths[step]) == 1:
                rows = index[:active, step, : min(lengths[step])]
                slope = self._mean(mine, inputs[rows], targets[rows])
            else:
                rows = index[:active, step]
                slope = self._mean_padded(mine, inputs[rows], targets[rows], share[:active, step])
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

    def _batches(
        self, members: list[StackedParty], round_number: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[set[int]]]:
        """Rows of the concatenated records and their share of the mean, both of shape (members, steps, batch).

        Also, for each step, the lengths that its batches have.
        """
        width = max(min(member.plan.batch_size, member.plan.records) for member in members)
        shape = (len(members), members[0].plan.steps, width)
        index, share, offset = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), 0
        lengths: list[set[int]] = [set() for _ in range(shape[1])]
        for place, member in enumerate(members):
            index[place] = (
                offset  # what pads a batch is the party's own: another's would reach it where it is not finite
            )
            drawn = torch.Generator().manual_seed(seed_of(self.resident.seed, round_number, member.party))
            for step, batch in enumerate(member.plan.batches(drawn)):
                index[place, step, : len(batch)] = batch + offset
                share[place, step, : len(batch)] = 1.0 / len(batch)
                lengths[step].add(len(batch))
            offset += member.plan.records
        device = members[0].plan.inputs.device
        return index.to(device), share.to(device), lengths


def _same(done: Done) -> Done:
    return done


def keeps_all(plan: EpochPlan) -> bool:
    """Whether the criterion's mean counts every record: none of a class to be ignored."""
    return plan.targets.is_floating_point() or bool((plan.targets >= 0).all())


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def _alike(plan: EpochPlan, members: list[StackedParty], *, padded: bool) -> bool:
    """Whether the party fits into the stack; where nothing may be padded, with batches of the same lengths."""
    if not members:
        return True
    first = members[0].plan
    lengths = [(p.records, min(p.batch_size, p.records), p.drop_last) for p in (plan, first)]
    if lengths[0] != lengths[1] and not (padded and keeps_all(first)):
        return False
    shapes_agree = (plan.inputs.shape[1:], plan.targets.shape[1:]) == (first.inputs.shape[1:], first.targets.shape[1:])
    types_agree = (plan.inputs.dtype, plan.targets.dtype) == (first.inputs.dtype, first.targets.dtype)
    settings = [(p.momentum, p.weight_decay, p.nesterov) for p in (plan, first)]
    return shapes_agree and types_agree and settings[0] == settings[1]


def _shifts(members: list[StackedParty], weights: torch.Tensor) -> torch.Tensor | None:
    if all(member.work.shift is None for member in members):
        return None
    none = torch.zeros_like(weights)
    return torch.stack([none if m.work.shift is None else m.work.shift.to(weights) for m in members])
