"""States that hold their secrets for one step only."""

from __future__ import annotations

import os
from threading import Lock
from typing import Generic, NoReturn, TypeVar

from choral.protocols.errors import StateUsedError

Content = TypeVar("Content")


class Once(Generic[Content]):
    """The state between two steps. A step takes the content out, whether it then succeeds or refuses.

    So no state answers two requests: there is nothing left in it to answer the second with. It cannot be copied or
    pickled, because the copy could answer too, and its repr shows nothing.

    A process that was forked has every state of its parent, and would answer a second time from each: only the process
    that made a state takes anything out of it.
    """

    __slots__ = ("_content", "_process")

    def __init__(self, content: Content) -> None:
        self._content = [content]
        self._process = os.getpid()

    def _take(self) -> Content:
        check_process(self._process, f"the state {type(self).__name__}")
        try:
            return self._content.pop()  # one operation: of two threads, one finds nothing
        except IndexError:
            raise StateUsedError(
                f"the state {type(self).__name__} was used already: each state answers one request",
                hint="continue from the state that the step returned; after a refusal, wait for the next round",
            ) from None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {'ready' if self._content else 'used'}>"

    def __copy__(self) -> NoReturn:
        raise StateUsedError(f"the state {type(self).__name__} cannot be copied: the copy could answer a second time")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__copy__()


def check_process(process: int, what: str) -> None:
    """Raises: StateUsedError in another process than ``process``, which made ``what``."""
    if os.getpid() != process:
        raise StateUsedError(
            f"{what} was made by another process than this one, which was forked from it",
            hint="go on in the process that opened the session, or open one of its own after the fork",
        )


class Sessions:
    """Which session of an identity is live: the one that it joined last. The number only grows.

    Of two sessions that are both answered, a server could have the same vectors summed twice, over other parties.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.last = 0

    def enter(self, after: int = 0) -> int:
        """The number of a new session, above ``after``; all before it are dead from here on."""
        with self._lock:
            self.last = max(self.last, after) + 1
            return self.last

    def check(self, session: int) -> None:
        """Raises: StateUsedError for any but the last session."""
        if session != self.last:
            raise StateUsedError(
                f"session {session} of this identity ended when it joined session {self.last}",
                hint="an older session is not answered any more: go on with the last",
            )


class Current:
    """The last round that a party shared its secrets in; all its states of one session look at the same.

    A round that was given up must stay so: its sum and that of a repetition, over other parties, would together show
    the difference. So with the next round's shares every step of an earlier round is refused; and with a later session
    of the same identity every step of this one.

    begun: the digest of what the current round was begun with.
    """

    def __init__(self, sessions: Sessions | None = None, *, after: int = 0) -> None:
        self._lock = Lock()
        self._number = 0
        self.begun = b""
        self._sessions = Sessions() if sessions is None else sessions
        self.session = self._sessions.enter(after)

    def enter(self, number: int, begun: bytes = b"") -> None:
        with self._lock:
            self.check(number)
            self._number, self.begun = number, begun

    def check_live(self) -> None:
        """Raises: StateUsedError when the identity has joined a later session."""
        self._sessions.check(self.session)

    def check(self, number: int) -> None:
        """Raises: StateUsedError for a round before the current one, or in a session before the live one."""
        self.check_live()
        if number < self._number:
            raise StateUsedError(
                f"round {number} ended for this party when it took part in round {self._number}",
                hint="a round that was given up is not answered any more: go on with the current one",
            )
