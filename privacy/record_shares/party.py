"""One party of a training with noise in shares: what it draws, computes, pays for and sends.

    party = SharesParty(privacy, plan, holder="north", ledger=Ledger(path))  # refuses a plan that breaks its promise
    model, optimizer, loader = party.wrap(model, loader)  # once

    model.load_state_dict(weights)  # each step: the server's weights,
    party.at(row)  # of correlated noise, which row of all parties' sums it is,
    fit(model, optimizer, loader)  # a training loop over one pass of the loader,
    vector = party.take()  # int64, shape (length,), for the secure sum

A pass over the loader is one step. It shows one batch, in chunks of at most `max_physical_batch_size` rows; the last
`optimizer.step()` moves no model but makes the vector: the sum of the drawn records' clipped gradients, and this
party's share of the noise. The step is paid for, on disk, after training and before the noise is drawn: an attempt that
failed while it trained costs nothing, since nothing was made that could be sent; one whose vector was made is paid for
whether it is sent, opened, tried again or lost.

**Nothing depends on how many records were drawn.** No record drawn is a batch like any other: work and noise. With
`padded` every step has plan.rows rows, of which those that no record fills repeat one with weight zero, so that
the time of an answer does not tell how many were drawn (docs/noise-in-shares.md says what it would tell). Without,
answers have to be sent at a fixed time after they were asked for. No loss, accuracy or count of a step may leave the
party.

**Nor does what other records add depend on whether one was drawn**, which amplification by sampling takes for granted.
A row's gradient may follow its place: dropout draws numbers row by row, and the kernels of a matrix product round
differently at different rows, which is all that is left where a hostile server's weights cancel. So the records drawn
are put to places that the operating system draws, among equally many rows: those of the others have one law, whoever
else is there.

A gradient that is not finite counts as zero, as in :class:`choral.privacy.dpsgd.private_optimizer.PrivateOptimizer`,
whose checks are made here, too: they raise for models and loops that treat records together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from choral.errors import ConfigError
from choral.privacy.accounting.banded_shares import BandedShares
from choral.privacy.accounting.events import ReleasePlan, ShareEvent
from choral.privacy.dpsgd.engine import Privacy
from choral.privacy.dpsgd.poisson_loader import PrivateLoader, refuse_unsupported
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.errors import BudgetExceededError, PrivacyError, UnsupportedLoaderError, UnsupportedModelError
from choral.privacy.ledgers.ledger import Ledger
from choral.privacy.ledgers.plans import RemainingBudget
from choral.privacy.noise.gaussian import Source, os_stream, poisson_sample
from choral.privacy.noise.record_noise_shares import Int64Array, noisy_share, share_with
from choral.privacy.per_sample.model import PerSampleModel, with_per_sample_gradients
from choral.privacy.record_shares.fixed_batches import FixedBatch, NoiseRows
from choral.privacy.record_shares.plan import BandedPlan, SharesPlan
from choral.privacy.record_shares.refusals import refuse_broken_promise


class SharesParty:
    """One party's half of the plan, over all of its steps.

    Args:
        privacy: the party's own promise, which the plan is held against. plan: all parties'. holder: whose data it is.
        ledger: what that data has spent before. padded: whether all steps have equally many rows. source: of draws and
            noise; other than the operating system's for tests alone.
        whole: what the plan's steps are a part of, fixed together under a promise of whole.epsilon: it is written in
            front of the first step. By default they are all that was fixed.
    Raises: PrivacyError (a plan that breaks the promise), BudgetExceededError (the ledger has no room for it),
        LedgerError, ConfigError.
    """

    def __init__(
        self,
        privacy: Privacy,
        plan: SharesPlan,
        *,
        holder: str,
        ledger: Ledger,
        padded: bool = True,
        source: Source = os_stream,
        whole: ReleasePlan | None = None,
    ) -> None:
        refuse_broken_promise(privacy, plan)
        ledger.bind(holder, privacy.delta, neighbours=privacy.neighbours)
        self.privacy, self.plan, self.holder, self.ledger, self.padded = privacy, plan, holder, ledger, padded
        self._source = source
        self._vector: Int64Array | None = None
        self._drawn: int | None = None  # the step that a fixed batch was drawn for
        remaining = RemainingBudget.on(ledger, whole.epsilon if whole else privacy.epsilon, privacy.delta)
        self._known = len(remaining.state.before)
        left = next((left for part, left in remaining.unfinished() if part.event == plan.event), None)
        self.steps_left = plan.terms.steps if left is None else left
        self._noise = self._rows(begun=left is not None)
        self._announced = None
        if left is None:
            self._refuse_unreserved(remaining)
            self._announced = whole or remaining.plan(plan.event, plan.terms.steps)
            if not any(p.covers(plan.event) and p.times >= plan.terms.steps for p in self._announced.parts):
                raise ConfigError(
                    "the steps of this plan are no part of what was fixed", hint="whole=None, or with them"
                )
            remaining.check(self._announced.whole)

    def _rows(self, *, begun: bool) -> NoiseRows | None:
        """The noise of a plan that correlates it; begun: whether the ledger's latest events are of this plan."""
        if not isinstance(self.plan, BandedPlan):
            return None
        made = self.ledger.segments[-1][1] if begun else ()
        rows = (event.row for event in made if isinstance(event, BandedShares) and event.kind == self.plan.event)
        return NoiseRows(self.plan.coefficients, max(rows, default=None))

    @property
    def last_row(self) -> int | None:
        """The last row of correlated noise that was made of this plan, by earlier processes, too; None before it."""
        return self._noise.last if self._noise is not None else None

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise PrivacyError(
            "a party with its vector may be neither copied nor written to a file: a vector is sent once",
            hint="Make it again, on its ledger: it goes on with the steps that are left.",
        )

    def _refuse_unreserved(self, remaining: RemainingBudget) -> None:
        before = remaining.state.before
        if before and not isinstance(before[0], ShareEvent):
            raise BudgetExceededError(
                f"{self.holder}: the ledger began with noise of another kind, and so set nothing of delta aside for "
                "the failures of secure sums",
                hint="Noise in shares may be added to a ledger that began with it; other kinds may follow it.",
            )

    def at(self, row: int) -> None:
        """Say for which row of all parties' sums the next vector is: before each step of correlated noise, of which it
        is required. Where noise is independent, nothing follows from it.

        row: a number that **all parties of the sum agree on**, larger than those of the sums before. Where it is not
        the next after this party's last, its noise begins anew. Raises: PrivacyError (a row that was made before).
        """
        if self._noise is not None:
            self._noise.at(row)

    def wrap(self, model: nn.Module, loader: DataLoader[Any]) -> tuple[PerSampleModel, ShareOptimizer, PrivateLoader]:
        """Return private versions of the two, and the optimizer that makes vectors instead of moving the model.

        loader: of this party's records; its batch size is not used. What is trained is what of `model` requires a
        gradient: `plan.terms.length` numbers.
        Raises: UnsupportedModelError (another number, what per-sample gradients do not follow), UnsupportedLoaderError
        (more records than the plan allows for).
        """
        terms = self.plan.terms
        refuse_unsupported(loader)
        records = len(loader.dataset)  # type: ignore[arg-type]
        if records > terms.most_records:
            raise UnsupportedLoaderError(
                f"{self.holder}: {records} records, and the plan allows for {terms.most_records} of one party",
                hint="Plan again with most_records as it is; the bound of a step's rows was computed for that.",
            )
        private_model = with_per_sample_gradients(model)
        trained = [p for p in private_model._module.parameters() if p.requires_grad]
        length = sum(p.numel() for p in trained)
        if length != terms.length:
            raise UnsupportedModelError(
                f"{length} parameters are trained, and the plan is for {terms.length}",
                hint="Freeze the same layers at all parties, and plan for what is left.",
            )
        optimizer = ShareOptimizer(private_model, trained, self.privacy, self.plan, self._make)
        sampler = self._sampler(records)

        def before_pass() -> None:
            self._vector = None
            self._refuse_spent()
            optimizer.begin_pass()

        def before_batch(rows: int, first: bool, last: bool) -> None:
            optimizer.taken = sampler.taken
            optimizer.expect(rows, first=first, last=last)

        private_loader = PrivateLoader(
            loader,
            sampler,
            before_pass=before_pass,
            before_batch=before_batch,
            empty_batch=optimizer.step_empty,
            after_pass=optimizer.end_pass,
            max_physical_batch_size=self.privacy.max_physical_batch_size or self.plan.rows,
        )
        return private_model, optimizer, private_loader

    def _sampler(self, records: int) -> _OneStep | FixedBatch:
        plan = self.plan
        if not isinstance(plan, BandedPlan):
            return _OneStep(records, plan.terms.rate, plan.rows, padded=self.padded, source=self._source)
        return FixedBatch(
            records,
            plan.separation,
            plan.rows,
            holder=self.holder,
            padded=self.padded,
            number=self._drawing,
        )

    def _drawing(self) -> int:
        """Which step of the plan a fixed batch is drawn for, from 0; no other step may then be made of it."""
        self._drawn = self.plan.terms.steps - self.steps_left
        return self._drawn

    def take(self) -> Int64Array:
        """Return the vector of the step just made, for the secure sum: once, and never for two sums.

        Shape (length,), int64, each at most plan.bound. Raises: PrivacyError (there is none).
        """
        vector, self._vector = self._vector, None
        if vector is None:
            raise PrivacyError(
                "no step was made whose vector was not taken yet",
                hint="One pass over the wrapped loader makes one; a sum that is tried again needs another step.",
            )
        return vector

    def add(self, total: npt.NDArray[np.float64]) -> None:
        """Make the next step's vector of `total`, in the place of a pass over a wrapped loader: of a sum of something
        else than gradients. It is paid for here, before its noise is drawn.

        total: the sum of the records' contributions, float64, shape (plan.terms.length,). **Whoever calls this answers
        for it that each of at most plan.terms.most_records records contributes a vector of norm at most plan.clip**,
        and that each is taken with probability plan.terms.rate: sampling is not done here.
        Raises: PrivacyError (another shape or type, or a plan that samples), BudgetExceededError, LedgerError.
        """
        if self.plan.terms.rate != 1:
            raise PrivacyError(
                "the plan draws records at random, and a total is of all of them",
                hint="Plan with batch_size = records.",
            )
        shape = (self.plan.terms.length,)
        if total.shape != shape or total.dtype != np.float64:
            raise PrivacyError(f"total has shape {total.shape} and type {total.dtype}, expected float64 and {shape}")
        self._vector = None
        self._make(total)

    def _refuse_spent(self) -> None:
        if self.steps_left < 1:
            raise BudgetExceededError(
                f"{self.holder}: the plan has {self.plan.terms.steps} steps, tried ones included, and all are used",
                hint="Plan more steps before the first one, with room for those that are tried again.",
            )
        if self._noise is not None:
            self._noise.told()

    def _make(self, total: npt.NDArray[np.float64]) -> None:
        """Pay for the step, and make its vector."""
        self._refuse_spent()
        if self._noise is not None and self._drawn != self.plan.terms.steps - self.steps_left:
            raise PrivacyError(
                "this batch is of another step than the next one: its records would take part too soon again",
                hint="Finish a pass over the loader before the next one; do not go through it twice at once.",
            )
        self._drawn = None
        self.ledger.append(self._event(), after=self._known, plan=self._announced)
        self._announced = None
        self._known += 1
        self.steps_left -= 1
        plan, noise = self.plan, self._noise
        if noise is None:
            self._vector = noisy_share(total, plan.clip, plan.share, plan.grid, plan.rows, self._source)
            return
        row = noise.next(len(total), self._source)
        self._vector = share_with(total, plan.clip, plan.share, plan.grid, plan.rows, lambda here: row[here].copy())

    def _event(self) -> ShareEvent:
        """What the next step is charged as; of correlated noise with its number in the plan."""
        event = self.plan.event
        if not isinstance(event, BandedShares) or self._noise is None:
            return event
        number = self.plan.terms.steps - self.steps_left + 1
        return msgspec.structs.replace(event, number=number, row=self._noise.told())


