"""One step of federated SGD at a party: the gradients of a batch, plain or clipped and with the party's share of noise.

Both are gradients of the user's per-record loss, with the model as it is in training (dropout drops out). The loop is
here, and not the user's ``fit``, so that a party makes exactly one step, with no optimizer of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from choral.trainers.algorithms.interface import Batch
from choral.trainers.local_steps.record_gradients import BATCH, Records
from choral.trainers.task.device_batches import OnDevice
from choral.trainers.task.seeding import reseed, seed_of, seeded
from choral.trainers.task.task import Loss, TaskError

if TYPE_CHECKING:
    from choral.privacy import SharesParty
    from choral.trainers.local_steps.resident_model import Resident, Seat


def batch_of(
    resident: Resident, party: str, seat: Seat, loss: Loss, work: Batch, weights: torch.Tensor, round_number: int
) -> torch.Tensor:
    """What one party computes of a step, float32 or, with its share of the noise, int64; shape (d,).

    What the user's functions draw differs from step to step; with noise in shares nobody knows it. Raises: TaskError
    where others add noise in shares and this party has none to add; as :meth:`ShareSteps.step`.
    """
    if resident.shares and party not in resident.shares:
        raise TaskError(f"party {party!r} has no noise to add to the others'", hint="all parties of a run are private")
    purpose = f"{party}|step {work.step}"
    reseed([*resident.own_generators, *seat.generators], resident.training_seed, round_number, purpose)
    with seeded(resident.training_seed, round_number, purpose):
        if resident.shares:
            resident.layout.write(weights)
            vector = resident.shares[party].step(resident.model, seat.loader, loss, resident.device, work.row)
        else:
            own = (seat.dataset, seat.loader, loss, resident.device, party)
            draws = torch.Generator().manual_seed(seed_of(resident.seed, round_number, f"{purpose}, draw"))
            vector = batch_gradient(Records(resident.model, resident.layout, *own), weights, work.rate, draws)
    resident.check_fixed(party)
    return vector


class ShareSteps:
    """A party's private steps. Its model is wrapped at the first. before: rows of all parties' sums before this run's
    first, so that none comes twice.
    """

    def __init__(self, party: SharesParty, before: int = 0) -> None:
        self._party, self._before = party, before
        self._wrapped: tuple[Any, Any, Any] | None = None

    def step(self, model: nn.Module, loader: Any, loss: Loss, device: torch.device, row: int) -> torch.Tensor:
        """The vector of the party's next step, paid for: int64, shape (d,), to be sent once or never.

        loader: of the party's records; its batch size is not used. row: of all parties' sums. Raises: what
        SharesParty.wrap does for a model or a loader that privacy does not follow; BudgetExceededError; PrivacyError
        for a row of correlated noise that was made before; TaskError for a loss that is not one per record.
        """
        model.train()
        self._party.at(self._before + row)
        if self._wrapped is None:
            self._wrapped = self._party.wrap(model, loader)
        private_model, optimizer, private_loader = self._wrapped
        for batch in OnDevice.wrap(private_loader, device):
            optimizer.zero_grad()
            losses = loss(private_model, batch)
            if not isinstance(losses, torch.Tensor) or losses.ndim != 1 or not losses.is_floating_point():
                got = f"shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
                raise TaskError(
                    f"loss returned {got} for a batch of party {self._party.holder!r}; expected one float per record,"
                    " shape (n,)",
                    hint='use reduction="none"',
                )
            losses.mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return torch.from_numpy(self._party.take())


def batch_gradient(records: Records, weights: torch.Tensor, rate: float, draws: torch.Generator) -> torch.Tensor:
    """The sum of the gradients at `weights` of records drawn with probability `rate` each, over rate n; shape (d,)."""
    drawn = torch.nonzero(torch.rand(len(records), generator=draws, dtype=torch.float64) < rate).flatten().tolist()
    records.layout.write(weights)
    records.model.train()
    total = torch.zeros_like(weights, dtype=torch.float64)
    for first in range(0, len(drawn), BATCH):
        places = drawn[first : first + BATCH]
        total += records.gradient_here(records.batch(places), len(places)).double() * len(places)
    return (total / (rate * len(records))).to(weights.dtype)
