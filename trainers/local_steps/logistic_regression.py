"""Logistic regression by formula: a local trainer for one-output linear models, dense or sparse, without autograd.

    federate(..., algorithm=FSVRG(step=10.0), compute=Compute(engine=ClosedForm.of(rate=0.1, batch_size=10)))

A record costs what its nonzero features cost, in any of the kinds of work that algorithms ask for; per-record
variance-reduced steps through torch take some 700 times as long, and these loops without numba 22 times (150 records
of 133 features). Same order of records as the default trainer for the same seed, float64 inside, so results differ from
it by float32 rounding only. Runs on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import expit
from torch import nn
from torch.utils.data import TensorDataset

from choral.errors import ConfigError
from choral.trainers.algorithms.interface import Ascend, Done, Failed, Gradient, Minimise, Svrg, Touch, Train, Work
from choral.trainers.data.sparse_rows import SparseDataset
from choral.trainers.local_steps import sparse_kernels as kernels
from choral.trainers.local_steps.resident_model import Resident, attempted
from choral.trainers.task.arithmetic import Arithmetic
from choral.trainers.task.seeding import seed_of
from choral.trainers.task.task import TaskError, labels_of

Array = np.ndarray[Any, Any]

_NEWTON_STEPS = 100
_TOLERANCE = 1e-10  # of the gradient, relative to its start
_TRIED = 8  # records on which the task's loss is compared with the formula


@dataclass(frozen=True)
class Block:
    """One party's records. rows: CSR, float64, shape (n_k, d), a last column of ones for a bias; labels: 0. or 1."""

    rows: sparse.csr_array
    labels: Array

    @property
    def parts(self) -> tuple[Array, Array, Array, Array]:
        return self.rows.indptr, self.rows.indices, self.rows.data, self.labels

    def slope(self, weights: Array) -> Array:
        """grad F_k(weights)."""
        slope: Array = self.rows.T @ (expit(self.rows @ weights) - self.labels) / len(self.labels)
        return slope

    def loss(self, weights: Array) -> float:
        """F_k(weights)."""
        margins = self.rows @ weights
        return float(np.mean(np.logaddexp(0.0, margins) - self.labels * margins))

    def touched(self) -> Array:
        """n_k^j, whole numbers, shape (d,)."""
        return np.bincount(self.rows.indices[self.rows.data != 0], minlength=self.rows.shape[1])


