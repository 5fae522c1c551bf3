"""One party after the other, without loader and optimizer: batches gathered from tensors, fused steps, closed forms.

The arithmetic is that of `Epochs` on the resident model, and so are the weights, bit for bit; for linear models with a
known criterion the gradient is written down instead of differentiated, and equal up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from choral.trainers.algorithms.interface import Done, Failed, Train, Work
from choral.trainers.local_steps.corrections import refuse_sparse
from choral.trainers.local_steps.epochs import Criterion, EpochPlan, Epochs, has_hooks, plan_of
from choral.trainers.local_steps.resident_model import Resident, attempted
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.flat_vector import several
from choral.trainers.task.seeding import reseed, seed_of, seeded, torch_seeded


class Slope(NamedTuple):
    """The gradient of a mean criterion in the outputs: factor * (link(outputs) - targets) / (records or numbers).

    classes: targets are class numbers, here as rows of zeros and a one, and the mean is over records.
    """

    link: Callable[[torch.Tensor], torch.Tensor]
    factor: float = 1.0
    classes: bool = False


class Direct:
    """The parties whose training is `Epochs` on tensors; what it does not know is left to the resident trainer."""

    def __init__(self, resident: Resident, *, compiled: bool = True) -> None:
        """compiled: compile the model, where the run asks for that at all."""
        self.resident = resident
        kept = resident.arithmetic
        self._arithmetic = kept if compiled or not kept.compile else Arithmetic(kept.device, kept.precision)
        self._linear = linear_layer(resident.model)
        criterion = resident.fit.criterion if isinstance(resident.fit, Epochs) else None
        self._slope = slope_of(criterion) if criterion is not None else None
        # No code of the user's own: nothing that draws from numpy's or Python's generator.
        parts = [*map(type, resident.model.modules()), criterion]
        self._torch_alone = all(str(getattr(part, "__module__", "")).startswith("torch.") for part in parts)

    @property
    def length(self) -> int:
        return self.resident.length

    @property
    def closed_form(self) -> bool:
        """Whether gradients are written down rather than differentiated."""
        return self._linear is not None and self._slope is not None and self._arithmetic.precision == "float32"

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        """See :class:`choral.trainers.algorithms.interface.LocalTrainer`; a few small ones are seated ahead."""
        plans = ((party, work, planned(self.resident, party, work, round_number)) for party, work in orders)
        for party, work, plan in several(plans, self.length):
            if plan is None or not isinstance(work, Train):
                yield from self.resident.do([(party, work)], weights, round_number)
                continue

            def make(party: str = party, plan: EpochPlan = plan, work: Train = work) -> Done:
                done = self.train(party, plan, work, weights, round_number)
                self.resident.check_fixed(party)
                return done

            made = attempted(make, party, round_number)
            if isinstance(made, Failed):
                self.resident.recover()
            yield party, made

    def train(self, party: str, plan: EpochPlan, work: Train, weights: torch.Tensor, round_number: int) -> Done:
        """Train on one party's tensors from `weights`, shape (d,)."""
        layout, seed = self.resident.layout, self.resident.seed
        layout.write(weights)
        self.resident.model.train()
        layer, slope = self._linear, self._slope
        if (
            self.closed_form
            and layer is not None
            and slope is not None
            and fits(layer, slope, plan, flattens=layer is not self.resident.model)
        ):
            # Nothing but the order is random here: torch's own generator need not be put aside and back.
            drawn = torch.Generator().manual_seed(seed_of(seed, round_number, party))
            descend(layer, slope, plan, Step(plan, work, layout.pieces(weights), layout.parameters), drawn)
        else:
            seeding = torch_seeded if self._torch_alone else seeded
            reseed(self.resident.own_generators, seed, round_number, party)
            with seeding(seed, round_number, party), self._arithmetic.over(self.resident.model, party):
                self._differentiate(plan, Step(plan, work, layout.pieces(weights), layout.parameters))
        return Done(vector=layout.read() - weights, steps=plan.steps, path=path_of(plan))

    def _differentiate(self, plan: EpochPlan, step: Step) -> None:
        model, parameters = self.resident.model, self.resident.layout.parameters
        criterion = self.resident.fit.criterion  # type: ignore[attr-defined]
        for inputs, targets in plan.data():
            loss = criterion(model(inputs), targets, reduction="mean")
            slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
            if step.corrects:
                for name, slope in zip(self.resident.layout.shapes, slopes, strict=True):
                    refuse_sparse(name, slope)
            step(list(slopes))


