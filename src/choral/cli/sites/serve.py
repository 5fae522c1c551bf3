"""``choral serve`` and ``choral join``: a coordinator, and the process of a site."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from choral.cli.arguments import parse, parse_with_config
from choral.errors import ConfigError
from choral.jobs.settings import ServeSettings, Settings, read_job

if TYPE_CHECKING:
    from choral.network import BlockingHub, CertifiedIdentity, SiteFolder, SiteHost
    from choral.network.site.offer import Offer
    from choral.network.transport.pinned_tls import Directory


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """Train with sites at their own machines: wait for them, offer the job, sum what they send, keep the run.

    The sites are those of --directory, by the names of their certificates. Nothing of a site is known here but the
    sums. A run is the same folder as of `choral train`: audit it, export it, go on with --resume.

    Every key of CONFIG is a flag of the same name below; the flag wins.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """TOML file with the settings."""
    directory: Path
    """The sites' pinned certificates, as `choral site directory` writes it."""
    out: Path | None = None
    """Run folder; must be new or empty, unless --resume."""
    offer: Path | None = None
    """Write the offer of the job to this file, for sites to review, and do nothing else."""
    engine: Literal["none", "flower", "nvflare"] = "none"
    """Of --offer: which engine will carry the job. Over Flower sums take two trips, where the settings do not say."""
    resume: bool = False
    """Continue the run that the folder holds."""
    json: bool = False
    """Print what came of it as JSON, in the place of the summary."""
    quiet: bool = False
    """No progress and no summary, only errors."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)


@dataclass(frozen=True, kw_only=True)
class JoinFlags:
    """Be a site: connect outward to the coordinator, agree to what was approved, train, and send into secure sums.

    It runs until it is stopped, and connects again whenever the connection is lost. What it refuses and why stands in
    the site's own log; the coordinator learns that it was refused.

    With --local it connects nowhere: an engine on this machine, NVFlare or Flower, brings the coordinator's requests
    to a socket.
    """

    site: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SITE")]
    """The site's folder, or its site.toml."""
    coordinator: str = ""
    """Which coordinator of site.toml, where it has several."""
    patience: float | None = None
    """Give up after so many seconds in a row without a connection; by default never."""
    local: Path | None = None
    """Answer at this socket, in a folder that this user alone can write to, and connect nowhere."""
    engine_user: str = ""
    """Which other user of this machine may use the socket: the one that the engine runs as. By default none."""
    quiet: bool = False
    """Only what is refused, and errors."""


def serve(words: list[str]) -> int:
    wanted = parse_with_config("serve", words, ServeFlags, read_job, "directory")
    settings = wanted.settings
    if not settings.serve.job:
        named = dataclasses.replace(settings.serve, job=wanted.config.stem)
        settings = dataclasses.replace(settings, serve=named)
    from choral.jobs import serving, standardising

    chosen = settings.serve
    identity, sites = coordinator_of(chosen, wanted.directory)
    keys = {certificate.name: certificate.public_key for certificate in sites}

    if wanted.offer is not None:
        from choral.jobs.engines.default_trips import with_trips

        by = standardising.kept(settings, wanted.out)
        settings = with_trips(settings, tuple(keys), wanted.engine)
        offer = serving.offer_ahead(settings, keys, coordinator=identity.name, by=by)
        write_offer(offer, wanted.offer)
        return 0
    if wanted.out is None:
        raise ConfigError("no run folder", hint="give --out DIR, or --offer FILE")
    if wanted.engine != "none":
        raise ConfigError(
            f"--engine {wanted.engine} without --offer: an engine's jobs are started by the engine",
            hint="give --offer FILE",
        )

    with listening(chosen, identity, sites, quiet=wanted.quiet) as (hub, say):
        if standardising.wanted(settings) and standardising.kept(settings, wanted.out) is None:
            serving.standardise(settings, hub, keys, coordinator=identity, out=wanted.out, say=say)
            say(f"means and deviations: {wanted.out}/standardise.json   next: --offer, to be approved, then this again")
            return 0
        run = serving.serve(
            settings,
            hub,
            keys,
            coordinator=identity,
            out=wanted.out,
            resume=wanted.resume,
            say=say,
            on_round=lambda entry: say(_line(entry.round, entry.metrics, entry.survivors, entry.failed)),
        )
    if wanted.json:
        from choral.cli.train import summary

        print(json.dumps(summary(run, "federated", wanted.out), indent=1))
    elif not wanted.quiet:
        metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in run.metrics.items())
        print(f"{run.history[-1].round} rounds with {len(keys)} sites, {metrics}")
        if run.info.ended:
            print(f"note: {run.info.ended}")
        print(f"run folder: {wanted.out}   next: choral audit {shlex.quote(str(wanted.out))}")
    return 0


