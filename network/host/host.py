"""What a site answers a coordinator: ``handle(bytes) -> bytes``, by whatever way the bytes come.

    host = SiteHost(SiteFolder.open("north", coordinator="hub"))
    reply = host.handle(request, sender="hub")

It agrees to a job or refuses it, and then takes the steps of its sums. Whatever is wrong, the coordinator reads
"refused" and no more; the site's log has the reason. Nothing is read beyond what was agreed on, nothing that a message
brings is run, and a step of a job that was not agreed to reaches nobody.
"""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import torch

from choral.errors import ChoralError
from choral.network.door.trained import WANTED, Trained
from choral.network.errors import BusyError, SiteError
from choral.network.host.engine_training import wanted_weights
from choral.network.host.evidence import signed, stated
from choral.network.host.job import SiteJob
from choral.network.host.messages import (
    EndJob,
    FromSite,
    JobRefused,
    JobTaken,
    JobUnknown,
    ProposeJob,
    SignRun,
    StillBusy,
    TakeStep,
    ToSite,
    largest_offer,
    largest_step,
    read_request,
    written,
)
from choral.network.site.files.log import Fact
from choral.network.site.offer import Offer
from choral.trainers.engines.exchange_messages import largest_told

if TYPE_CHECKING:
    from choral.network.site.admission import Agreement
    from choral.network.site.folder import SiteFolder

log = logging.getLogger("choral.network")
MOST_JOBS = 8  # in memory at a time; the one that was used least lately is forgotten, and taken up again when asked


class SiteHost:
    """See the module. It may be called by several threads. folder: opened for the coordinator that it answers."""

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder
        self._jobs: dict[str, SiteJob] = {}
        self._lock, self._taking = threading.Lock(), threading.Lock()  # the second is held while data is read

    @property
    def request_limit(self) -> int:
        """Bytes of the largest request that is read now: an offer, or a step of the largest job that was agreed to."""
        return max(map(_limit_of, list(self._jobs.values())), default=largest_offer())

    def handle(self, raw: bytes | memoryview, *, sender: str, trained: Trained | None = None) -> bytes:
        """sender: the coordinator, as whom the transport authenticated it. trained: of a job whose training is done by
        an engine's process, what it made for this request. Errors of this site's own code pass.
        """
        try:
            self._folder.count(len(raw))
            answer = self._answer(read_request(raw, limit=self.request_limit), sender, trained)
            reply = answer if isinstance(answer, bytes) else written(answer)
            self._folder.count(len(reply))
            return reply
        except BusyError as error:
            log.info("out of a round of %s: %s", sender, error)
            return written(StillBusy())
        except ChoralError as error:
            log.warning("refused %s: %s (%s)", sender, error, error.hint)
            return written(JobRefused())

    def _answer(self, asked: ToSite, sender: str, trained: Trained | None) -> FromSite | bytes:
        """The bytes are for the engine's process here. Raises: ChoralError of any kind, which is a refusal."""
        if sender != self._folder.coordinator:
            raise SiteError(f"{sender!a:.80} is not the coordinator that this site is open for")
        if isinstance(asked, ProposeJob):
            return self._take(Offer.read(asked.offer))
        if isinstance(asked, SignRun):
            return signed(self._folder.refreshed(), asked)
        with self._lock:
            job = self._jobs.pop(asked.job, None)
            if job is None:
                return JobUnknown()
            self._jobs[asked.job] = job  # used latest
        if isinstance(asked, EndJob):
            return self._end(job, asked)
        return self._step(job, asked, trained)

    def _take(self, offer: Offer) -> FromSite:
        with self._taking:
            if offer.digest not in self._jobs:
                job = self._made(offer, self._folder.agree(offer))
                log.info("agreed to job %s (%s)", offer.job, offer.digest[:16])
                with self._lock:
                    self._jobs[offer.digest] = job
                    while len(self._jobs) > MOST_JOBS:
                        del self._jobs[next(iter(self._jobs))]
            return JobTaken(offer.digest, self._jobs[offer.digest].made)

    def _made(self, offer: Offer, agreement: Agreement) -> SiteJob:
        """Raises: as `SiteJob`, when a line of the log says why."""
        try:
            return SiteJob(self._folder, agreement)
        except ChoralError as error:
            facts = {"digest": offer.digest, "job": offer.job, "coordinator": offer.coordinator}
            self._folder.refused([str(error)], datetime.now(UTC), **facts)
            raise

    def _step(self, job: SiteJob, asked: TakeStep, trained: Trained | None) -> FromSite | bytes:
        before = job.party.trained_for
        try:
            taken = job.step(asked, trained)
            if isinstance(taken, torch.Tensor):
                return WANTED + wanted_weights(taken)
        except BusyError:
            raise
        except ChoralError as error:
            self._folder.note("out", digest=job.digest, round=before[0], reason=f"{type(error).__name__}: {error}")
            raise
        if (now := job.party.trained_for) != before:
            failed = job.party.error
            said = {} if failed is None else {"reason": f"{type(failed).__name__}: {failed}"}
            facts: dict[str, Fact] = {"digest": job.digest, "round": now[0], "exchange": now[1], "sent": failed is None}
            self._folder.note("trained", **(facts | said | job.books()))
        return taken

    def _end(self, job: SiteJob, asked: EndJob) -> FromSite:
        job.end(asked.past, asked.model, completed=asked.completed)
        with self._lock:
            self._jobs.pop(job.digest, None)
        log.info("job %s is over", job.digest[:16])
        return stated(self._folder, job.digest)


def _limit_of(job: SiteJob) -> int:
    terms = job.party.terms.federation
    return largest_step(largest_told(terms.length), terms.parties)