class ShareOptimizer(PrivateOptimizer):
    """Clips and adds up the gradients of a batch, and hands the sum to `make`; the model stays as it is.

    taken: which rows of the batch are records that were drawn, shape (rows,); the others weigh nothing.
    """

    def __init__(
        self,
        model: PerSampleModel,
        trained: list[nn.Parameter],
        privacy: Privacy,
        plan: SharesPlan,
        make: Callable[[npt.NDArray[np.float64]], None],
    ) -> None:
        self.taken: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._shown = 0  # rows of the batch in chunks so far, this one included
        self._make = make
        super().__init__(
            torch.optim.SGD(trained, lr=1.0),
            model,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=plan.terms.batch_size,
            source=_no_noise,
        )

    def expect(self, drawn: int, *, first: bool = True, last: bool = True) -> None:
        """See :meth:`PrivateOptimizer.expect`; here of rows, drawn or not."""
        super().expect(drawn, first=first, last=last)
        self._shown = drawn if first else self._shown + drawn

    def _clip_factors(self, samples: Any) -> tuple[list[torch.Tensor], float, torch.Tensor]:
        factors, within, gone = super()._clip_factors(samples)
        counts = self._are_drawn(gone).to(factors[0].dtype)
        return [factor * counts for factor in factors], within, gone

    def _note_zeroed(self, gone: torch.Tensor) -> None:
        super()._note_zeroed(gone & self._are_drawn(gone))

    def _are_drawn(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of the rows of this chunk are records that were drawn; a tensor of the same shape and device."""
        return torch.from_numpy(self.taken[self._shown - len(rows) : self._shown]).to(rows.device)

    def _release(self, pending: Any) -> None:
        """Let the sum become a vector with noise; no gradient is written to the parameters."""
        self._make(torch.cat(pending.pieces).cpu().numpy())

    def _apply(self) -> None:
        """Nothing is stepped: the server steps, with the opened sum."""
        self._opt_called = True  # a scheduler that looks at this optimizer need not warn


def _no_noise(count: int) -> bytes:
    raise PrivacyError(f"{count} bytes of noise were asked for where the share alone has noise")


class _OneStep(Sampler[list[int]]):
    """The rows of one step: the records drawn, each with probability `rate`, at most `rows`, at places that are drawn,
    too; at the others the first record.

    `drawn` says how many were, after the sampler was asked, and `taken` at which places.
    """

    def __init__(self, size: int, rate: Fraction, rows: int, *, padded: bool, source: Source) -> None:
        self.size, self.rate, self.rows, self.padded, self.source = size, rate, rows, padded, source
        self.drawn = 0
        self.taken: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[list[int]]:
        records = poisson_sample(self.size, self.rate, self.source)[: self.rows]
        self.drawn = len(records)
        filled = self.rows if self.padded else max(self.drawn, 1)
        words = np.frombuffer(self.source(8 * filled), dtype="<u8")
        places = np.argsort(words, kind="stable")[: self.drawn]  # each set, in each order, alike
        self.taken, found = np.zeros(filled, dtype=np.bool_), np.zeros(filled, dtype=np.int64)
        self.taken[places], found[places] = True, records
        yield found.tolist()
