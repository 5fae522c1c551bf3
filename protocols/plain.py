"""The sum without protection: the server sees every vector. The yardstick for what masking costs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from choral.protocols.crypto.identity import Identity
from choral.protocols.crypto.modular_integers import accumulator_dtype, lift, pack, packed_bytes
from choral.protocols.driver import PartyDriver, Patience, Randomness, RoundTerms, ServerDriver, Store
from choral.protocols.errors import PolicyError, SpecError, StateUsedError, TooFewSurvivorsError
from choral.protocols.interface import IntVector, Losses, Step, SumResult, SumSpec, check_spec
from choral.protocols.own_vector import checked, is_tensor, words
from choral.protocols.plain_drivers import PlainPartyDriver, PlainServerDriver
from choral.protocols.tap import show, watched

if TYPE_CHECKING:
    import torch

    from choral.protocols.masking.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Each party sends its vector bit-packed to the server, which adds them up and sees each one.

    Guarantee: none against the server. Bytes: ceil(modulus_bits length / 8) up per party, nothing down.
    """

    @property
    def name(self) -> str:
        return "plain"

    def open(self, spec: SumSpec, *, policy: Policy | None = None) -> PlainSession:
        """Raises: PolicyError for any policy: there is none that a sum which shows each vector could meet."""
        check_spec(spec)
        self._refuse(policy)
        return PlainSession(spec)

    def party_driver(
        self,
        spec: SumSpec,
        *,
        name: str,
        identity: Identity | None = None,
        policy: Policy | None = None,
        randomness: Randomness = secrets.token_bytes,
        store: Store | None = None,
        state: bytes | None = None,
        purpose: str = "",
        repeats: bool = True,
    ) -> PartyDriver:
        """One party's half. It has no use for an identity, randomness, a store or a purpose. Raises: as ``open``."""
        del identity, randomness, store, state, purpose
        check_spec(spec)
        self._refuse(policy)
        return PlainPartyDriver(spec, name=name, repeats=repeats)

    def server_driver(
        self,
        spec: SumSpec,
        *,
        directory: Mapping[str, bytes] | None = None,
        randomness: Randomness = secrets.token_bytes,
        patience: Patience = None,
        quorum: int | None = None,
    ) -> ServerDriver:
        """The server's half; it has no use for a directory. Raises: SpecError."""
        del directory
        check_spec(spec)
        return PlainServerDriver(spec, randomness=randomness, patience=patience, quorum=quorum)

    def _refuse(self, policy: Policy | None) -> None:
        if policy is not None:
            raise PolicyError(
                "a plain sum shows the server every vector, which no policy allows",
                hint="use Masked or Homomorphic, or leave the policy out",
            )


class PlainSession:
    """See :class:`choral.protocols.interface.SumSession`."""

    def __init__(self, spec: SumSpec) -> None:
        self._spec = spec

    @property
    def statement(self) -> Mapping[str, Any]:
        return {
            "name": "plain",
            "trust": "The server is trusted with every party's vector: it sees each one.",
            "server_learns": "every vector",
            "parties": len(self._spec.parties),
            "modulus_bits": self._spec.modulus_bits,
        }

    def begin(self, lost: Mapping[str, Step] | None = None, terms: RoundTerms | None = None) -> PlainRound:
        """A vector that was sent is in the sum: there are no steps after it that a party could be lost at."""
        del terms  # nobody compares them in this sum
        return PlainRound(self._spec, Losses(lost, self._spec.parties))

    def agreed(self, party: str) -> None:
        """Nobody signs anything in this sum."""


class PlainRound:
    """See :class:`choral.protocols.interface.SumRound`. Memory: one vector, whatever the number of parties."""

    def __init__(self, spec: SumSpec, losses: Losses) -> None:
        self._spec, self._losses = spec, losses
        self._sum = np.zeros(spec.length, accumulator_dtype(spec.modulus_bits))
        self._bytes_up: dict[str, int] = {}
        self._finished = False

    def needs(self, party: str) -> None:
        """Nobody compares what the parties compute from."""

    def submit(self, party: str, vector: IntVector | torch.Tensor) -> None:
        """Raises: SpecError for an unknown party; StateUsedError the second time; InputError for another vector."""
        check_submission(party, self._spec, self._bytes_up, self._losses, finished=self._finished)
        values = checked(vector, self._spec.length, self._spec.bound, self._spec.weight_bound)
        if is_tensor(values):
            values = values.cpu().numpy()
        if watched():  # packing only says what is known: the bytes, by formula, and these residues
            show("up", party, pack(words(values, self._spec.modulus_bits), self._spec.modulus_bits))
        self._bytes_up[party] = packed_bytes(self._spec.length, self._spec.modulus_bits)
        same = self._sum.itemsize == values.itemsize  # then the residues need no memory of their own
        self._sum += values.view(self._sum.dtype) if same else words(values, self._spec.modulus_bits)

    def finish(self) -> SumResult:
        """Raises: TooFewSurvivorsError when nobody submitted; StateUsedError the second time."""
        if self._finished:
            raise StateUsedError("this round is finished")
        self._finished = True
        if not self._bytes_up:
            raise TooFewSurvivorsError("nobody sent a vector", survivors=0, needed=1, missing=self._spec.parties)
        return SumResult(
            total=lift(self._sum, self._spec.modulus_bits),
            survivors=tuple(party for party in self._spec.parties if party in self._bytes_up),
            bytes_up={party: self._bytes_up.get(party, 0) for party in self._spec.parties},
            bytes_down=dict.fromkeys(self._spec.parties, 0),
        )


def check_submission(
    party: str, spec: SumSpec, submitted: Mapping[str, Any], losses: Losses, *, finished: bool
) -> None:
    """Raises: SpecError for a party not in the roster, or lost; StateUsedError for a second vector or a finished
    round.
    """
    if not isinstance(party, str) or party not in spec.members:
        raise SpecError(f"unknown party {party!r}", hint="parties are fixed when the session is opened")
    if not losses.takes(party, "vector"):
        raise SpecError(f"party {party!r} drops out of this round before it sends a vector", hint="do not submit it")
    if finished:
        raise StateUsedError("this round is finished")
    if party in submitted:
        raise StateUsedError(f"{party} has already submitted its vector of this round")
