"""The command ``choral site``: what a site owns, in one folder: keys, settings, pinned certificates, approvals, log."""

from __future__ import annotations

import getpass
import json
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from choral.cli.arguments import parse
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.network import Certificate, SiteFolder

HELP = """\
usage: choral site COMMAND [options]

A site is a party on its own machine. Its folder holds what no coordinator may
choose: keys, settings, pinned certificates, budgets, approvals and their log.

commands:
  init NAME              make the folder NAME with a key, a certificate and a
                         commented site.toml
  show                   what is set, spent and pinned, and what is still to do
  directory              list, add, remove or rotate pinned certificates
  review [JOB]           what a job would run, release and spend; without JOB,
                         the jobs that were offered
  approve DIGEST --until DATE
                         let the job of that digest run, to the end of that day
  revoke DIGEST          take an approval back
  log                    approvals, refusals and rounds: a signed chain, checked

Each takes --site FOLDER; by default the folder that you are in.

Start here:  choral site init north
Details:     choral site COMMAND --help, and docs/sites.md

exit codes: 0 done, 1 (review) this site refuses the job, whoever approves it,
            2 bad input
"""

DIRECTORY_HELP = """\
usage: choral site directory [add FILE.crt --pin PIN | remove NAME |
                              rotate FILE.crt --pin PIN] [options]

Who is pinned: the other sites, and the coordinators that this site connects to.

  (nothing)   list names and pins
  add         pin a certificate that somebody gave you; --coordinator, if it is
              a coordinator's
  remove      no longer take part with whoever has that name
  rotate      a new certificate in the place of the one of the same name

PIN is what `choral site show` prints at the other end. Ask for it by telephone
or on paper, not by the way that the file came: whoever could change the one
could change the other.
"""


@dataclass(frozen=True, kw_only=True)
class _Place:
    site: Path = Path()
    """The site's folder, or its site.toml."""


@dataclass(frozen=True, kw_only=True)
class InitFlags:
    """Make a site's folder: a key, a certificate and a commented site.toml."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """The site's name, as all others will know it: letters, digits, '.', '_' and '-'."""
    folder: Path | None = None
    """Where; by default the folder NAME."""


@dataclass(frozen=True, kw_only=True)
class ShowFlags(_Place):
    """What is set, spent and pinned, and what is still to do. Changes nothing."""

    pin: bool = False
    """Only the certificate's pin, as it is read out."""
    json: bool = False
    """Print it as JSON: headings, and the lines under each."""


@dataclass(frozen=True, kw_only=True)
class ListFlags(_Place):
    """Whose certificates are pinned."""


@dataclass(frozen=True, kw_only=True)
class PinFlags(_Place):
    """Pin a certificate, once its pin was compared with the other end."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.crt")]
    """The certificate, as the other end gave it away."""
    pin: str = ""
    """What `choral site show` prints at the other end; spaces and capitals do not matter."""
    coordinator: bool = False
    """It is a coordinator's (of `add`)."""


@dataclass(frozen=True, kw_only=True)
class RemoveFlags(_Place):
    """No longer take part with whoever has that name."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """As `choral site directory` lists it."""


@dataclass(frozen=True, kw_only=True)
class ReviewFlags(_Place):
    """What a job would run, release and spend. Exit code 1: refused anyway."""

    job: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[JOB]")] = ""
    """A job's name, the beginning of a digest, or a file that the coordinator sent; if left out, all are listed."""
    json: bool = False
    """Print it as JSON: headings, and the lines under each."""


@dataclass(frozen=True, kw_only=True)
class ApproveFlags(_Place):
    """Let one job run here: this very offer, with its code and its terms."""

    digest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIGEST")]
    """As `choral site review` prints it; the first 12 characters or more."""
    until: date
    """The last day on which it may run (UTC), as 2027-01-31."""
    by: str = ""
    """Who approves, for the log; by default the name of this account."""


@dataclass(frozen=True, kw_only=True)
class RevokeFlags(_Place):
    """Take an approval back: the job is refused from now on."""

    digest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIGEST")]
    """As `choral site log` or `review` prints it; the first 12 characters or more."""
    by: str = ""
    """Who revokes, for the log; by default the name of this account."""


