"""What the server saw: the recorded messages of a run, held against what its secure sum promises.

Every message is decoded strictly and encoded again, so that no byte is undeclared; every public key, nonce and
commitment is looked for elsewhere, so that none is used twice; masked vectors are tested against each other and, in a
rehearsal, against each party's own vector, also after the server has taken off the self-masks that it learns. All
tests together raise a false alarm with a probability of at most ``LEVEL``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from choral.audits.findings.schema import Check
from choral.audits.findings.text import amount
from choral.audits.transcripts.recorded_sums import RecordedSession, SeenMessage, decode, recorded_sessions

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run
    from choral.trainers.run_folder.transcript import Recorded

LEVEL = 1e-3


class TranscriptAudit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was looked at. detail: what was recorded. unread: messages of which no more than size and digest was looked
    at. plain: the sum hides nothing, by its own words. tests: statistical tests, which share ``false_alarms``.

    detectable: the share of a vector's coordinates that could not be left unmasked without being found; None where no
    vector was known. head: of the chain of hashes, which vouches for every entry; None for a transcript without.
    method: in words.
    """

    detail: str
    sessions: int
    messages: int
    bytes: int
    unread: int
    plain: bool
    uploads: int
    vectors: int
    tests: int
    false_alarms: float
    detectable: float | None
    method: str
    checks: tuple[Check, ...]
    head: str | None = None


def transcript_audit(run: Run) -> TranscriptAudit | None:
    """None for a run without a transcript in its folder.

    Raises: RunFolderError for a transcript that is incomplete, damaged or edited, or another one than run.json tells
        of.
    """
    from choral.audits.transcripts.vector_tests import vector_checks
    from choral.trainers.run_folder.transcript import Recorded

    recorded = Recorded.of(run.folder)
    if recorded is None:
        return None
    chained = _chained(run, recorded)
    sessions = recorded_sessions(recorded)
    for session in sessions:
        if (run.info.secure_sum or {}).get("key") == "shared":
            session.unread = len(session.seen)  # ciphertexts of SEAL, which nothing here can read
        else:
            decode(session, recorded, ahead=(run.info.secure_sum or {}).get("trips") in (2, 3))
    statistics = vector_checks(sessions, recorded, LEVEL)
    declared, models = _declared(sessions), _models(sessions)
    checks = [chained, *declared, _sizes(run, sessions), _fresh(sessions), *models, *_survivors(run, sessions)]
    every = [seen for session in sessions for seen in session.seen]
    return TranscriptAudit(
        detail=recorded.detail,
        sessions=len(sessions),
        messages=len(every),
        bytes=sum(seen.size for seen in every),
        plain=any(session.opened.secure_sum == "plain" for session in sessions),
        unread=sum(session.unread for session in sessions),
        uploads=statistics.uploads,
        vectors=sum(len(session.vectors) for session in sessions),
        tests=statistics.tests,
        false_alarms=LEVEL,
        detectable=statistics.detectable,
        method="Chernoff bounds on the difference, sum and inner product of masked vectors, with Bonferroni's"
        " correction over all tests; under the null a masked vector is uniform",
        checks=(*checks, *statistics.checks),
        head=recorded.head,
    )


CHAINED = "The transcript is as it was written"


def transcript_gone(run: Run) -> tuple[Check, ...]:
    """For a run whose transcript was recorded and is not in its folder."""
    if run.info.transcript is None:
        return ()
    finding = f"run.json tells of one of {run.info.transcript.entries:,} entries, which is not in the run's folder."
    return (Check(name=CHAINED, verdict="unverified", finding=finding),)


def _chained(run: Run, recorded: Recorded) -> Check:
    """Whether the chain of hashes vouches for what is read here. Raises: RunFolderError where it is broken."""
    sealed, head = run.info.transcript, recorded.head
    recorded.check_bytes()
    if sealed is not None:
        recorded.check(sealed, run.history[-1].round)
    if head is None:
        finding = "It is of version 1, which had no chain of hashes: an edit of it could not be found."
        return Check(name=CHAINED, verdict="unverified", finding=finding)
    if sealed is None:
        finding = "run.json holds no head of its chain of hashes: that its end was cut off could not be found."
        return Check(name=CHAINED, verdict="unverified", finding=finding)
    finding = (
        f"{len(recorded.entries):,} entries in one chain of hashes, through the head in run.json. It ends in {head}:"
        " compare that with a copy kept elsewhere, since whoever writes the folder can write another chain."
    )
    return Check(name=CHAINED, verdict="holds", finding=finding)


