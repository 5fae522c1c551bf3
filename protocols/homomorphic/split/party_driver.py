"""A party of the split-key sum behind one door: a masked sum's party, whose vector is the key of a ciphertext."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from choral.protocols.driver import used
from choral.protocols.errors import PolicyError, SpecError
from choral.protocols.homomorphic.ring.gaussian import TAIL
from choral.protocols.homomorphic.split.parameters import SplitParameters, choose
from choral.protocols.homomorphic.split.party_and_server import SplitRound, encrypt
from choral.protocols.interface import SumSpec, check_spec
from choral.protocols.masking import messages
from choral.protocols.masking.party_driver import MaskedPartyDriver
from choral.protocols.masking.policy import PartyContext, Policy
from choral.protocols.masking.signing import digest

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked

OF_KEYS = ("maximum_modulus_bits", "maximum_bound", "maximum_length", "maximum_weight", "wraps_at", "encoding")
"""What the policy of the sum of keys says of its vector, which is not the long one."""


@lru_cache(maxsize=16)
def chosen(spec: SumSpec) -> SplitParameters:
    """:func:`choose`, once for all parties of a process; public."""
    return choose(spec)


@lru_cache(maxsize=16)
def key_spec(parameters: SplitParameters) -> SumSpec:
    """What the masked sum of the keys adds up, mod 2^``key_bits``: its ``encoding`` binds the signatures on it to the
    long vector's terms. Public, and once for all parties of a process: it goes through all their names.
    """
    return SumSpec(
        parties=parameters.spec.parties,
        length=parameters.degree,
        bound=TAIL,
        bits=parameters.key_bits,
        encoding=f"split-key sum, terms {digest('split/terms', parameters.terms().encode()).hex()}",
        directory=parameters.spec.directory,
        terms=parameters.spec.terms,
    )


def key_policy(keys: Masked, parameters: SplitParameters, policy: Policy) -> Policy:
    """What a party with this policy accepts of the sum of keys, whose terms it derives from those of the long vector.

    Raises: PolicyError where the long vector is not what the policy allows.
    """
    spec = parameters.spec
    policy.check_vector(spec.length, spec.bound, spec.modulus_bits, spec.encoding, spec.weight_bound)
    if policy.wraps_at != spec.wraps_at:
        raise PolicyError("this party agreed to another modulus at which the sum may wrap")
    own = keys.policy(key_spec(parameters))
    return replace(policy, **{name: getattr(own, name) for name in OF_KEYS})


class SplitPartyDriver(MaskedPartyDriver):
    """See :class:`choral.protocols.driver.PartyDriver`. For its vector it sends the ciphertext's pieces, then the key.

    keys: the masked sum's thresholds and trust. spec: the long vector, as this party knows it; the ring and its
    parameters are derived from it and the roster, none are taken from the server.

    Raises: SpecError, PolicyError.
    """

    def __init__(self, keys: Masked, spec: SumSpec, context: PartyContext) -> None:
        check_spec(spec)
        self._keys, self._spec = keys, spec
        key_policy(keys, chosen(spec), context.policy)
        super().__init__(context)

    def _parameters(self, roster: tuple[str, ...]) -> SplitParameters:
        if roster == self._spec.parties:
            return chosen(self._spec)
        try:
            return chosen(replace(self._spec, parties=roster, directory=self._spec.population))
        except SpecError as error:
            raise PolicyError(f"no sum of this party's vectors can be made over that roster: {error}") from None

    def _policy_for(self, setup: messages.SumSetup) -> Policy:
        return key_policy(self._keys, self._parameters(setup.roster), self.policy)

    def supply(self, vector: Any) -> tuple[bytes, ...]:
        """See :class:`choral.protocols.driver.PartyDriver`. The key is drawn here, and gone when it is masked.

        vector: int64, shape (length,), |value| <= bound; numpy, or a torch tensor (on a GPU it is encrypted there).
        Raises: InputError, before anything is drawn; StateUsedError where no vector is asked for (any more).
        """
        now, ready = self._ready()
        if self._membership is None:
            raise used("no session is open to this party")
        terms = SplitRound(
            parameters=self._parameters(self._membership.setup.roster),
            session=self._membership.session,
            number=now.begin.round,
        )
        encrypted = encrypt(vector, terms, randomness=self._randomness)
        pieces = tuple(encrypted.messages)
        uploaded, upload = ready.upload(encrypted.key)
        return self._supplied(now, uploaded, (*pieces, upload))

    def __repr__(self) -> str:
        return f"<SplitPartyDriver of {self.name!r}>"
