"""A run with sites from its first round to its last, and what a coordinator that was stopped goes on from.

    run folder/sites.json     the round that was begun last, and how the latest exchange of each site ended

It is on disk before a round reaches any site. So a coordinator that was killed in a round, and is started with resume,
knows that the sites may have trained for it, and that its sum may have been opened: the round is given up, counts as
one, and the next is begun from the model before. A round is never asked for twice, for two sums of the same vectors
over different sites could be told apart.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec

from choral.errors import ChoralError
from choral.network.coordinator.remote import RemoteSites
from choral.network.coordinator.sites import Sites
from choral.network.host.messages import ExchangeEnded
from choral.trainers.federated.one_round import RoundOutcome, one_round
from choral.trainers.federated.plan import Plan
from choral.trainers.federated.session import Session
from choral.trainers.run_folder.folder import replace_file
from choral.trainers.run_folder.info import RunFolderError
from choral.trainers.run_folder.run import Run

FILE = "sites.json"


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """begun: the number of the round that was begun last. past: how the latest exchange of each site ended."""

    begun: int = 0
    past: dict[str, ExchangeEnded] = {}


def serve(plan: Plan, remote: RemoteSites) -> Run:
    """Train with sites. Raises: as `federate`; TransportError."""
    folder = plan.keep.folder
    before = _read(folder) if folder is not None and plan.keep.resume else Progress()
    remote.begun = before.begun
    with Session.open(plan, remote) as session:
        for number in session.rounds_left():
            sites = remote.sites
            if sites is None:  # there is one once there are rounds
                break
            if number == before.begun:
                outcome = _given_up(session, sites, number)
            else:
                _resumed(sites, before, number)
                _keep(folder, number, sites)
                outcome = one_round(session, number)
                if outcome.failed:
                    _fail(sites, number)
            before = Progress()
            session.keep(outcome, ahead=partial(_keep, folder, number, sites))
        remote.end(session)
    return session.run


def _keep(folder: Path | None, number: int, sites: Sites) -> None:
    """The round, before it reaches any site; and how its exchanges ended, before it is complete."""
    _write(folder, Progress(number, dict(sites.past)))


def _resumed(sites: Sites, before: Progress, number: int) -> None:
    """Of a run that was stopped between two rounds, how the latest exchange ended."""
    if before.begun == number - 1:
        sites.past |= {name: past for name, past in before.past.items() if name in sites.names}


def _given_up(session: Session, sites: Sites, number: int) -> RoundOutcome:
    """The round in which the coordinator was stopped. Whoever trained for it takes its own state back."""
    sites.past |= {name: ExchangeEnded(number, 0, False, True) for name in sites.names}
    sites.say(f"round {number} was interrupted, and is given up: sites may have trained for it")
    return RoundOutcome(
        number,
        session.weights,
        len(sites.names),
        session.next_start,
        failed=ChoralError("the coordinator was stopped in this round"),
        interrupted=True,
    )


def _fail(sites: Sites, number: int) -> None:
    for name, past in sites.past.items():
        if past.number == number:
            sites.past[name] = ExchangeEnded(number, past.exchange, past.survived, True)


def _read(folder: Path) -> Progress:
    path = folder / FILE
    if not path.is_file():
        return Progress()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except msgspec.MsgspecError:
        raise RunFolderError(f"{path} is damaged", hint="without it a round could be asked for twice") from None


def _write(folder: Path | None, progress: Progress) -> None:
    if folder is not None:
        replace_file(folder / FILE, msgspec.json.encode(progress))