@dataclass(frozen=True, kw_only=True)
class LogFlags(_Place):
    """Approvals, refusals and rounds; hash and signature of each line checked."""

    holds: str = ""
    """A head that was noted earlier: is that line still there? Lines cut from the end show in no other way."""
    last: int = 0
    """Print the last so many lines only; all are checked all the same."""


def site(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else 2
    if words[0] not in _COMMANDS:
        hint = f"one of: {', '.join(_COMMANDS)}; see choral site --help"
        raise ConfigError(f"unknown command 'site {words[0]}'", hint=hint)
    return _COMMANDS[words[0]](words[1:])


def _init(words: list[str]) -> int:
    wanted = parse("site init", words, InitFlags)
    from choral.network import SiteFolder

    folder = wanted.folder or Path(wanted.name)
    made = SiteFolder.init(folder, wanted.name)
    _print(
        ("made", f"{folder}/"),
        ("give away", f"{made.identity.certificate_path}"),
        ("read out", f"its pin: {in_groups(made.identity.certificate.pin)}"),
        ("keep", f"{made.identity.key_path}: whoever has it is this site"),
        ("next", f"fill in {folder / 'site.toml'}, then: choral site show --site {folder}"),
    )
    return 0


def _show(words: list[str]) -> int:
    wanted = parse("site show", words, ShowFlags)
    folder = _open(wanted)
    if wanted.pin:
        print(in_groups(folder.identity.certificate.pin))
        return 0
    from choral.network.site.overview import overview

    _print(*overview(folder), as_json=wanted.json)
    return 0


def _directory(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help", "help"):
        print(DIRECTORY_HELP, end="")
        return 0
    if not words or words[0].startswith("-"):
        pinned = _open(parse("site directory", words, ListFlags)).pinned
        for kind in ("coordinators", "sites"):
            for entry in getattr(pinned, kind):
                _print((entry.name, f"{kind.removesuffix('s')}, {in_groups(entry.pin)}"))
        return 0
    if words[0] == "remove":
        gone = parse("site directory remove", words[1:], RemoveFlags)
        folder = _open(gone)
        folder.pin(folder.pinned.without(gone.name), "unpinned", name=gone.name, by=_who(""))
        print(f"{gone.name} is no longer pinned")
        return 0
    if words[0] not in ("add", "rotate"):
        raise ConfigError(
            f"unknown command 'site directory {words[0]}'", hint="add, remove, rotate, or nothing to list"
        )
    return _pin(words[0], parse(f"site directory {words[0]}", words[1:], PinFlags))


def _pin(what: str, wanted: PinFlags) -> int:
    folder = _open(wanted)
    from choral.network import read_certificate

    certificate = read_certificate(wanted.file)
    check_pin(certificate, wanted.pin)
    if what == "add":
        pinned = folder.pinned.with_(certificate, coordinator=wanted.coordinator)
    else:
        pinned = folder.pinned.rotated(certificate)
    kind = pinned.kind_of(certificate.name).removesuffix("s")
    event = "pinned" if what == "add" else "repinned"
    folder.pin(pinned, event, name=certificate.name, kind=kind, pin=certificate.pin, by=_who(""))
    print(f"{certificate.name} is pinned as a {kind}")
    return 0


def check_pin(certificate: Certificate, pin: str) -> None:
    """Raises: ConfigError unless the certificate has that pin, in whatever spacing and case."""
    given = "".join(pin.split()).lower()
    if not given:
        raise ConfigError(
            f"the pin of {certificate.name} was not given",
            hint="--pin PIN: ask for what `choral site show` prints there, by telephone or on paper",
        )
    if given != certificate.pin:
        raise ConfigError(
            f"this certificate of {certificate.name} has another pin than was given",
            hint="do not use it before you know why: somebody may have put another in its place",
        )


def _review(words: list[str]) -> int:
    wanted = parse("site review", words, ReviewFlags)
    folder = _open(wanted)
    from choral.network import Offer
    from choral.network.site.review import review

    if not wanted.job:
        from choral.network.site.overview import offered

        _print(*offered(folder), as_json=wanted.json)
        return 0
    if Path(wanted.job).is_file():
        offer = Offer.read(Path(wanted.job).read_bytes())
        folder.offers.keep(offer)
    else:
        offer = folder.offers.find(wanted.job)
    shown = review(folder, offer)
    if wanted.json:
        more = {"code against the last": list(shown.diff), "refused": list(shown.against)}
        print(json.dumps(_headed(shown.rows) | more, indent=1))
        return 1 if shown.against else 0
    _print(*shown.rows)
    if shown.diff:
        print()
        print("\n".join(shown.diff))
    print()
    if shown.against:
        print("This site refuses it, whoever approves it:")
        for reason in shown.against:
            print(textwrap.fill(reason, 79, initial_indent="- ", subsequent_indent="  "))
        return 1
    print(f"Nothing in site.toml is against it. To let it run:\n  choral site approve {offer.digest[:16]} --until DATE")
    return 0


def _approve(words: list[str]) -> int:
    wanted = parse("site approve", words, ApproveFlags)
    folder = _open(wanted)
    from choral.doors import visible
    from choral.network.site.approvals import approve
    from choral.network.site.offer import check_digest

    offer = folder.offers.find(check_digest(wanted.digest))
    approve(folder, offer, wanted.until, by=_who(wanted.by))
    print(f"{offer.job} may run until {wanted.until} (UTC): {offer.digest}")
    from choral.network.site.objections import objections

    if against := objections(folder, offer):
        print(f"note: as things are, this site refuses it all the same; choral site review {offer.digest[:16]}")
        print("\n".join(f"- {visible(reason)}" for reason in against))
    return 0


def _revoke(words: list[str]) -> int:
    wanted = parse("site revoke", words, RevokeFlags)
    folder = _open(wanted)
    from choral.network.site.approvals import revoke
    from choral.network.site.offer import check_digest

    gone = revoke(folder, check_digest(wanted.digest), by=_who(wanted.by))
    print(f"{gone.job} may no longer run: {gone.digest}")
    return 0


def _log(words: list[str]) -> int:
    wanted = parse("site log", words, LogFlags)
    folder = _open(wanted)
    from choral.doors import visible

    lines = folder.log.read()
    if wanted.holds and wanted.holds.strip().lower() not in lines.digests:
        raise ConfigError(
            f"the line {wanted.holds!a:.80} is not in the log",
            hint="lines were cut from its end, or the log is another",
        )
    for line in lines.entries[-wanted.last if wanted.last else None :]:
        facts = ", ".join(f"{name} {value}" for name, value in line.facts.items())
        print(visible(f"{line.at[:19]}Z  {line.event}: {facts}"))
    print(f"{len(lines.entries)} lines, each signed by {folder.settings.name} and chained to the one before")
    print(f"head: {lines.head}")
    return 0


def _open(wanted: _Place) -> SiteFolder:
    from choral.network import SiteFolder

    return SiteFolder.open(wanted.site)


def _who(given: str) -> str:
    return given or getpass.getuser()


def in_groups(pin: str) -> str:
    """A pin as it is read out: in groups of four."""
    return " ".join(textwrap.wrap(pin, 4))


def _print(*rows: tuple[str, str], as_json: bool = False) -> None:
    """What and its words, wrapped at 79 columns; a row without a name goes on with the one before."""
    if as_json:
        print(json.dumps(_headed(rows), indent=1))
        return
    for what, words in rows:
        print(
            textwrap.fill(words, 79, initial_indent=f"{what:<13}", subsequent_indent=" " * 13, break_long_words=False)
        )


def _headed(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The lines under each heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for what, words in rows:
        heading = what or heading
        found.setdefault(heading, []).append(words)
    return found


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "init": _init,
    "show": _show,
    "directory": _directory,
    "review": _review,
    "approve": _approve,
    "revoke": _revoke,
    "log": _log,
}