class ClosedForm:
    """A LocalTrainer. rate, batch_size, epochs, decay: what the task's ``fit`` does, which is called once, on a few
    records, to be compared with it: passes of SGD with weight decay, batches in the order of a shuffling DataLoader,
    the last one smaller.
    """

    def __init__(
        self,
        resident: Resident,
        *,
        rate: float,
        batch_size: int,
        epochs: int = 1,
        decay: float = 0.0,
        compiled: bool | None = None,
    ) -> None:
        """compiled: take the numba loops; by default if numba is installed.

        Raises: TaskError for a model that is not one torch.nn.Linear with one output; ConfigError for values out of
        range, or with record-level privacy, whose noise this trainer would leave out, or with another precision.
        """
        if not (0 < rate < np.inf and 0 <= decay < np.inf and batch_size >= 1 and epochs >= 1):
            raise ConfigError(
                f"expected rate > 0, batch_size >= 1, epochs >= 1, decay >= 0; got {rate}, {batch_size}, {epochs},"
                f" {decay}",
                hint="what the task's fit does",
            )
        if resident.privacy_engines:
            raise ConfigError(
                "the closed form has no gradients of single records to clip and make noisy",
                hint="leave out engine, or use ClientPrivacy",
            )
        if not resident.arithmetic.plain:
            raise ConfigError(
                "the closed form computes in float64 and calls no model: precision and compile would have no effect",
                hint="leave them out, or leave out engine",
            )
        model = resident.model
        if not isinstance(model, nn.Linear) or model.out_features != 1 or not model.weight.requires_grad:
            raise TaskError(
                f"the closed form is for a torch.nn.Linear with one output, not {type(model).__name__}",
                hint="leave out engine for any other model",
            )
        self._resident, self._bias = resident, model.bias is not None
        self._rate, self._batch, self._epochs, self._decay = rate, batch_size, epochs, decay
        self._kernels = _kernels(find_spec("numba") is not None if compiled is None else compiled)
        self._made: dict[str, Block] = {}  # the latest turn last
        self._checked = self._fit_checked = False

    @classmethod
    def of(cls, **settings: Any) -> Callable[[Resident], Self]:
        """What ``Compute(engine=...)`` takes."""
        return lambda resident: cls(resident, **settings)

    @property
    def length(self) -> int:
        return self._resident.length

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        """See :class:`choral.trainers.algorithms.interface.LocalTrainer`; one party after the other.

        Raises: TaskError if the task's loss is not the logistic one, or the party's records are of another kind.
        """
        for party, work in orders:
            if isinstance(work, Train) and not self._fit_checked:
                self._check_fit(party)
            make = partial(self._done, party, self.block(party), work, weights, round_number)
            yield party, attempted(make, party, round_number)

    def _check_fit(self, party: str) -> None:
        """Whether ``fit`` does what this trainer was told, on a few of the party's records. Raises: TaskError, naming
        what differs.
        """
        self._fit_checked = True
        count = 2 * self._batch + 1
        dataset = self._resident.datasets[party]
        if isinstance(dataset, SparseDataset):
            dataset = SparseDataset(dataset.rows[:count], dataset.targets[:count])
        elif isinstance(dataset, TensorDataset):
            dataset = TensorDataset(*(tensor[:count] for tensor in dataset.tensors))
        known = self._resident
        twin = Resident(
            build=known.build,
            fit=known.fit,
            datasets={party: dataset},
            privacy_engines={},
            seed=known.seed,
            arithmetic=Arithmetic(known.device),
        )
        weights = torch.linspace(-1, 1, self.length) / self.length**0.5
        [(_, made)] = twin.do([(party, Train(counts=True))], weights, 1)
        if isinstance(made, Failed):
            raise TaskError(f"fit cannot be compared with the closed form: {made.error}", hint="leave out engine")
        optimizer, loader = twin.seat(party).optimizer, twin.seat(party).loader
        steps = self._epochs * -(-len(dataset) // self._batch)
        rate = None if made.path is None else made.path / max(made.steps, 1)
        decay = optimizer.param_groups[0].get("weight_decay", 0.0)
        told = {
            "batch_size": (self._batch, getattr(loader, "batch_size", self._batch)),
            "epochs": (f"{self._epochs} ({steps} steps)", f"{self._epochs} ({made.steps} steps)"),
            "rate": (self._rate, self._rate if rate is not None and math.isclose(rate, self._rate) else rate),
            "decay": (self._decay, decay),
        }
        for name, (said, found) in told.items():
            if said != found:
                raise TaskError(
                    f"the closed form was told {name} = {said}, and fit has {found} on {len(dataset)} records",
                    hint="give ClosedForm what build and fit do: passes of torch.optim.SGD without momentum over a"
                    " DataLoader that drops no batch",
                )
        random = torch.Generator().manual_seed(seed_of(known.seed, 1, party))
        whole = self.block(party)
        block = Block(whole.rows[: len(dataset)], whole.labels[: len(dataset)])
        expected, _ = self._train(block, Train(), _array(weights), random, self._rate)
        largest = np.abs(expected).max()
        if not (np.isfinite(largest) and np.abs(_array(made.vector) - expected).max() <= 1e-3 * largest + 1e-7):
            raise TaskError(
                "the task's fit does something else than the closed form: the same steps lead elsewhere",
                hint="it is for the mean logistic loss, and the order of a shuffling DataLoader; else leave out engine",
            )

    def _done(self, party: str, block: Block, work: Work, weights: torch.Tensor, round_number: int) -> Done:
        # The numbers that the default trainer draws from torch's own generator, which is not touched here.
        random = torch.Generator().manual_seed(seed_of(self._resident.seed, round_number, party))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            vector, more = self._made_of(party, block, work, _array(weights), random, round_number)
        return Done(vector=torch.from_numpy(vector).to(weights), **more)

    def block(self, party: str) -> Block:
        """The party's records; those that are not sparse are made so once, and kept by as many as have a seat.

        Raises: TaskError for other data.
        """
        if (known := self._made.pop(party, None)) is not None:
            self._made[party] = known
            return known
        dataset = self._resident.datasets[party]
        labels = labels_of(dataset)
        if labels is None or not bool(((labels == 0) | (labels == 1)).all()):
            raise TaskError(f"party {party!r} has labels other than 0 and 1", hint="two classes, as integers")
        if isinstance(dataset, SparseDataset):
            rows = dataset.rows
        elif isinstance(dataset, TensorDataset) and dataset.tensors[0].ndim == 2:
            rows = sparse.csr_array(_array(dataset.tensors[0]))
        else:
            raise TaskError(
                f"party {party!r} has a {type(dataset).__name__}, which the closed form cannot read at once",
                hint="a SparseDataset, or a TensorDataset of features, shape (n, features), and labels",
            )
        if self._bias:
            rows = sparse.csr_array(sparse.hstack([rows, np.ones((rows.shape[0], 1))], format="csr"))
        if rows.shape[1] != self.length:
            raise TaskError(
                f"party {party!r} has {rows.shape[1] - self._bias} features, the model {self.length - self._bias}",
                hint="all parties need the same columns",
            )
        block = Block(rows, labels.double().numpy())
        if not self._checked:
            self._compare_loss(dataset, block)
        most = self._resident.seats
        if self._bias or most is not None or not isinstance(dataset, SparseDataset):
            self._made[party] = block
            if most is not None and len(self._made) > most:
                del self._made[next(iter(self._made))]
        return block

    def _compare_loss(self, dataset: Any, block: Block) -> None:
        """Whether the task's own loss, where it has one, is the formula's. Raises: TaskError."""
        self._checked = True
        if self._resident.loss is None:
            return
        records = [dataset[index] for index in range(min(_TRIED, len(block.labels)))]
        weights = torch.linspace(-1, 1, self.length) / self.length**0.5
        self._resident.layout.write(weights)
        with torch.no_grad():
            found = self._resident.loss(self._resident.model, torch.utils.data.default_collate(records))
        margins = (block.rows @ _array(weights))[: len(records)]
        expected = np.logaddexp(0.0, margins) - block.labels[: len(records)] * margins
        if found.shape != (len(records),) or not np.allclose(_array(found), expected, rtol=1e-3, atol=1e-4):
            raise TaskError(
                "the task's loss is not the logistic one, which the closed form is for",
                hint="binary_cross_entropy_with_logits of the model's output, without a regulariser",
            )

    def _made_of(
        self, party: str, block: Block, work: Work, start: Array, random: torch.Generator, number: int
    ) -> tuple[Array, dict[str, Any]]:
        match work:
            case Train():
                return self._train(block, work, start, random, self._rate * self._resident.rate_factor(number))
            case Gradient():
                return block.slope(start), {}
            case Svrg():
                return self._svrg(block, work, start, random), {}
            case Minimise():
                return _minimise(party, block, work, start), {}
            case Touch():
                return block.touched().astype(float), {}
            case Ascend():
                dual = _array(work.dual).copy()
                order = _permutations(len(block.labels), work.passes, random)
                total = work.ridge * work.examples
                change = self._kernels.ascend(block.parts, order, start, dual, float(work.slack), total)
                return change, {"dual": torch.from_numpy(dual)}
        raise TaskError(f"{type(work).__name__} is no work that the closed form knows")

    def _train(
        self, block: Block, work: Train, start: Array, random: torch.Generator, rate: float
    ) -> tuple[Array, dict[str, Any]]:
        """SGD as a DataLoader deals it: each pass in batches of its own."""
        here, steps = start, 0
        ones = np.ones_like(start)
        for _ in range(self._epochs):
            # u is counted from `here`, so that the pull towards `start` and the decay are drift.
            drift = self._decay * here + work.pull * (here - start)
            if work.shift is not None:
                drift = drift + _array(work.shift)
            keep = 1.0 - rate * (self._decay + work.pull)
            order = _loader_order(len(block.labels), random)
            here = here + self._kernels.walk(block.parts, order, self._batch, here, drift, keep, rate, ones, False)
            steps += -(-len(order) // self._batch)
        return here - start, {"steps": steps, "path": rate * steps}

    def _svrg(self, block: Block, work: Svrg, start: Array, random: torch.Generator) -> Array:
        scale = np.ones_like(start)
        if work.shares is not None:
            own = block.touched()
            here = own > 0
            scale[here] = _array(work.shares)[here] * len(block.labels) / own[here]
        order = _permutations(len(block.labels), work.passes, random)
        keep, step = 1.0 - work.step * work.pull, float(work.step)
        change: Array = self._kernels.walk(
            block.parts, order, 1, start, _array(work.direction), keep, step, scale, True
        )
        return change


def _minimise(party: str, block: Block, work: Minimise, start: Array) -> Array:
    """Damped Newton steps by conjugate gradients. Raises: TaskError if no minimum is found (separable, no pull)."""
    constant = _array(work.direction) - block.slope(start)
    count = len(block.labels)

    def slope(change: Array) -> Array:
        made: Array = block.slope(start + change) + constant + work.pull * change
        return made

    change = np.zeros_like(start)
    residual = slope(change)
    started = float(np.linalg.norm(residual))
    for _ in range(_NEWTON_STEPS):
        if np.linalg.norm(residual) <= _TOLERANCE * started:
            return change
        chances = expit(block.rows @ (start + change))
        curve = chances * (1.0 - chances) / count
        operator = LinearOperator(
            (len(start), len(start)),
            matvec=lambda v, curve=curve: block.rows.T @ (curve * (block.rows @ v)) + work.pull * v,
        )
        step = cg(operator, -residual, rtol=1e-4, maxiter=500)[0]
        if not np.isfinite(step).all():
            break
        length = 1.0
        while length > 1e-6 and not np.linalg.norm(slope(change + length * step)) < np.linalg.norm(residual):
            length /= 2
        change = change + length * step
        residual = slope(change)
    if not np.linalg.norm(residual) <= 1e-6 * started:
        raise TaskError(
            f"the local problem of party {party!r} has no minimum that was found",
            hint="give a larger mu or ridge, or solve it inexactly",
        )
    return change


def _loader_order(count: int, random: torch.Generator) -> Array:
    """The order in which a DataLoader with shuffle=True deals: it draws a seed, its sampler another, then permutes."""
    torch.empty((), dtype=torch.int64).random_(generator=random)
    generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_(generator=random)))
    order: Array = torch.randperm(count, generator=generator).numpy()
    return order


def _permutations(count: int, passes: int, random: torch.Generator) -> Array:
    return np.concatenate([torch.randperm(count, generator=random).numpy() for _ in range(passes)])


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().double().cpu().numpy()
    return array


def _kernels(compiled: bool) -> Any:
    if not compiled:
        return kernels
    from choral.trainers.local_steps import sparse_kernels_numba as kernels_numba

    return kernels_numba
