"""A site's folder: everything that no coordinator may choose, in files of one user.

north/
  site.toml        what this site accepts and which data it has; written once by `choral site init`, then by hand
  north.crt, .key  its certificate, which is given away, and its private key, which is not
  directory.toml   the certificates of the other sites and of the coordinators, pinned
  log.jsonl        approvals, refusals and rounds, signed, each line chained to the one before
  tasks/           training code that was installed here
  ledgers/         what each data set has spent, for the life of the data
  jobs/            the offers that were made; approved/: training code as it was when it was approved
  state/           public state of sums that are under way
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from Crypto.PublicKey import ECC

from choral.errors import ConfigError
from choral.locks import lock_file
from choral.network.errors import OfferRefusedError, SiteError
from choral.network.site.approvals import KeptOffers
from choral.network.site.files.daily_bytes import DailyBytes
from choral.network.site.files.directory import Pinned
from choral.network.site.files.log import AGREED, APPROVED, BEGUN, LONGEST_FACT, REFUSED, REVOKED, Fact, SiteLog
from choral.network.site.files.private import check_private, write_private
from choral.network.site.files.settings import SiteSettings, read_site
from choral.network.site.files.template import SITE_TOML
from choral.network.site.offer import Offer
from choral.network.transport.certificates import CertifiedIdentity, check_name, make_identity
from choral.network.transport.pinned_tls import Directory
from choral.protocols.crypto.identity import Identity

if TYPE_CHECKING:
    from choral.network.site.admission import Agreement

MOST_REFUSALS = 200  # lines of the log on one day
FOLDERS = ("tasks", "ledgers", "jobs", "approved", "state")


@dataclass(frozen=True, kw_only=True)
class SiteFolder:
    """One site, opened: settings read, permissions checked, keys loaded. coordinator: which of its coordinators it is
    opened for, "" if it has none or it was not said which. identity: for the transport. signing: the same key, for
    secure sums and the log.
    """

    path: Path
    settings: SiteSettings
    identity: CertifiedIdentity
    signing: Identity
    pinned: Pinned
    coordinator: str
    log: SiteLog
    offers: KeptOffers
    bytes_today: DailyBytes

    @staticmethod
    def open(path: str | Path, *, coordinator: str = "") -> SiteFolder:
        """path: the folder, or its site.toml. coordinator: which one, where site.toml has several.

        Raises: SiteError, ConfigError, CertificateError: a file that is missing, that others may read, that has an
            unknown key or a value out of range; data that is not there; one key under two names; another coordinator
            than those that are set.
        """
        folder = Path(path)
        folder = folder.parent if folder.name == "site.toml" else folder
        if not (folder / "site.toml").is_file():
            raise SiteError(f"{folder} has no site.toml", hint="`choral site init NAME` makes a site's folder")
        check_private(folder, public=(".crt",))
        settings = read_site(folder / "site.toml")
        identity = CertifiedIdentity.load(folder, settings.name)
        signing = Identity(ECC.import_key(identity.key_path.read_bytes()).seed)
        pinned = Pinned.read(folder / "directory.toml")
        _check_own(settings, identity, pinned)
        return SiteFolder(
            path=folder,
            settings=settings,
            identity=identity,
            signing=signing,
            pinned=pinned,
            coordinator=_coordinator(settings, coordinator),
            log=SiteLog(folder / "log.jsonl", signing.public, signing),
            offers=KeptOffers(folder / "jobs"),
            bytes_today=DailyBytes(folder / "state" / "bytes-today"),
        )

    @staticmethod
    def init(path: str | Path, name: str) -> SiteFolder:
        """Make a site's folder: a key, a certificate, a commented site.toml, an empty directory and the log's first
        line. Raises: SiteError if there is something already; CertificateError for a name that cannot be used.
        """
        folder = Path(path)
        check_name(name)
        if folder.exists() and any(folder.iterdir()):
            raise SiteError(f"{folder} is not empty", hint="a site begins in a folder of its own")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        for part in FOLDERS:
            (folder / part).mkdir(mode=0o700)
        identity = make_identity(folder, name)
        signing = Identity(ECC.import_key(identity.key_path.read_bytes()).seed)
        SiteLog(folder / "log.jsonl", signing.public, signing).begin(name)
        Pinned().write(folder / "directory.toml")
        write_private(folder / "site.toml", SITE_TOML.replace("NAME", name).encode())
        return SiteFolder.open(folder)

    @property
    def hub_directory(self) -> Directory:
        """The certificate of the coordinator that the site is opened for. Raises: SiteError if none is pinned."""
        if self.coordinator not in self.pinned.coordinators:
            raise SiteError(
                f"no certificate of the coordinator {self.coordinator!a} is pinned",
                hint="`choral site directory add FILE.crt --coordinator --pin PIN`",
            )
        return Directory([self.pinned.coordinators[self.coordinator]])

    @property
    def parties(self) -> Mapping[str, bytes]:
        """The pinned Ed25519 keys of the other sites."""
        return {certificate.name: certificate.public_key for certificate in self.pinned.sites}

    def agree(self, offer: Offer, *, now: datetime | None = None) -> Agreement:
        """Agree to an offer, or refuse; a line of the log says which. See :mod:`choral.network.site.admission`.

        Raises: OfferRefusedError with every reason; SiteError.
        """
        from choral.network.site.admission import agree  # torch is loaded by what it needs

        return agree(self.refreshed(), offer, now)

    def refused(self, reasons: Sequence[str], now: datetime, **facts: str) -> None:
        """Write a refusal down, once a day for the same offer and reasons and 200 times in all. Raises: SiteError."""
        said = {**facts, "reasons": "; ".join(reasons)[:LONGEST_FACT]}
        lines = self.log.read().entries
        today = [
            line.facts for line in lines if line.event == REFUSED and line.at[:10] == f"{now.astimezone(UTC):%Y-%m-%d}"
        ]
        if said not in today and len(today) < MOST_REFUSALS:
            self.log.append(REFUSED, dict(said), now)

    def refreshed(self) -> SiteFolder:
        """With site.toml and directory.toml as they are now: what was changed since counts. Raises: as `open`."""
        now = SiteFolder.open(self.path, coordinator=self.coordinator)
        return replace(
            now, identity=self.identity, signing=self.signing, log=self.log, bytes_today=self.bytes_today
        )  # which count sessions, lines, bytes

    def note(self, event: str, **facts: Fact) -> None:
        """Write a line into the log: a round, a drop-out, an error. Raises: SiteError, and then it must not happen."""
        if event in (BEGUN, AGREED, REFUSED, APPROVED, REVOKED):
            raise SiteError(f"{event!r} is said by who agrees, refuses or approves, not noted")
        self.log.append(event, facts)

    def pin(self, pinned: Pinned, event: str, **facts: Fact) -> SiteFolder:
        """Put another directory in the place of this one, with a line of the log before.

        Raises: SiteError if the file was changed since it was read, or has this site's own name or key; as `open`.
        """
        _check_own(self.settings, self.identity, pinned)
        path = self.path / "directory.toml"
        with (self.path / "site.toml").open("rb") as file:
            lock_file(file)
            if Pinned.read(path).pins != self.pinned.pins:
                raise SiteError(f"{path} was changed meanwhile", hint="look at it, and try again")
            self.log.append(event, facts)
            pinned.write(path)
        return replace(self, pinned=pinned)

    def count(self, size: int, *, now: datetime | None = None) -> None:
        """Count bytes to or from the coordinator, over all processes of this site, and refuse those beyond the day's.

        Raises: OfferRefusedError if the day (UTC) has had as many as are allowed; SiteError.
        """
        now = now or datetime.now(UTC)
        today, most = f"{now.astimezone(UTC).date()}", self.settings.maxima.bytes_a_day
        if not self.bytes_today.add(size, today, most):
            self.refused(why := [f"more than {most} bytes on {today}"], now, coordinator=self.coordinator)
            raise OfferRefusedError(why)


def _check_own(settings: SiteSettings, identity: CertifiedIdentity, pinned: Pinned) -> None:
    """This site's own name and key are its own. Raises: SiteError."""
    for other in (*pinned.sites, *pinned.coordinators):
        if other.name.lower() == settings.name.lower():
            raise SiteError(f"directory.toml has {other.name}, which is this site", hint="it has the others only")
        if other.public_key == identity.certificate.public_key:
            raise SiteError(f"directory.toml has this site's own key under the name {other.name}")


def _coordinator(settings: SiteSettings, asked: str) -> str:
    known = list(settings.coordinators)
    if asked and asked not in known:
        raise ConfigError(
            f"site.toml has no coordinator {asked!a:.80}", hint=f"it has {', '.join(known) or 'none'}: [coordinators.X]"
        )
    return asked or (known[0] if len(known) == 1 else "")
