"""The hub for code without an event loop: what it gives of several sites, and when."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from choral.errors import ConfigError
from choral.network import BlockingHub, Request


def test_replies_are_taken_as_they_come_and_in_the_order_in_which_they_were_asked_for(ends: Any) -> None:
    may_answer, asked = threading.Event(), threading.Event()

    def slow(request: Request) -> Any:
        asked.set()
        assert may_answer.wait(30)
        return request.body

    directory = ends.directory("north", "south")
    with BlockingHub(ends.identities["coordinator"], directory, host="127.0.0.1", port=0, limits=ends.limits()) as hub:
        links = [ends.make_link("north", hub.address), ends.make_link("south", hub.address, slow)]
        threads = [threading.Thread(target=lambda link=link: asyncio.run(link.run())) for link in links]
        for thread in threads:
            thread.start()
        hub.wait_for(["north", "south"], timeout=10)
        replies = hub.replies({"north": b"x", "south": b"y"}, timeout=30, reply_limit=10)
        assert next(replies) == ("north", b"x")  # while the other, who is asked as well, has none
        assert asked.wait(10)
        may_answer.set()
        assert list(replies) == [("south", b"y")]
        may_answer.clear()
        replies = hub.replies({"north": b"x", "south": b"y"}, timeout=30, reply_limit=10)
        next(replies)
        replies.close()  # gives up on the other: the hub waits for nothing
        may_answer.set()
        with pytest.raises(ConfigError):
            next(hub.replies({"north": b""}, timeout=0, reply_limit=1))
        for link in links:
            link.stop()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
