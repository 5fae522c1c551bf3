"""What both sides of a shared-key sum compute for themselves: a setup's ring, what is signed, the keys of rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from choral.protocols import argument_checks as checks
from choral.protocols.crypto.keys import hkdf_sha256
from choral.protocols.errors import PolicyError, ProtocolError, SpecError
from choral.protocols.homomorphic.shared import bfv, ckks
from choral.protocols.homomorphic.shared.bfv import BfvPlan
from choral.protocols.homomorphic.shared.ckks import CkksPlan
from choral.protocols.homomorphic.shared.messages import KeySetup
from choral.protocols.homomorphic.shared.seal import Ring, RingParameters
from choral.protocols.masking.messages import MAX_PARTIES
from choral.protocols.masking.policy import Policy, check_policy, check_roster
from choral.protocols.masking.signing import Signatures, digest

Plan = BfvPlan | CkksPlan

DEALER = 0
"""Place in the roster of the party that makes the key. Any party could read every vector; so nothing rests on which."""

PIECE_BYTES = 1 << 20
"""Of ciphertexts in one message, at most, unless one alone is longer: what a message costs in memory."""

MAX_SKIPPED = 1 << 16
"""Rounds that a party may miss in a row; each costs two hashes to pass."""


class KeyDisputeError(ProtocolError):
    """Two parties hold different keys: the dealer dealt two, or one confirms what it was not dealt."""

    def __init__(self, dealer: str, party: str) -> None:
        super().__init__(
            f"{party} confirms another key than was dealt here by {dealer}",
            hint="nothing was encrypted yet: open the next session without one of them",
        )
        self.dealer, self.party = dealer, party
        self.blame = f"{dealer} or {party}"


@dataclass(frozen=True, kw_only=True)
class SharedPolicy:
    """One party's own terms. The server's word counts for none of them.

    directory: Ed25519 public keys by party name, pinned: obtained from elsewhere than this server, and no two alike.
    minimum_cohort: fewest vectors in a sum that this party's vector may be in, or that it opens; at least 2.
    maximum_bound: of a value, in BFV. maximum_length: of the vector. encoding: the text that the setup must have.

    Raises: SpecError for values of another type or outside these ranges, two parties with one key, or two spellings of
    one name.
    """

    directory: Mapping[str, bytes] = field(default_factory=dict)
    minimum_cohort: int = 2
    maximum_bound: int = 2**62
    maximum_length: int = 2**31
    encoding: str = ""
    signatures: Signatures = field(default_factory=Signatures, repr=False, compare=False)
    checked: set[bytes] = field(default_factory=set, repr=False, compare=False)
    """Digests of lists whose every signature was valid: in a process that plays many parties they share the policy,
    and n parties with a list of n signatures each would otherwise look n^2 of them up."""

    def __post_init__(self) -> None:
        checks.directory(self.directory)
        checks.text(self.encoding, "the encoding")
        if not isinstance(self.signatures, Signatures) or not isinstance(self.checked, set):
            raise SpecError("expected signatures as Signatures(), and what was checked as a set")
        plain = {
            "minimum_cohort": checks.whole(self.minimum_cohort, "minimum_cohort", 2, MAX_PARTIES),
            "maximum_bound": checks.whole(self.maximum_bound, "maximum_bound", 1, 2**62),
            "maximum_length": checks.whole(self.maximum_length, "maximum_length", 1, 2**31),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def check(self, setup: KeySetup, name: str) -> Plan:
        """The plan of a setup that ``name`` may join. Raises: PolicyError when it is inconsistent or too weak."""
        plan = check_setup(setup)
        strangers = [party for party in setup.roster if party not in self.directory]
        if strangers:
            raise PolicyError(f"the roster has {strangers[0]!r}, whose key is not pinned")
        if name not in setup.roster:
            raise PolicyError(f"the roster does not have {name!r}, the party that was asked to join")
        if setup.min_survivors < self.minimum_cohort:
            raise PolicyError(
                f"this party accepts sums of at least {self.minimum_cohort}, the setup says {setup.min_survivors}"
            )
        if setup.bound > self.maximum_bound:
            raise PolicyError(f"this party accepts bounds up to {self.maximum_bound}, the setup says {setup.bound}")
        if setup.length > self.maximum_length:
            raise PolicyError(f"this party accepts {self.maximum_length} values at most, the setup says {setup.length}")
        if setup.encoding != self.encoding:
            raise PolicyError("the setup has another encoding of values to integers than this party uses")
        return plan


def shared_policy(policy: Policy) -> SharedPolicy:
    """A party's terms where the key is shared. Raises: PolicyError where they expect more than a shared key gives."""
    check_policy(policy)
    if policy.corrupt or policy.server != "semi-honest":
        raise PolicyError(
            "a shared key withstands no corrupt party and no malicious server; this party expects"
            f" {policy.corrupt} and a {policy.server} one",
            hint='use key="split"',
        )
    return SharedPolicy(
        minimum_cohort=policy.minimum_cohort,
        maximum_bound=policy.maximum_bound,
        maximum_length=policy.maximum_length,
        encoding=policy.encoding,
    )


