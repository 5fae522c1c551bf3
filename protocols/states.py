"""States that hold their secrets for one step only."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

from choral.protocols.errors import StateUsedError

Content = TypeVar("Content")


class Once(Generic[Content]):
    """The state between two steps. A step takes the content out, whether it then succeeds or refuses.

    So no state answers two requests: there is nothing left in it to answer the second with. It cannot be copied or
    pickled, because the copy could answer too, and its repr shows nothing.
    """

    __slots__ = ("_content",)

    def __init__(self, content: Content) -> None:
        self._content = [content]

    def _take(self) -> Content:
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