def _declared(sessions: Sequence[RecordedSession]) -> list[Check]:
    """No byte on the wire that the protocol does not declare; nothing to say where no message could be read."""
    name = "The messages hold nothing that is not declared"
    strange = [said for session in sessions for said in session.strange]
    if strange:
        more = f" ({len(strange)} messages in all)" if len(strange) > 1 else ""
        return [Check(name=name, verdict="violated", finding=f"{strange[0]}{more}.")]
    if old := next((session.old for session in sessions if session.old is not None), None):
        from choral.protocols.masking.messages import VERSION

        finding = f"They are of protocol version {old}; this Choral reads {VERSION}. Audit them with one of their time."
        return [Check(name=name, verdict="unverified", finding=finding)]
    if any(session.unread for session in sessions):
        return []
    count = sum(len(session.seen) for session in sessions)
    finding = f"{count:,} messages, each of its declared size and in its one canonical form."
    return [Check(name=name, verdict="holds", finding=finding)]


def _sizes(run: Run, sessions: Sequence[RecordedSession]) -> Check:
    """The bytes that the history counts are those of the messages."""
    name = "The bytes that were counted are those of the messages"
    history = {entry.round: entry for entry in run.history}
    rounds = _bytes_by_round(sessions, 4 * run.info.parameters)
    compared = 0
    for number, attempts in sorted(rounds.items()):
        repeated = any(len(each) > 1 for each in attempts.values())
        if number not in history or repeated:  # a round that was cut short, and repeated
            continue
        up, down = (sum(each[0][way] for each in attempts.values()) for way in (0, 1))
        before = history.get(number - 1)
        if history[number].failed or (before and before.failed):  # what a sum that failed had cost is counted later
            continue
        entry = history[number]
        if (up, down) != (entry.bytes_up, entry.bytes_down):
            finding = (
                f"Round {number}: the busiest party sent {up:,} and received {down:,} bytes, the history says"
                f" {entry.bytes_up:,} and {entry.bytes_down:,}."
            )
            return Check(name=name, verdict="violated", finding=finding)
        compared += 1
    kept = [entry.round for entry in run.history if entry.round and not entry.failed]
    missing = [number for number in kept if number not in rounds]
    if missing:
        finding = f"Round {missing[0]} is in the history and not in the transcript ({len(missing)} in all)."
        return Check(name=name, verdict="unverified", finding=finding)
    if not compared:
        finding = "No round is complete in both the history and the transcript, so that nothing could be compared."
        return Check(name=name, verdict="unverified", finding=finding)
    moved = sum(seen.size for session in sessions for seen in session.seen)
    return Check(name=name, verdict="holds", finding=f"{amount(moved)} in {compared} rounds, to the byte.")


def _bytes_by_round(sessions: Sequence[RecordedSession], model: int) -> dict[int, dict[int, list[tuple[int, int]]]]:
    """What the busiest party sent and received, by round and exchange; several where a round was repeated.

    What opened a session counts to its first sum. model: its bytes, of which an old transcript does not tell.
    """
    rounds: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for session in sessions:
        sums: dict[int, list[SeenMessage]] = {}
        for seen in session.seen:
            sums.setdefault(seen.sum, []).append(seen)
        opening = sums.pop(0, [])
        for number, place in enumerate(sorted(sums)):
            first = sums[place][0]
            begun = first.begun
            exchange, told = (begun.exchange, begun.told) if begun else (1, model)
            sizes: dict[str, dict[str, int]] = {"up": {}, "down": {}}
            for seen in [*([] if number else opening), *sums[place]]:
                sizes[seen.way][seen.party] = sizes[seen.way].get(seen.party, 0) + seen.size
            up, down = (max(sizes[way].values(), default=0) for way in ("up", "down"))
            rounds.setdefault(first.round, {}).setdefault(exchange, []).append((up, down + told))
    return rounds


def _fresh(sessions: Sequence[RecordedSession]) -> Check:
    """Nothing that must be fresh occurs twice: keys, nonces, commitments, and whole messages."""
    name = "No key, nonce, commitment or message was used twice"
    used: dict[bytes, tuple[str, str, int]] = {}
    count = 0
    for number, session in enumerate(sessions, start=1):
        if session.opened.secure_sum != "plain":
            values = [(f"message of {s.party}", s.where, bytes.fromhex(s.message.sha256)) for s in session.seen
                      if s.way == "up"]  # fmt: skip
            for what, where, value in [*values, *_once(session)]:
                count += 1
                # A session counts its own rounds: the same round of another session is another round.
                before = used.setdefault(value, (what, where, number))
                if before != (what, where, number):
                    finding = (
                        f"The {what} ({where}, session {number}) is the {before[0]} ({before[1]}, session"
                        f" {before[2]}) again."
                    )
                    return Check(name=name, verdict="violated", finding=finding)
    if not count:
        return Check(name=name, verdict="holds", finding="The plain sum has no keys.", refutable=False)
    return Check(name=name, verdict="holds", finding=f"{count:,} values, all different.")