def check_setup(setup: KeySetup) -> Plan:
    """The plan that the setup's sizes give, which must be the one that it names. Raises: PolicyError."""
    n = len(setup.roster)
    check_roster(setup.roster)
    if setup.min_survivors > n:
        raise PolicyError(f"a sum of {setup.min_survivors} out of {n} parties can never be made")
    try:
        plan = plan_of(setup)
    except SpecError as error:
        raise PolicyError(f"the setup cannot be summed: {error}") from None
    stated = RingParameters(setup.scheme, setup.degree, setup.primes, setup.special, setup.plain_modulus)
    if stated != plan.parameters:
        raise PolicyError("the setup's ring is not the one that its sizes give: noise or carries might not have room")
    return plan


def plan_of(setup: KeySetup) -> Plan:
    """Raises: SpecError."""
    n = len(setup.roster)
    if setup.scheme == "bfv":
        if setup.bound < 1:
            raise SpecError(f"expected bound >= 1, got {setup.bound}")
        return bfv.choose(n, setup.bound, setup.length)
    return ckks.choose(n, setup.magnitude, setup.length, setup.precision)


@lru_cache(maxsize=8)
def ring_of(parameters: RingParameters) -> Ring:
    """One SEAL context per process and ring; it holds no key."""
    return Ring(parameters)


def blocks_of(plan: Plan, length: int) -> int:
    return -(-length // plan.block)


def fresh_per_piece(plan: Plan) -> int:
    """Fresh ciphertexts in one message."""
    return max(1, PIECE_BYTES // plan.parameters.seeded_bytes)


def sums_per_piece(plan: Plan) -> int:
    return max(1, PIECE_BYTES // plan.parameters.full_bytes)


def values_per_piece(modulus_bits: int) -> int:
    """Of a total in clear; a multiple of 8, so that only the last piece has padding."""
    return max(8, PIECE_BYTES * 8 // modulus_bits // 8 * 8)


def hello(setup: bytes, party: int, public: bytes, nonce: bytes) -> bytes:
    return digest("shared/hello", setup, party, public, nonce)


def session_digest(setup: bytes, publics: bytes, nonces: bytes) -> bytes:
    """Fresh as soon as one party's nonce and public key are, which each honest party knows its own to be."""
    return digest("shared/session", setup, publics, nonces)


def deal(session: bytes, commitment: bytes) -> bytes:
    return digest("shared/deal", session, commitment)


def confirm(session: bytes, party: int, commitment: bytes) -> bytes:
    return digest("shared/confirm", session, party, commitment)


def seal_key(shared: bytes, session: bytes, receiver: int) -> bytes:
    """Seals one seed, once: fresh by the receiver's key of this session and by the nonces in ``session``."""
    return hkdf_sha256(shared, salt=session, info=digest("shared/seal", DEALER, receiver), length=32)


def seal_data(session: bytes, receiver: int, commitment: bytes) -> bytes:
    return digest("shared/packet", session, DEALER, receiver, commitment)


def key_commitment(session: bytes, seed: bytes) -> bytes:
    """One-way: says nothing of a uniform seed that could be computed, and fits no other."""
    return digest("shared/key", session, seed)


def key_id(session: bytes, commitment: bytes, number: int) -> bytes:
    """Of the key of one round, which follows from the committed seed. Public: the server computes it too."""
    return digest("shared/key id", session, commitment, number)[:16]


def first_link(session: bytes, seed: bytes) -> bytes:
    return hkdf_sha256(seed, salt=session, info=digest("shared/chain", 0), length=32)


def next_link(session: bytes, link: bytes, number: int) -> bytes:
    """The chain's secret after round ``number``; that of the round cannot be computed from it."""
    return hkdf_sha256(link, salt=session, info=digest("shared/chain", number), length=32)


def round_seed(session: bytes, link: bytes, number: int) -> bytes:
    """Of the ring key of round ``number``."""
    return hkdf_sha256(link, salt=session, info=digest("shared/round", number), length=32)