def coordinator_of(chosen: ServeSettings, directory: Path) -> tuple[CertifiedIdentity, Directory]:
    """The coordinator's identity, and its sites' certificates. Raises: ConfigError, SiteError, CertificateError."""
    from choral.network import CertifiedIdentity
    from choral.network.site.files.directory import Pinned

    certificate = chosen.identity or _beside(directory)
    return CertifiedIdentity.load(certificate.parent, certificate.stem), Pinned.read(directory).sites


def write_offer(offer: Offer, file: Path) -> None:
    """For the sites to review; says what is next."""
    file.write_bytes(offer.message())
    print(f"offer {offer.digest[:16]} of job {offer.job}: {file}   next, at each site: choral site review")


@contextlib.contextmanager
def listening(
    chosen: ServeSettings, identity: CertifiedIdentity, sites: Directory, *, quiet: bool
) -> Iterator[tuple[BlockingHub, Callable[[str], None]]]:
    """Yield what sites connect to, and what tells the user what happens there, on standard error."""
    from choral.network import BlockingHub

    def say(text: str) -> None:
        if not quiet:
            print(f"choral: {text}", file=sys.stderr, flush=True)

    with BlockingHub(identity, sites, host=chosen.host, port=chosen.port) as hub:
        names = ", ".join(certificate.name for certificate in sites)
        say(f"{identity.name} listens at {hub.address[0]}:{hub.address[1]} for {names}")
        yield hub, say


def _beside(directory: Path) -> Path:
    """The certificate whose key lies beside the directory, as `choral site init` makes them. Raises: ConfigError."""
    if not directory.is_file():
        raise ConfigError(
            f"no such file: {directory}",
            hint="the coordinator keeps it: `choral site init hub`, then `choral site directory add`",
        )
    keys = sorted(directory.absolute().parent.glob("*.key"))
    if len(keys) != 1:
        raise ConfigError(
            f"serve.identity is not set, and beside {directory} there are {len(keys)} keys, expected one",
            hint="`choral site init hub` makes the coordinator's folder: its key, its certificate, directory.toml;"
            " or give --serve.identity FOLDER/NAME.crt",
        )
    return keys[0].with_suffix(".crt")


def _line(number: int, metrics: dict[str, float], survivors: int, failed: str) -> str:
    if failed:
        return f"round {number} came to nothing: {failed}"
    name, value = next(iter(metrics.items()))
    return f"round {number}: {name} {value:.4f}" + (f", {survivors} sites in the sum" if number else "")


def join(words: list[str]) -> int:
    wanted = parse("join", words, JoinFlags)
    os.umask(0o077)  # what a site writes is for its user alone
    level = logging.WARNING if wanted.quiet else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", stream=sys.stderr)
    from choral.network import Link, Request, SiteFolder
    from choral.network.host.host import SiteHost

    folder = SiteFolder.open(wanted.site, coordinator=wanted.coordinator)
    if not folder.coordinator:
        raise ConfigError(
            "site.toml names no coordinator, or several", hint="set [coordinators.NAME], or give --coordinator NAME"
        )
    asked, host = folder.settings.coordinators[folder.coordinator], SiteHost(folder)
    if wanted.local is not None:
        return _local(folder, host, wanted.local, wanted.engine_user)

    def handler(request: Request) -> bytes:
        reply = host.handle(request.body, sender=request.sender)
        link.request_limit = host.request_limit
        return reply

    link = Link(
        folder.identity,
        folder.hub_directory,
        handler,
        hub=folder.coordinator,
        address=_address(asked.address),
        request_limit=host.request_limit,
        proxy=asked.proxy or None,
    )
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: link.stop())
    asyncio.run(link.run(patience=wanted.patience))
    return 0


def _local(folder: SiteFolder, host: SiteHost, path: Path, engine_user: str) -> int:
    """Raises: ConfigError for a user that there is not; SiteError."""
    from choral.network.door.handling import handler, limit
    from choral.network.door.server import DoorServer

    site, coordinator, handle = folder.settings.name, folder.coordinator, handler(folder, host)
    user = _user(engine_user) if engine_user else None
    with DoorServer(path, handle, request_limit=lambda: limit(host), user=user) as door:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, lambda *_: door.stop())
        logging.getLogger("choral.network").info("%s answers at %s for %s", site, door.path, coordinator)
        door.serve()
    return 0


def _user(name: str) -> int:
    """Raises: ConfigError."""
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(f"there is no user {name!a:.80} on this machine", hint="as `id NAME` knows it") from None


def _address(text: str) -> tuple[str, int]:
    """Raises: ConfigError for anything else than HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"the coordinator's address is {text!a:.80}, expected the like of fl.example.org:8443")
    return host.strip("[]"), int(port)