class Step:
    """One step of SGD on all parameters at once, with the algorithm's correction; torch's own order of operations."""

    def __init__(
        self, plan: EpochPlan, work: Train, start: list[torch.Tensor], parameters: list[torch.nn.Parameter]
    ) -> None:
        self._plan, self._work, self._start = plan, work, start
        self._data = [parameter.data for parameter in parameters]
        self._shift = None if work.shift is None else _like(work.shift, start)
        self._velocity: dict[int, torch.Tensor] = {}
        self.corrects = work.corrects
        self.plain = not (work.corrects or plan.momentum or plan.weight_decay)  # a rate times the gradient, no more

    @torch.no_grad()
    def __call__(self, slopes: Sequence[torch.Tensor | None]) -> None:
        """slopes: per parameter; SGD leaves one without a gradient as it is, unless something corrects the gradient."""
        plan, work = self._plan, self._work
        if work.corrects:
            slopes = [torch.zeros_like(d) if s is None else s for s, d in zip(slopes, self._data, strict=True)]
        places = [place for place, slope in enumerate(slopes) if slope is not None]
        gradients, data = [slope for slope in slopes if slope is not None], [self._data[place] for place in places]
        if not places:
            return
        if work.pull:
            torch._foreach_add_(gradients, torch._foreach_sub(data, self._start), alpha=work.pull)
        if self._shift is not None:
            torch._foreach_add_(gradients, self._shift)
        if plan.weight_decay:
            torch._foreach_add_(gradients, data, alpha=plan.weight_decay)
        if plan.momentum:
            velocities = self._accelerated(places, gradients)
            if plan.nesterov:
                torch._foreach_add_(gradients, velocities, alpha=plan.momentum)
            else:
                gradients = velocities
        torch._foreach_add_(data, gradients, alpha=-plan.learning_rate)

    def _accelerated(self, places: list[int], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """The velocities of the parameters at `places` after these gradients; the first gradient is the velocity."""
        slopes = dict(zip(places, gradients, strict=True))
        moving = [place for place in places if place in self._velocity]
        if moving:
            known = [self._velocity[place] for place in moving]
            torch._foreach_mul_(known, self._plan.momentum)
            torch._foreach_add_(known, [slopes[place] for place in moving])
        self._velocity |= {place: slopes[place].clone() for place in places if place not in self._velocity}
        return [self._velocity[place] for place in places]


def planned(resident: Resident, party: str, work: Work, round_number: int) -> EpochPlan | None:
    """The party's training in tensors, or None where the resident trainer must do it: other work, private parties."""
    if not isinstance(work, Train) or resident.privacy_engines:
        return None
    try:
        seat = resident.seat(party)
    except Exception:  # the resident trainer will meet it, too, and say so
        return None
    if seat.plan is None:
        plan = plan_of(resident.fit, resident.model, seat.optimizer, seat.loader, resident.device)
        seat.plan = plan if plan is not None and plan.steps else False
    if not seat.plan or (factor := resident.rate_factor(round_number)) == 1.0:
        return seat.plan or None
    return dataclasses.replace(seat.plan, learning_rate=seat.plan.learning_rate * factor)


def path_of(plan: EpochPlan) -> float | None:
    """The sum of the learning rates of all steps; None with momentum. See :class:`Done`."""
    # Added one by one, as the optimizer's steps are: from Python 3.12 on, sum() of floats rounds once only.
    return None if plan.momentum else functools.reduce(operator.add, [plan.learning_rate] * plan.steps, 0.0)


def linear_layer(model: nn.Module) -> nn.Linear | None:
    """The layer, if the model is one linear layer behind nothing but flattening; all its parameters trainable."""
    if has_hooks(model):
        return None
    layers = list(model) if type(model) is nn.Sequential else [model]
    while len(layers) > 1 and type(layers[0]) is nn.Flatten and (layers[0].start_dim, layers[0].end_dim) == (1, -1):
        layers = layers[1:]
    layer = layers[0] if len(layers) == 1 else None
    if type(layer) is not nn.Linear or not all(p.requires_grad for p in layer.parameters()):
        return None
    return layer


def fits(layer: nn.Linear, slope: Slope, plan: EpochPlan, *, flattens: bool) -> bool:
    """Whether each record is one row of features of this layer, with targets that the slope knows."""
    inputs, targets = plan.inputs, plan.targets
    if inputs.dtype != layer.weight.dtype or inputs[0].numel() != layer.in_features:
        return False
    if not flattens and inputs.ndim != 2:
        return False
    if slope.classes:  # none to be ignored
        known = targets.dtype in (torch.int64, torch.uint8) and targets.ndim == 1
        return known and bool(((targets >= 0) & (targets < layer.out_features)).all())
    return targets.shape == (len(inputs), layer.out_features)


def slope_of(criterion: Criterion) -> Slope | None:
    """The slope of those criteria whose gradient is known in closed form."""
    if criterion is F.cross_entropy:
        return Slope(lambda outputs: torch.softmax(outputs, dim=-1), classes=True)
    if criterion is F.binary_cross_entropy_with_logits:
        return Slope(torch.sigmoid)
    if criterion is F.mse_loss:
        return Slope(lambda outputs: outputs, factor=2.0)
    return None


@torch.inference_mode()
def descend(layer: nn.Linear, slope: Slope, plan: EpochPlan, step: Step, drawn: torch.Generator) -> None:
    """Every step of the plan on a linear layer: the gradient is the slope's product with the inputs.

    drawn: where the order of the records comes from.
    """
    weight, bias = layer.weight.data, None if layer.bias is None else layer.bias.data
    targets = F.one_hot(plan.targets.long(), layer.out_features) if slope.classes else plan.targets
    plan = dataclasses.replace(plan, inputs=plan.inputs.flatten(1), targets=targets.to(weight.dtype))
    ones = torch.ones(min(plan.batch_size, plan.records), dtype=weight.dtype, device=weight.device)
    for inputs, wanted in plan.data(drawn):
        change = slope.link(F.linear(inputs, weight, bias)).sub_(wanted)
        scale = slope.factor / (len(inputs) if slope.classes else change.numel())
        if step.plain:  # without a gradient of its own: one operation and one pass over the weights less
            weight.addmm_(change.T, inputs, alpha=-plan.learning_rate * scale)
            if bias is not None:
                bias.addmv_(change.T, ones[: len(inputs)], alpha=-plan.learning_rate * scale)
        else:
            change.mul_(scale)
            step([change.T @ inputs] if bias is None else [change.T @ inputs, change.sum(0)])


def _like(flat: torch.Tensor, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = torch.split(flat.to(pieces[0].dtype), [piece.numel() for piece in pieces])
    return [part.view_as(piece) for part, piece in zip(parts, pieces, strict=True)]