def _once(session: RecordedSession) -> Iterator[tuple[str, str, bytes]]:
    """(what, where, value) of all that a party must make afresh; keys for one round may be sent for it again."""
    from choral.protocols.masking import messages

    for kind, names in ((messages.Hello, ("commitment",)), (messages.Reveal, ("nonce",))):
        for seen, message in session.of(kind):
            for attribute in names:
                yield f"{attribute} of {seen.party}", "opening", getattr(message, attribute)
    for seen, message in session.of(messages.DealtShares):
        where = f"round {message.round}"
        yield f"seed commitment of {seen.party}", where, message.seed_commitment
        for packet in message.packets:
            yield f"seed share of {seen.party} for party {packet.party}", where, packet.seed_hash
            yield f"key share of {seen.party} for party {packet.party}", where, packet.key_hash
    keys: Iterable[tuple[SeenMessage, Any]] = [
        *session.of(messages.Advertise),
        *((seen, m.following) for seen, m in session.of(messages.Unmask) if m.following is not None),
    ]
    for seen, message in keys:
        yield f"mask key of {seen.party}", f"round {message.round}", message.mask
        yield f"transport key of {seen.party}", f"round {message.round}", message.transport


def _models(sessions: Sequence[RecordedSession]) -> list[Check]:
    """Every party of a sum was shown the same Begin; nothing to say where none was sent, or to one party alone."""
    from choral.protocols.masking.messages import Begin

    name, sums = "All parties of a sum were shown the same model", 0
    for session in sessions:
        shown: dict[int, list[Begin]] = {}
        for _, begin in session.of(Begin):
            shown.setdefault(begin.round, []).append(begin)
        for number, begins in sorted(shown.items()):
            if (different := len(set(begins))) > 1:
                finding = f"In sum {number} of a session {different} different ones were shown, or other terms."
                return [Check(name=name, verdict="violated", finding=finding)]
            sums += len(begins) > 1
    return [Check(name=name, verdict="holds", finding=f"{sums:,} sums, one in each.")] if sums else []


def _survivors(run: Run, sessions: Sequence[RecordedSession]) -> list[Check]:
    """Everybody was told the same survivors, never fewer than agreed on, and as many as the history says."""
    from choral.protocols.masking import messages
    from choral.protocols.masking.ahead.messages import SignedSurvivors

    name = "Everybody was told the same survivors, and enough of them"
    history = {entry.round: entry.survivors for entry in run.history if entry.round and not entry.failed}
    claimed = int((run.info.secure_sum or {}).get("min_survivors") or 0)
    fewest, told = None, 0
    last: dict[int, int] = {}
    for seen in (seen for session in sessions for seen in session.seen):
        last[seen.round] = max(seen.sum, last.get(seen.round, 0))
    for session in sessions:
        setup = session.setup
        sets: dict[tuple[int, int], set[bytes]] = {}
        for seen, message in session.of((messages.Survivors, SignedSurvivors)):
            sets.setdefault((seen.sum, seen.round), set()).add(message.bitmap)
            told += 1
        for (place, number), bitmaps in sorted(sets.items()):
            if len(bitmaps) > 1:
                finding = f"Round {number}: parties were told {len(bitmaps)} different sets of survivors."
                return [Check(name=name, verdict="violated", finding=finding)]
            count = sum(byte.bit_count() for byte in next(iter(bitmaps)))
            least = max(claimed, setup.min_survivors if setup else 0)
            if count < least:
                finding = f"Round {number} was opened over {count} parties, at least {least} were agreed on."
                return [Check(name=name, verdict="violated", finding=finding)]
            if last[number] == place and history.get(number, count) != count:
                finding = f"Round {number}: {count} survivors on the wire, {history[number]} in the history."
                return [Check(name=name, verdict="violated", finding=finding)]
            fewest = count if fewest is None else min(fewest, count)
    if fewest is None:
        return []
    return [
        Check(name=name, verdict="holds", finding=f"{told:,} messages name them; at least {fewest} in every round.")
    ]
