"""Jobs of four rounds with sites in this process, and something that happens at one message of a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from site_federation import Direct, Federation

from choral.jobs.settings import Settings
from choral.network.host.messages import TakeStep, read_request
from choral.trainers.engines.exchange_messages import Told
from choral.trainers.task.settings import Training


def a_job(federation: Federation, job: str, **changed: Any) -> Settings:
    """Four rounds of a job that no test has had before."""
    made = federation.settings(training=Training(rounds=4, batch_size=8, learning_rate=0.1), **changed)
    return replace(made, serve=replace(made.serve, job=job, wait=1.0))


class InRound:
    """Calls ``then`` before, or after, the message of that place among those to a site in a round."""

    def __init__(self, carrier: Direct, name: str, number: int, place: int, then: Any, *, late: bool = False) -> None:
        self.name, self.number, self.place, self.then = name, number, place, then
        self.round, self.seen, self.done, self.now = 0, 0, False, False
        carrier.before = self.before
        self.late = late
        if late:
            carrier.after = self.after

    def before(self, name: str, raw: bytes) -> None:
        asked = read_request(raw, limit=1 << 30)
        if name != self.name or not isinstance(asked, TakeStep):
            return
        if asked.told:
            self.round, self.seen = Told.read(asked.told, length=7, kept={}).number, 0
        if self.round == self.number and not self.done and asked.job:
            self.now = self.seen == self.place
            self.seen += 1
            if self.now and not self.late:
                self.done = True
                self.then()

    def after(self, name: str, reply: bytes) -> bytes:
        if name == self.name and self.now and not self.done:
            self.done = True
            self.then()
        return reply
