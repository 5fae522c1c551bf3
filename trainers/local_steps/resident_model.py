"""The default trainer: the parties of a process take turns on one resident model.

``build`` runs once per party, at its first turn. Its loader and its optimizer are kept, the optimizer pointed at
the resident model's parameters; its model is dropped. So a round copies one vector into the model per party: no
deepcopy, which is slow and trains the original where a forward closes over its own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from choral.errors import ChoralError
from choral.privacy import LedgerError, PrivacyEngine
from choral.trainers.algorithms.interface import (
    Ascend,
    Batch,
    Done,
    Failed,
    Gradient,
    Minimise,
    Svrg,
    Touch,
    Train,
    Work,
)
from choral.trainers.local_steps import linear_models as linear
from choral.trainers.local_steps import subproblems as gradients
from choral.trainers.local_steps.batch_gradients import ShareSteps, batch_of
from choral.trainers.local_steps.corrections import OptimizerSteps
from choral.trainers.local_steps.epochs import EpochPlan
from choral.trainers.local_steps.record_gradients import Records
from choral.trainers.run_folder.info import RunFolderError
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.device_batches import OnDevice
from choral.trainers.task.flat_vector import Layout, all_finite, several
from choral.trainers.task.initial_weights import Weights
from choral.trainers.task.learning_rate import CONSTANT, Rates
from choral.trainers.task.seeding import (
    Generator,
    forget_workers,
    generators_of,
    reseed,
    seed_of,
    seeded,
    seeded_by,
)
from choral.trainers.task.task import (
    Build,
    DivergedError,
    Fit,
    Loss,
    TaskError,
    check_returned,
    checked_build,
    raised_by,
    takes_round,
)
from choral.trainers.task.user_state import Attributes, Groups, Watched


@dataclass(frozen=True)
class Seating:
    """first: the party that the model is built with, by default the first one. seats: how many parties keep what they
    keep, the last ones that had a turn; by default all.
    """

    first: str | None = None
    seats: int | None = None


@dataclass
class Seat:
    """What a party keeps between its turns. plan: its training in tensors where that is known, False where not.

    generators: those that its loader and its dataset have of their own. steps: what its optimizer does, from its first
    training on.
    """

    dataset: Any
    optimizer: torch.optim.Optimizer
    groups: Groups
    loader: Any
    watched: Watched
    generators: list[Generator]
    plan: EpochPlan | Literal[False] | None = None
    steps: OptimizerSteps | None = None


class Resident:
    """The resident model of this process, and the seats of the parties that have had a turn: a LocalTrainer.

    build, fit, loss: the user's functions. datasets: one per party. privacy_engines: one per party for record-level
    differential privacy, empty without. seed: decides initial weights and data order, never noise. initial: weights
    to start from, in the place of the seed's. arithmetic: of ``fit``, and the device of the model and the batches.
    """

    def __init__(
        self,
        *,
        build: Build,
        fit: Fit,
        datasets: Mapping[str, Any],
        privacy_engines: Mapping[str, PrivacyEngine],
        seed: int,
        arithmetic: Arithmetic,
        loss: Loss | None = None,
        initial: Weights | None = None,
        rates: Rates = CONSTANT,
        seating: Seating = Seating(),
    ) -> None:
        self.build, self.fit, self.loss, self.rates = build, fit, loss, rates
        self._takes_round = takes_round(fit)
        self.datasets, self.privacy_engines = datasets, privacy_engines
        self.seed, self.arithmetic, self.device = seed, arithmetic, arithmetic.device
        first = next(iter(datasets)) if seating.first is None else seating.first
        self.model = initial_model(build, datasets[first], seed, initial).to(self.device)
        self.layout = Layout(self.model)
        self._training: nn.Module = self.model
        self._by_name = dict(self.model.named_parameters())
        self._attributes, self._told = Attributes(self.model), False
        self._in_training = False  # all of the model, as the training before left it
        self._fixed = {name: tensor.detach().clone() for name, tensor in _fixed(self.model)}
        self._seats: dict[str, Seat] = {}  # the latest turn last
        self.seats = seating.seats
        self.shares: Mapping[
            str, ShareSteps
        ] = {}  # by party, where noise is added in shares; set before the first step
        self._building = generators_of(build)
        self.own_generators = generators_of(fit, loss, self.model)

    @property
    def length(self) -> int:
        return self.layout.length

    @property
    def training_seed(self) -> int | None:
        """Of what the user's functions draw in training: the seed; None, and nobody's, where records are sampled."""
        return None if self.shares or self.privacy_engines else self.seed

    def rate_factor(self, round_number: int) -> float:
        """What the schedule multiplies learning rates by."""
        return self.rates.factor(round_number)

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        """See :class:`choral.trainers.algorithms.interface.LocalTrainer`; one party after the other, a few small ones
        seated ahead.

        A party fails with DivergedError if a result is NaN or infinite; TaskError if ``fit`` changed the model's shape,
        its buffers or its frozen parameters, trained something else, or if the work needs what the task or the model
        lacks; and with what the user's functions raise. The model is then put back as it was.
        Raises: TaskError for a private party without a privacy engine, and what `checked_build` does: another
            model than the first party's suits nobody.
        """
        self._in_training = False
        for party, work, seat, number in several(self._ready(orders, round_number), self.length):
            made: Done | Failed
            if isinstance(seat, Failed):
                made = seat
            else:
                make = partial(self._done, party, work, seat, number, weights, round_number)
                made = attempted(make, party, round_number)
            if isinstance(made, Failed):
                self.recover()
            yield party, made

    def _ready(
        self, orders: Iterable[tuple[str, Work]], round_number: int
    ) -> Iterator[tuple[str, Work, Seat | Failed, int]]:
        """Each with its seat, or why it has none: the user's code raised; and the seed of what it draws."""
        for party, work in orders:
            self._check_privacy_engine(party)
            seat: Seat | Failed
            try:
                seat = self.seat(party)
            except ChoralError:
                raise
            except Exception as error:
                seat = Failed(error=raised_by(error, f"build at party {party!r}"))
            yield party, work, seat, seed_of(self.training_seed, round_number, party)

    def _done(self, party: str, work: Work, seat: Seat, number: int, weights: torch.Tensor, round_number: int) -> Done:
        with seeded_by(number, secret=self.training_seed is None):
            if isinstance(work, Train):
                return self._train(party, work, seat, weights, round_number)
            return self._read(party, work, seat, weights, round_number)

    def _train(self, party: str, work: Train, seat: Seat, weights: torch.Tensor, round_number: int) -> Done:
        """Run the user's ``fit`` on one party's data from ``weights``, shape (d,)."""
        reseed([*self.own_generators, *seat.generators], self.training_seed, round_number, party)
        forget_workers(seat.loader)
        self.layout.write(weights)
        seat.optimizer.state.clear()
        seat.groups.begin(seat.optimizer, self.rate_factor(round_number))
        if not self._in_training:
            self.layout.begin_training(self.model)
        self._in_training = False  # until that is seen
        model, optimizer, loader = self._training, seat.optimizer, seat.loader
        if self.privacy_engines:
            model, optimizer, loader = self.privacy_engines[party].wrap(model, optimizer, loader)
            self._training = model
        watched = bool(self.privacy_engines) or not self.rates.constant
        steps = seat.steps = seat.steps or OptimizerSteps(seat.optimizer)
        with (
            steps.corrected(self.layout, work, weights, watched=watched),
            self.arithmetic.over(model, party, private=bool(self.privacy_engines)),
        ):
            number = {"round": round_number} if self._takes_round else {}
            returned = self.fit(model, optimizer, OnDevice.wrap(loader, self.device), **number)
        check_returned(returned, (model, self.model), party)
        if not (same := self.layout.unchanged(self.model)):
            self.layout.check(self.model, f"party {party!r} after fit")
        if not same or self.layout.holds_more:
            self.check_fixed(party)
        self._in_training = same and self.layout.in_training()
        change = self.layout.read().sub_(weights)
        self._check_trained(party, work, steps, change, stale=not same and self.layout.stale(self.model))
        seat.groups.check(seat.optimizer, f"party {party!r}")
        self._attributes.settle(f"party {party!r}", takes_round=self._takes_round)
        self._told = self._told or seat.watched.tell(f"party {party!r}")
        return Done(vector=change, steps=steps.count, path=steps.path)

    def _check_privacy_engine(self, party: str) -> None:
        """Raises: TaskError where a private party would be trained without a privacy engine; this ends the run."""
        if self.privacy_engines and party not in self.privacy_engines:
            raise TaskError(
                f"party {party!r} has no privacy engine here, and all parties of this run are private",
                hint="all processes must be given the same parties, in the same order and of the same sizes",
            )

    def _read(self, party: str, work: Work, seat: Seat, weights: torch.Tensor, round_number: int) -> Done:
        """What needs the gradients of records, or their features, rather than ``fit``."""
        if self.loss is None:
            raise TaskError(
                f"the algorithm needs {type(work).__name__} of party {party!r}, and the task has no loss",
                hint="give loss(model, batch) -> tensor of one loss per record, shape (n,)",
            )
        if self.shares and isinstance(work, Gradient):
            work = Batch(rate=1.0, step=0, row=round_number)
        if isinstance(work, Batch):
            return Done(vector=batch_of(self, party, seat, self.loss, work, weights, round_number))
        reseed([*self.own_generators, *seat.generators], self.training_seed, round_number, party)
        records = Records(self.model, self.layout, seat.dataset, seat.loader, self.loss, self.device, party)
        match work:
            case Gradient():
                return Done(vector=records.gradient(weights))
            case Svrg():
                return Done(vector=gradients.svrg(records, weights, work))
            case Minimise():
                return Done(vector=gradients.minimise(records, weights, work))
            case Touch():
                return Done(vector=linear.touched(records))
            case Ascend():
                return linear.ascend(records, weights, work)
        raise TaskError(f"{type(work).__name__} is no work that the resident trainer knows")

    def seat(self, party: str) -> Seat:
        """What the party keeps, made at its first turn. Raises: what checked_build does; TaskError (another model)."""
        seat = self._seats.pop(party, None) or self._take_seat(party)
        self._seats[party] = seat
        if self.seats is not None and len(self._seats) > self.seats:
            del self._seats[next(iter(self._seats))]
        return seat

    def check_batches(self) -> None:
        """Refuse a private party whose batch is larger than its data before any party trains.

        Where parties are too many for all to have a seat, each is refused at its first turn instead.
        Raises: UnsupportedLoaderError naming the party; what checked_build does.
        """
        if self.seats is None:
            for party, privacy_engine in self.privacy_engines.items():
                privacy_engine.sizes(self.seat(party).loader)

    def _take_seat(self, party: str) -> Seat:
        # Seeded apart from training: a resumed run takes its seats in a later round.
        self._in_training = False  # build may have given the resident model itself
        with seeded(self.seed, 0, party):
            reseed(self._building, self.seed, 0, party)
            dataset = self.datasets[party]
            model, optimizer, loader = checked_build(self.build, dataset)
        self.layout.check(model, f"party {party!r}")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            # In place: some optimizers (LBFGS) keep a second reference to this very list.
            group["params"][:] = [self._by_name[names[id(parameter)]] for parameter in group["params"]]
        optimizer.state.clear()
        watched = Watched(dataset, loader)
        return Seat(dataset, optimizer, Groups(optimizer), loader, watched, generators_of(loader, dataset))

    def _check_trained(
        self, party: str, work: Train, steps: OptimizerSteps, change: torch.Tensor, *, stale: bool
    ) -> None:
        if stale:
            raise TaskError(
                f"fit at party {party!r} replaced a parameter of the model by another of the same name and shape",
                hint="train the model that fit is given in place",
            )
        if not steps.count and not change.any():
            raise TaskError(
                f"fit at party {party!r} made no step with its optimizer and left its model as it was",
                hint="train the model, optimizer and loader that fit is given, in place, not a copy; with"
                " drop_last=True a small party has no batch at all",
            )
        if steps.astray > 0.0 and all_finite(change):
            lost = "what the algorithm or the schedule says of each step is not in the change"
            if self.privacy_engines:
                lost = "what was changed has no noise"
            elif work.counts and not work.corrects:
                lost = "the number of steps does not explain the change"
            raise TaskError(
                f"fit at party {party!r} changed the weights outside the steps of the optimizer that it was given"
                f" ({steps.count} steps; by up to {steps.astray:.3g} beside them): {lost}",
                hint="step that optimizer itself, not one of fit's own; no projection, averaging or loading of weights"
                " in fit; FedAvg without privacy takes any fit",
            )

    @torch.no_grad()
    def recover(self) -> None:
        """Put back what a party's failure may have left: parameters, which of them are trained, and fixed tensors.

        Raises: TaskError for a model of another shape, with which no other party can be trained.
        """
        for name, parameter in self._by_name.items():
            owner, _, leaf = name.rpartition(".")
            try:
                self.model.get_submodule(owner)._parameters[leaf] = parameter
            except AttributeError:
                raise TaskError(
                    f"a party's training took {name!r} out of the model", hint="train it in place"
                ) from None
            parameter.requires_grad_(name in self.layout.shapes)
            parameter.grad = None
        for name, tensor in _fixed(self.model):
            if (kept := self._fixed.get(name)) is not None:
                tensor.data = kept.clone()
        self.layout.check(self.model, "the next party")

    def check_fixed(self, party: str) -> None:
        """Raises: TaskError if the party's training changed a buffer or a frozen parameter."""
        for name, tensor in _fixed(self.model):
            if name not in self._fixed or not torch.equal(tensor, self._fixed[name]):
                raise TaskError(
                    f"training at party {party!r} changed {name!r}, which is not part of the summed update",
                    hint="buffers and frozen parameters must stay as they are; make it a trainable parameter, or use a"
                    " layer without running statistics",
                )


