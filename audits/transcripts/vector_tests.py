"""The statistical part of the transcript's audit: masked vectors against each other, and against what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from choral.audits.findings.schema import Check
from choral.audits.findings.text import power
from choral.audits.transcripts.independence import (
    FEWEST_BITS,
    SmallestPValue,
    detectable_share,
    phases,
    smallest_of_known,
    smallest_of_pairs,
)

if TYPE_CHECKING:
    from choral.audits.transcripts.recorded_sums import RecordedSession
    from choral.protocols.masking import messages
    from choral.trainers.run_folder.transcript import Recorded

SMALLEST = 1e-300


class Statistics(NamedTuple):
    uploads: int
    tests: int
    detectable: float | None
    checks: tuple[Check, ...]


class _Upload(NamedTuple):
    """A masked vector as it was sent, and as the server has it once it knows the self-mask (peeled; else None)."""

    party: str
    where: str
    sum: int
    sent: Any
    peeled: Any


def vector_checks(sessions: Sequence[RecordedSession], recorded: Recorded, level: float) -> Statistics:
    """Two checks, of reuse and of correlation, where there is something that they can be made of."""
    if any(session.opened.secure_sum == "plain" for session in sessions):
        return _plain(sessions)
    reuse: list[tuple[SmallestPValue, str, str]] = []
    known: list[tuple[SmallestPValue, str, str]] = []
    uploads, length = 0, 0
    for session in sessions:
        masked = _uploads(session)
        setup = session.setup
        if not masked or setup is None or setup.modulus_bits < FEWEST_BITS:
            continue
        uploads += len(masked)
        bits, length = setup.modulus_bits, setup.length
        sent = phases([upload.sent for upload in masked], bits)
        reuse.append(_named(smallest_of_pairs(sent, sums=True), masked, masked))
        peeled = [upload for upload in masked if upload.peeled is not None]
        if peeled:
            bare = phases([upload.peeled for upload in peeled], bits)
            reuse.append(_named(smallest_of_pairs(bare, sums=False), peeled, peeled))
        if session.opened.secure_sum == "homomorphic":  # its masked vectors are keys
            against, length = _against_ciphertexts(session, recorded)
            known += against
        else:
            known += _against_vectors(session, recorded, masked, peeled, bits)
    tests = sum(found.tests for found, _, _ in (*reuse, *known))
    checks = [_reuse(reuse, uploads, tests, level)] if uploads else []
    detectable = detectable_share(length, tests, level) if known else None
    checks += _correlation(known, tests, level, detectable)
    return Statistics(uploads, tests, detectable, tuple(checks))


def _plain(sessions: Sequence[RecordedSession]) -> Statistics:
    count = sum(1 for session in sessions for seen in session.seen if seen.way == "up")
    finding = f"All {count:,} do: the plain sum shows each party's vector to the server, and promises nothing else."
    name = "No message says anything of a single party's vector"
    check = Check(name=name, verdict="holds", finding=finding, refutable=False)
    return Statistics(count, 0, None, (check,))


def _named(
    found: SmallestPValue, ones: Sequence[_Upload], others: Sequence[_Upload]
) -> tuple[SmallestPValue, str, str]:
    one, other = ones[found.one], others[found.other]
    return found, f"{one.party}, {one.where}", f"{other.party}, {other.where}"


def _uploads(session: RecordedSession) -> list[_Upload]:
    """All masked vectors of a session that can be read; what is not as it should be was found elsewhere."""
    from choral.protocols.crypto.modular_integers import PackingError, unpack
    from choral.protocols.masking import messages

    setup = session.setup
    if setup is None:
        return []
    seeds = _seeds(session, setup)
    found = []
    for seen, message in session.of(messages.Upload):
        packed = messages.from_pieces(message.vector)
        try:
            sent = unpack(packed or b"", setup.length, setup.modulus_bits)
        except PackingError:
            session.strange.append(f"{seen.where}, {seen.party}: its masked vector has another length")
            continue
        seed = seeds.get((message.round, setup.roster.index(seen.party)))
        found.append(_Upload(seen.party, seen.where, seen.sum, sent, _peeled(sent, seed)))
    return found


def _peeled(sent: Any, seed: bytes | None) -> Any:
    from choral.protocols.crypto.mask_stream import add_mask

    if seed is None:
        return None
    left = sent.copy()
    add_mask(left, seed, subtract=True)
    return left


def _seeds(session: RecordedSession, setup: messages.SumSetup) -> Mapping[tuple[int, int], bytes]:
    """The self-mask seeds that the server learns, by round and dealer: from the shares in Unmask, as it does."""
    from choral.protocols.crypto.shamir import Combiner, ShareError
    from choral.protocols.masking import messages

    shares: dict[tuple[int, int], dict[int, bytes]] = {}
    for seen, message in session.of(messages.Unmask):
        for revealed in message.seeds:
            holder = setup.roster.index(seen.party) + 1
            shares.setdefault((message.round, revealed.party), {})[holder] = revealed.share
    seeds = {}
    combiners: dict[tuple[int, ...], Combiner] = {}
    for place, held in shares.items():
        indices = tuple(sorted(held)[: setup.threshold])
        if len(indices) < setup.threshold:
            continue
        if indices not in combiners:
            combiners[indices] = Combiner(list(indices), setup.threshold)
        try:
            seeds[place] = combiners[indices].combine([held[index] for index in indices])
        except ShareError:
            continue
    return seeds


def _against_vectors(
    session: RecordedSession, recorded: Recorded, masked: Sequence[_Upload], peeled: Sequence[_Upload], bits: int
) -> list[tuple[SmallestPValue, str, str]]:
    """Every masked vector, as sent and peeled, against every party's vector of its sum."""
    from choral.audits.transcripts.independence import thinned

    vectors: dict[int, dict[str, Any]] = {}
    for entry, place, _ in session.vectors:
        vectors.setdefault(place, {})[entry.party] = thinned(recorded.values(entry))
    found = []
    for place, known in vectors.items():
        names = list(known)
        for chosen, attribute in ((masked, "sent"), (peeled, "peeled")):
            mine = [upload for upload in chosen if upload.sum == place]
            if mine:
                rows = phases([getattr(upload, attribute) for upload in mine], bits)
                result = smallest_of_known(rows, [known[name] for name in names], bits)
                after = "" if attribute == "sent" else ", its self-mask taken off"
                one = mine[result.one]
                found.append((result, f"{one.party} in {one.where}{after}", f"{names[result.other]}'s vector"))
    return found


