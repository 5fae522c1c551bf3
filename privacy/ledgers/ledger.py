"""The ledger: everything one data owner ever released, written down before it is released.

Epsilon belongs to the life of the data, not to a run or a process. A ledger therefore outlives both: it is an
append-only file of JSON lines, each carrying the SHA-256 of the line before it and its own. An append is
written, flushed and fsynced under an exclusive lock before the noise it pays for is drawn, so a crash can only
overcount.

A ledger comes into being with its first event, in one piece. A file that ends in a torn line after that was cut
during an append that never returned: nothing was released for it, and the torn tail alone is removed. Any other
irregularity (an edited, missing, reordered or foreign line, a file without an event) is refused with
:class:`LedgerError`. The hash chain finds damage and careless edits. What it cannot find is a whole chain rewritten,
or the file put back to an older state, lines cut from its end included, while no process has it open: keep
:attr:`Ledger.head` elsewhere, and compare, against that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from choral.errors import ConfigError
from choral.locks import lock_file, refuse_without_locks
from choral.privacy.accounting import client_level, record_level
from choral.privacy.accounting.events import (
    CLIENT_UNIT,
    RELATIONS,
    UNIT,
    ClientRelease,
    Event,
    RecordEvent,
    ReleasePlan,
    check_relation,
    relation_of,
    stated,
)
from choral.privacy.accounting.plain_numbers import as_float
from choral.privacy.errors import LedgerError
from choral.privacy.ledgers.hash_chain import GENESIS, UnreadableError, lines
from choral.privacy.ledgers.ledger_file import (
    FORMAT,
    RESTORE,
    Header,
    Verified,
    created,
    extend,
    filter_of,
    unit_of,
    verified,
)

_ONE_EACH = "Give each data owner a ledger of its own."


class Ledger:
    """The events of one data owner: in memory if `path` is None, else in an append-only file.

    Args:
        path: the file; the first append makes it, in a folder that exists.
        holder: whose data this is. Left out, it is read from the file or set by the first PrivacyEngine that uses it.

    Safe under kill -9 and with several writing processes. Copies are the ledger itself.
    Raises: LedgerError if the file is damaged or belongs to another data owner; NoLocksError for a file on a system
        without file locks.
    """

    def __init__(self, path: str | Path | None = None, *, holder: str | None = None) -> None:
        if path is not None and not isinstance(path, str | Path):
            raise ConfigError(f"path is a {type(path).__name__}, expected that of a file, or None")
        if holder is not None and not isinstance(holder, str):
            raise ConfigError(f"holder is a {type(holder).__name__}, expected the data owner's name, or None")
        self.path = None if path is None else Path(path)
        self._asked = holder
        self._asked_delta: float | None = None
        self._asked_unit = UNIT
        self._asked_neighbours: str | None = None
        self._header: Header | None = None
        self._entries: list[ReleasePlan | Event] = []
        self._head = GENESIS
        self._seen: tuple[int, int, int] | None = None  # inode, length and time of the file as last read
        self._verified = Verified()  # what was read then
        if self.path is not None:
            refuse_without_locks(self._name)  # before anything is written
        self._refresh()
        if holder is not None and self.holder != holder:
            raise LedgerError(f"{self._name} belongs to {self.holder!r}, not to {holder!r}", hint=_ONE_EACH)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self  # what was spent is one fact, however often the promise is copied

    def __reduce_ex__(self, _: object) -> tuple[type[Self], tuple[Path]]:
        """As its file. Raises: LedgerError for one in memory, of which another process would begin anew."""
        if self.path is None:
            raise LedgerError(
                "a ledger in memory cannot be pickled: the copy would not know what is spent later, nor this one of it",
                hint="Keep it in a file: Privacy(ledger=PATH), or Ledger(PATH).",
            )
        return type(self), (self.path.absolute(),)

    def __repr__(self) -> str:
        return f"Ledger(path={self.path}, holder={self.holder!r}, events={self._count()})"

    @property
    def holder(self) -> str | None:
        """Whose data this is; None until it is known."""
        return self._header.holder if self._header else self._asked

    @property
    def delta(self) -> float | None:
        """The delta that the data owner's budget is stated at; None before the first event."""
        return self._header.delta if self._header else self._asked_delta

    @property
    def unit(self) -> str:
        """Whose presence this ledger's numbers are about: "record" or "client"."""
        return self._header.unit if self._header else self._asked_unit

    @property
    def neighbours(self) -> str:
        """The neighbour relation, in the words of the file, which may be old; see :func:`events.stated`."""
        return self._header.neighbours if self._header else self._asked_neighbours or RELATIONS[self._asked_unit][0]

    @property
    def events(self) -> tuple[RecordEvent, ...]:
        """All events so far, oldest first, with those that other processes wrote.

        Raises: LedgerError for a ledger of clients, whose events are `releases`.
        """
        self._refresh()
        self._check_unit(UNIT)
        return tuple(event for event in self._entries if not isinstance(event, ClientRelease | ReleasePlan))

    @property
    def releases(self) -> tuple[ClientRelease, ...]:
        """The same for a ledger of clients. Raises: LedgerError for one of records, unless it is still empty."""
        self._refresh()
        if self._header is not None:
            self._check_unit(CLIENT_UNIT)
        return tuple(event for event in self._entries if isinstance(event, ClientRelease))

    @property
    def segments(self) -> tuple[tuple[ReleasePlan | None, tuple[Event, ...]], ...]:
        """Each plan with the events that follow it, oldest first; those before the first plan come with None."""
        self._refresh()
        found: list[tuple[ReleasePlan | None, list[Event]]] = []
        for entry in self._entries:
            if isinstance(entry, ReleasePlan):
                found.append((entry, []))
            elif found:
                found[-1][1].append(entry)
            else:
                found.append((None, [entry]))
        return tuple((plan, tuple(events)) for plan, events in found)

    @property
    def head(self) -> str:
        """The hexadecimal SHA-256 of the last line, which vouches for all of them; zeros while there is none."""
        self._refresh()
        return self._head

    def head_after(self, events: int) -> str:
        """Return what `head` was when the ledger held so many events. Raises: LedgerError if it holds fewer."""
        self._refresh()
        places = [place for place, entry in enumerate(self._entries, 1) if not isinstance(entry, ReleasePlan)]
        if not 0 <= events <= len(places):
            raise LedgerError(f"{self._name} holds {len(places)} events, expected at least {events}", hint=RESTORE)
        if self._header is None or events == 0:
            return GENESIS
        return lines(GENESIS, (self._header, *self._entries[: places[events - 1]]))[1]

    def written(self) -> bytes:
        """Return all events as the lines of a ledger file; nothing while there is none."""
        self._refresh()
        return lines(GENESIS, (self._header, *self._entries))[0] if self._header else b""

    @classmethod
    def read(cls, content: bytes, *, holder: str) -> Self:
        """Return a ledger in memory of what :meth:`written` returned.

        Raises: LedgerError if that is damaged, holds no event, or belongs to another data owner.
        """
        ledger = cls()
        found = verified(content, f"the ledger of {holder!r}")
        ledger._header, ledger._entries, ledger._head = found.header, list(found.entries), found.head
        if all(isinstance(entry, ReleasePlan) for entry in ledger._entries):
            raise LedgerError(f"the ledger of {holder!r} holds no event; it was emptied", hint=RESTORE)
        if ledger.holder != holder:
            raise LedgerError(f"a ledger that belongs to {ledger.holder!r}, not to {holder!r}", hint=_ONE_EACH)
        return ledger

    def epsilon(self, delta: float) -> float:
        """Return what all events together cost at `delta` (PLD checked by RDP; for clients Renyi DP)."""
        if self.unit == CLIENT_UNIT:
            return client_level.epsilon(self.releases, delta)
        return record_level.epsilon(self.events, delta, neighbours=self.neighbours)

    def bind(self, holder: str, delta: float, *, unit: str = UNIT, neighbours: str | None = None) -> None:
        """Declare whose ledger this is, the delta of the budget, its unit and neighbours; the first append writes it.

        neighbours: a relation of the unit's; None takes the ledger's own, or the unit's usual one.
        Raises: LedgerError if the ledger belongs to another data owner or states another delta, unit or relation.
        """
        if unit not in RELATIONS:
            raise ConfigError(f"unit is {unit!r}, expected one of {', '.join(RELATIONS)}")
        if neighbours is not None:
            check_relation(neighbours, unit)
        if not isinstance(holder, str) or not holder:
            raise ConfigError(f"holder is {holder!r:.80}, expected a name")
        record_level.check_target(1.0, delta := as_float("delta", delta))
        self._refresh()
        if self.holder not in (None, holder):
            raise LedgerError(f"{self._name} belongs to {self.holder!r}, not to {holder!r}", hint=_ONE_EACH)
        if self.delta not in (None, delta):
            raise LedgerError(
                f"{self._name} states its budget at delta={self.delta}, not {delta}",
                hint="Keep one delta for the life of the data.",
            )
        if self._header is not None:
            self._check_unit(unit)
        known = self.neighbours if self._header is not None else self._asked_neighbours
        if None not in (known, neighbours) and relation_of(str(known)) != neighbours:
            raise LedgerError(
                f"{self._name} is for the neighbours {stated(str(known))!r}, not {neighbours!r}",
                hint="Keep one neighbour relation for the life of the data: each has a price of its own.",
            )
        self._asked, self._asked_delta, self._asked_unit = holder, delta, unit
        self._asked_neighbours = known or neighbours

    def append(self, event: Event, *, after: int, plan: ReleasePlan | None = None) -> None:
        """Write one event down for good; on return it is on disk and may be used.

        `plan` is written in front of it: what the event, and those that are to follow, were fixed to be. Without one
        the event belongs to the latest plan, if there is one (:mod:`choral.privacy.ledgers.plans`).

        `after` is the number of events the caller knows of. If there are more, somebody else has spent since:
        nothing is written. Nor is an event that could not be read back as it is, whether to a file or in memory.
        Raises: LedgerError (that, a damaged file, no data owner bound, something that is no event or one of another
        unit, or a failed write).
        """
        if not isinstance(event, Event):
            raise LedgerError(
                f"a {type(event).__name__} is no event of a ledger", hint="See choral.privacy.accounting.events."
            )
        entries = (event,) if plan is None else (plan, event)
        for entry in entries:
            self._check_unit(unit_of(entry))
        if self._asked is None or self._asked_delta is None:
            raise LedgerError("this ledger has no data owner yet", hint="Call bind(holder, delta) before appending.")
        rule, orders = filter_of(plan, self._asked_delta)
        header = self._header or Header(
            format=FORMAT,
            holder=self._asked,
            delta=self._asked_delta,
            unit=self._asked_unit,
            neighbours=self.neighbours,
            filter=rule,
            orders=orders,
        )
        try:
            lines(GENESIS, (header, *entries))
        except UnreadableError as error:
            raise LedgerError(f"{self._name}: {error}", hint=error.hint) from error
        if self.path is None:
            self._check_count(after)
            self._head = lines(self._head, entries if self._header else (header, *entries))[1]
            self._header = header
            self._entries += entries
            return
        try:
            if self._header is None and after == 0 and created(self.path, lines(GENESIS, (header, *entries))[0]):
                self._refresh()
                return
            with self._open(write=True) as file:
                end = self._read(file)
                self._check_count(after)
                if self._header != header:
                    raise LedgerError(f"{self._name} was begun for another owner or delta meanwhile", hint=_ONE_EACH)
                extend(file.fileno(), end, lines(self._head, entries)[0])
                self._read(file)
        except OSError as error:
            raise LedgerError(
                f"{self._name} cannot be written: {error.strerror}",
                hint="Nothing was released; mend the disk and retry.",
            ) from error

    @property
    def _name(self) -> str:
        return f"ledger {self.path}" if self.path is not None else "the ledger in memory"

    def _check_unit(self, unit: str) -> None:
        if self.unit != unit:
            raise LedgerError(
                f"{self._name} counts for each {self.unit}, not for each {unit}",
                hint="Keep one ledger for each unit: their numbers do not add up.",
            )

    def _count(self) -> int:
        return sum(not isinstance(entry, ReleasePlan) for entry in self._entries)

    def _check_count(self, after: int) -> None:
        if self._count() != after:
            raise LedgerError(
                f"{self._name} has {self._count()} events, expected {after}: somebody else has spent from it",
                hint="Wrap again: the noise is then calibrated for what is left.",
            )

    def _refresh(self) -> None:
        if self.path is None:
            return
        try:
            with self._open(write=False) as file:
                self._read(file)
        except FileNotFoundError:
            if self._entries:
                raise LedgerError(
                    f"{self._name} is gone", hint="Bring the file back; it is the proof of what was spent."
                ) from None
        except OSError as error:
            raise LedgerError(
                f"{self._name} cannot be read: {error.strerror}",
                hint="Nothing was spent. Give a file that this process may read and write, in a folder that exists.",
            ) from error

    @contextlib.contextmanager
    def _open(self, *, write: bool) -> Iterator[BinaryIO]:
        with open(str(self.path), "r+b" if write else "rb", buffering=0) as file:
            lock_file(file, exclusive=write)  # released when the file is closed
            yield file

    def _read(self, file: BinaryIO) -> int:
        """Read and verify the file if it changed; return where its last whole line ends."""
        status = os.fstat(file.fileno())
        file.seek(0)
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        content = file.read()
        end = content.rfind(b"\n") + 1
        if seen == self._seen:
            return end
        found = verified(content[:end], self._name, self._verified)
        entries = list(found.entries)
        if all(isinstance(entry, ReleasePlan) for entry in entries):
            raise LedgerError(f"{self._name} is there but holds no event; it was emptied", hint=RESTORE)
        if entries[: len(self._entries)] != self._entries:
            raise LedgerError(f"{self._name} was rewritten while in use", hint=RESTORE)
        self._header, self._entries, self._head, self._seen = found.header, entries, found.head, seen
        self._verified = found
        return end


def as_ledger(given: Ledger | str | Path | None) -> Ledger:
    """Return the ledger that a promise was given: itself, that of a file, or a new one in memory.

    Raises: ConfigError for anything else; LedgerError as :class:`Ledger`.
    """
    if isinstance(given, Ledger):
        return given
    if given is not None and not isinstance(given, str | Path):
        raise ConfigError(f"ledger is a {type(given).__name__}, expected a file, a Ledger or None")
    return Ledger(given)