def attempted(make: Callable[[], Done], party: str, round_number: int) -> Done | Failed:
    """What `make` makes for one party, or why it fails, which is no reason to end the run for the others.

    Raises: LedgerError and RunFolderError: what is written down can then not be trusted.
    """
    try:
        done = make()
        refuse_diverged(done.vector, party, round_number)
        return done
    except (LedgerError, RunFolderError):
        raise
    except Exception as error:
        return Failed(error=raised_by(error, f"training at party {party!r}"))


def refuse_diverged(vector: torch.Tensor, party: str, round_number: int) -> None:
    """Raises: DivergedError naming the party, if not all of `vector` is finite."""
    if not all_finite(vector):
        raise DivergedError(
            f"training at party {party!r} diverged in round {round_number}: its weights are not finite",
            hint="lower the learning rate; the last good round is kept",
        )


def _fixed(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers and frozen parameters: what no party may change, since the next one would see it."""
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return [*model.named_buffers(), *frozen]


def initial_model(build: Build, dataset: Any, seed: int, initial: Weights | None = None) -> nn.Module:
    """The model that ``build`` makes for this seed: the same initial weights for every configuration of a comparison.

    initial: weights in the place of those that the seed decides. Raises: what checked_build does; InitialWeightsError.
    """
    with seeded(seed, 0, "initial weights"):
        reseed(generators_of(build), seed, 0, "initial weights")
        model = checked_build(build, dataset)[0]
    if initial:
        initial.load_into(model)
    return model