def _against_ciphertexts(
    session: RecordedSession, recorded: Recorded
) -> tuple[list[tuple[SmallestPValue, str, str]], int]:
    """Every ciphertext of a split key against what it would be of each party's vector under no key; and how many
    residues were looked at in each."""
    import numpy as np

    from choral.audits.transcripts.independence import smallest_by_difference, thinned, turns
    from choral.protocols.homomorphic.messages import Ciphertext
    from choral.protocols.homomorphic.split.parameters import choose
    from choral.protocols.homomorphic.split.party_and_server import SplitRound, residues, without_key
    from choral.protocols.interface import SumSpec

    opened = session.opened
    chosen = choose(SumSpec(parties=opened.parties, length=opened.length, bound=opened.bound))
    prime = chosen.ring.primes[0]
    sent: dict[int, dict[str, list[Any]]] = {}
    places: dict[int, str] = {}
    for seen, message in session.of(Ciphertext):
        terms = SplitRound(parameters=chosen, session=bytes(32), number=message.round)
        places[seen.sum] = seen.where
        into = sent.setdefault(seen.sum, {}).setdefault(seen.party, [])
        into += [turns(part[0], prime) for part in residues(message.body, message.index, terms)]
    bare: dict[int, dict[str, Any]] = {}
    for entry, place, _ in session.vectors:
        terms = SplitRound(parameters=chosen, session=bytes(32), number=max(entry.round, 1))
        parts = [turns(part[0], prime) for part in without_key(recorded.values(entry), terms)]
        bare.setdefault(place, {})[entry.party] = thinned(np.concatenate(parts))
    found, length = [], 0
    for place, known in bare.items():
        mine = {party: thinned(np.concatenate(parts)) for party, parts in sent.get(place, {}).items()}
        if not mine:
            continue
        senders, names = list(mine), list(known)
        result = smallest_by_difference(np.stack(list(mine.values())), np.stack(list(known.values())))
        length = len(known[names[0]])
        found.append((result, f"{senders[result.one]} in {places[place]}", f"{names[result.other]}'s vector"))
    return found, length


def _reuse(found: Sequence[tuple[SmallestPValue, str, str]], uploads: int, tests: int, level: float) -> Check:
    name = "No mask was used twice"
    worst, one, other = min(found, key=lambda item: item[0].p_value)
    if worst.p_value * tests <= level:
        finding = f"The masked vectors of {one} and {other} cancel (p ≤ {power(max(worst.p_value, SMALLEST))})."
        return Check(name=name, verdict="violated", finding=finding)
    finding = (
        f"{uploads:,} masked vectors, every two compared; the smallest of {tests:,} p-values is"
        f" {power(worst.p_value)}, {power(level / tests)} would be an alarm."
    )
    return Check(name=name, verdict="holds", finding=finding)


def _correlation(
    found: Sequence[tuple[SmallestPValue, str, str]], tests: int, level: float, detectable: float | None
) -> list[Check]:
    """Nothing to say where no vector was recorded, or messages are no masked vectors."""
    name = "No message says anything of a single party's vector"
    if not found:
        return []
    worst, one, other = min(found, key=lambda item: item[0].p_value)
    if worst.p_value * tests <= level:
        finding = f"The message of {one} follows {other} (p ≤ {power(max(worst.p_value, SMALLEST))})."
        return [Check(name=name, verdict="violated", finding=finding)]
    alarm, least = power(level / tests), power(worst.p_value)
    finding = (
        "Each vector on the wire was held against every party's own of its round, as sent and, where it was masked,"
        f" with the self-mask off: the smallest of {tests:,} p-values is {least}, {alarm} would be an alarm."
        f" Up to {100 * (detectable or 0.0):.0f} % of a vector left unmasked could have gone unseen."
    )
    return [Check(name=name, verdict="holds", finding=finding)]
