"""The vectors of federated SGD with noise in shares: made at the parties, summed as they are, opened, divided by B.

A party's vector is the int64 that its :class:`~choral.privacy.SharesParty` made and paid for; nothing is encoded here.
The server multiplies the opened sum by the grid's step and divides by B, which is public, never by who was drawn or
survived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from choral.errors import ConfigError
from choral.privacy import BandedPlan, PrivacyError, SharesPlan, refuse_weak_sum
from choral.protocols.errors import TooFewSurvivorsError
from choral.protocols.interface import SumResult, SumSession, SumSpec
from choral.trainers.algorithms.interface import ExchangeMean
from choral.trainers.federated.codec import Encoded


@dataclass(frozen=True)
class SharesPartyCodec:
    """A party's half: its vector is sent as its :class:`~choral.privacy.SharesParty` made it, or not at all."""

    length: int

    def pay(self, exchange: Callable[[], bytes]) -> None:
        """A step is paid for where its vector is made, before the noise is drawn."""

    def encode(self, update: torch.Tensor) -> Encoded:
        """Raises: PrivacyError for anything that no party's noise was added to."""
        if update.dtype != torch.int64 or update.shape != (self.length,):
            raise PrivacyError(
                f"a party answers with {tuple(update.shape)} numbers of type {update.dtype}, expected the int64 vector"
                " with its share of the noise",
                hint="the trainer must do Batch by the party's own SharesParty, as the resident trainer does",
            )
        return Encoded(update)

    def stand_in(self) -> None:
        """It sends nothing."""


def _correlation(plan: BandedPlan) -> dict[str, int]:
    return {"bands": len(plan.coefficients), "separation": plan.separation}


class SharesCodec:
    """The server's half; see :class:`choral.trainers.federated.codec.Codec`."""

    clip = None
    largest = None
    more_bytes = 0

    def __init__(self, names: tuple[str, ...], plan: SharesPlan) -> None:
        self._names, self.plan = names, plan

    @property
    def spec(self) -> SumSpec:
        plan = self.plan
        return SumSpec(
            parties=self._names,
            length=plan.terms.length,
            bound=plan.bound,
            encoding=f"shares of noise {plan.share!r} x {plan.clip!r}, h {plan.honest}, grid 2^-{plan.grid.coarse}, up"
            f" to {plan.rows} records of norm {plan.clip!r}",
        )

    @property
    def fixed_point(self) -> dict[str, float | int]:
        """With what the plan solved for; error_bound is of the rounding alone, without the noise."""
        plan = self.plan
        step = plan.clip * 2.0**-plan.grid.coarse
        return {
            "bound": plan.bound * step,
            "value_bits": plan.bound.bit_length() + 1,
            "step": step,
            "error_bound": plan.terms.parties * step / 2.0 / plan.terms.batch_size,
            "noise_multiplier": plan.noise_multiplier,
            "share": plan.share,
            "rows": plan.rows,
            **(_correlation(plan) if isinstance(plan, BandedPlan) else {}),
        }

    def check(self, session: SumSession) -> None:
        """Asked for each party, of every session that its vectors would go into.

        Raises: ConfigError for a shared key; PrivacyError for a sum that may be opened over fewer parties than the
            noise is sized for, that withstands fewer corrupt ones than there may be colluders, or that does not say.
        """
        stated: Mapping[str, Any] = session.statement
        if stated.get("name") == "plain":
            return  # and the claim is for outsiders: the server sees each vector
        if stated.get("key") == "shared":
            raise ConfigError(
                "noise in shares under a shared key: any one party opens every other's vector", hint="use Masked(...)"
            )
        refuse_weak_sum(
            self.plan,
            parties=int(stated.get("parties", self.plan.terms.parties)),
            min_survivors=int(stated.get("min_survivors", 0)),
            corrupt=int(stated.get("corrupt", 0)),
        )

    def begin(self, present: tuple[str, ...], exchange: Callable[[], bytes]) -> None:
        """Raises: TooFewSurvivorsError before anything is computed, paid for or sent."""
        del exchange
        self._refuse_few(present)

    def party(self, examples: int) -> SharesPartyCodec:
        del examples  # its records count as they are drawn
        return SharesPartyCodec(self.plan.terms.length)

    def take(self, encoded: Encoded) -> None:
        """There is nothing beside the integers."""

    def decode(self, result: SumResult) -> ExchangeMean:
        """Raises: TooFewSurvivorsError for a sum over fewer parties than the noise is sized for."""
        self._refuse_few(result.survivors)
        mean = self.plan.mean(np.asarray(result.total))
        return ExchangeMean(torch.from_numpy(mean), self.plan.terms.batch_size)

    def _refuse_few(self, left: tuple[str, ...]) -> None:
        needed = self.plan.honest + self.plan.colluders
        if len(left) < needed:
            raise TooFewSurvivorsError(
                f"{len(left)} of {len(self._names)} parties are left, and the noise is sized for {needed}",
                survivors=len(left),
                needed=needed,
                missing=tuple(name for name in self._names if name not in left),
            )
