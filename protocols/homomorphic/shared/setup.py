"""What both sides of a shared-key sum compute for themselves: the setup, its ring, what is signed, keys of rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from choral.protocols.crypto.keys import hkdf_sha256
from choral.protocols.errors import PolicyError, SpecError
from choral.protocols.homomorphic.shared import bfv, ckks
from choral.protocols.homomorphic.shared.bfv import BfvPlan
from choral.protocols.homomorphic.shared.ckks import CkksPlan
from choral.protocols.interface import SumSpec
from choral.protocols.masking.messages import SumSetup
from choral.protocols.masking.policy import Policy
from choral.protocols.masking.signing import NO_BEGIN as NO_BEGIN
from choral.protocols.masking.signing import digest

Plan = BfvPlan | CkksPlan

DEALER = 0
"""Place in the roster of the party that makes the key. Any party could read every vector; so nothing rests on which."""

MAX_SKIPPED = 1 << 16
"""Rounds that a party may miss in a row; each costs two hashes to pass."""


@dataclass(frozen=True)
class Floats:
    """Of a sum of floats (CKKS): the largest |value| of one party, and the error that the sum may have."""

    bound: float
    precision: float


def plan_of(n: int, spec: SumSpec | SumSetup, floats: Floats | None) -> Plan:
    """The ring for so many parties. Raises: SpecError where none has room."""
    if floats is None:
        return bfv.choose(n, spec.bound, spec.length)
    return ckks.choose(n, floats.bound, spec.length, floats.precision)


def key_setup(spec: SumSpec, *, session: bytes, min_survivors: int, floats: Floats | None = None) -> SumSetup:
    """What every party signs. It claims no more than a shared key gives: nobody may collude, and no share is ever made.

    The ring and the spec's encoding make the setup's, so that nobody joins who derives another ring from these sizes.
    Raises: SpecError where no ring has room.
    """
    n, whole = len(spec.parties), spec.population == len(spec.parties)
    ring = plan_of(n, spec, floats).parameters
    values = f"integers up to {spec.bound}" if floats is None else f"floats up to {floats.bound} to {floats.precision}"
    terms = (
        f"shared 2: {ring.scheme}, degree {ring.degree}, primes {ring.primes}, special {ring.special}, plain modulus"
        f" {ring.plain_modulus}, {n} parties, length {spec.length}, {values}, encoding {spec.encoding}"
    )
    return SumSetup(
        session=session,
        roster=spec.parties,
        length=spec.length,
        bound=spec.bound,
        modulus_bits=spec.exact_bits,
        neighbours=n - 1,
        threshold=2,
        min_survivors=min_survivors,
        corrupt=0,
        dropouts=0,
        server="semi-honest",
        encoding=f"shared-key sum, terms {digest('shared/terms', terms.encode()).hex()}",
        cohort="everyone" if whole else "chosen",
        directory=None if whole else spec.population,
        weight_bound=spec.weight_bound,
        terms=spec.terms,
    )


def agreed(policy: Policy, setup: SumSetup, floats: Floats | None) -> tuple[Policy, Plan]:
    """This party's terms for just this setup, and its ring. The masked sum's checks are still to come.

    Raises: PolicyError where the policy expects more than a shared key gives, or where the setup is not the one that
    its sizes and this party's own encoding give: then noise or carries might not have room.
    """
    if policy.corrupt or policy.server != "semi-honest":
        raise PolicyError(
            "a shared key withstands no corrupt party and no malicious server; this party expects"
            f" {policy.corrupt} and a {policy.server} one",
            hint='use key="split"',
        )
    try:
        plan = plan_of(len(setup.roster), setup, floats)
        spec = SumSpec(
            parties=setup.roster,
            length=setup.length,
            bound=setup.bound,
            encoding=policy.encoding,
            directory=setup.directory,
            weight_bound=setup.weight_bound,
            terms=setup.terms,
        )
        own = key_setup(spec, session=setup.session, min_survivors=setup.min_survivors, floats=floats)
    except SpecError as error:
        raise PolicyError(f"the setup cannot be summed: {error}") from None
    if setup != own:
        raise PolicyError(
            "the setup is not the one that its sizes give here: another ring, another encoding of values, or more"
            " protection than a shared key has"
        )
    # A ring sums exactly, whatever the modulus at which whoever asked reduces the total.
    return replace(policy, encoding=setup.encoding, maximum_modulus_bits=64, wraps_at=None), plan


def blocks_of(plan: Plan, length: int) -> int:
    return -(-length // plan.block)


def confirm(session: bytes, party: int, commitment: bytes) -> bytes:
    return digest("shared/confirm", session, party, commitment)


def seal_key(shared: bytes, session: bytes, receiver: int) -> bytes:
    """Seals one seed, once: fresh by the receiver's key of this session, and by all others, which fix ``session``."""
    return hkdf_sha256(shared, salt=session, info=digest("shared/seal", DEALER, receiver), length=32)


def seal_data(session: bytes, receiver: int, commitment: bytes) -> bytes:
    return digest("shared/packet", session, DEALER, receiver, commitment)


def key_commitment(session: bytes, seed: bytes) -> bytes:
    """One-way: says nothing of a uniform seed that could be computed, and fits no other."""
    return digest("shared/key", session, seed)


def keyed_session(session: bytes, commitment: bytes) -> bytes:
    """Of a session and its key. Public: its first half names both in every message of a round."""
    return digest("shared/session", session, commitment)


def next_link(session: bytes, link: bytes, number: int) -> bytes:
    """The chain's secret after round ``number``, from the one before; the first, after 0, from the dealt seed.

    The one before cannot be computed from it.
    """
    return hkdf_sha256(link, salt=session, info=digest("shared/chain", number), length=32)


def round_seed(session: bytes, link: bytes, number: int, begun: bytes = NO_BEGIN) -> bytes:
    """Of the ring key of round ``number``. begun: digest of the Begin that the party was shown.

    Parties that were shown different models have different keys, so that no sum of theirs opens.
    """
    return hkdf_sha256(link, salt=session, info=digest("shared/round", number, begun), length=32)
