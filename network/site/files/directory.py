"""directory.toml: who is pinned, by certificate. A site's file has the other sites and its coordinators.

A pin is the SHA-256 of a certificate. It is compared by people, by another way than the certificate came, and it binds
one name to one key; the file holds both, so that neither can be changed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from choral.network.errors import CertificateError, SiteError
from choral.network.site.files.private import write_private
from choral.network.transport.certificates import Certificate, read_certificate
from choral.network.transport.pinned_tls import Directory
from choral.toml_files import read_toml

HEADER = """\
# Whose certificate is pinned, under which name. Written by `choral site directory add|remove|rotate`.
# A pin is compared by telephone or on paper, with what `choral site show` prints at the other end.
"""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    pin: str
    certificate: str


@dataclass(frozen=True, kw_only=True)
class _File:
    sites: dict[str, _Entry] = field(default_factory=dict)
    coordinators: dict[str, _Entry] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """Certificates by name. No name and no key stands twice, in sites and coordinators together."""

    sites: Directory = field(default_factory=Directory)
    coordinators: Directory = field(default_factory=Directory)

    def __post_init__(self) -> None:
        Directory([*self.sites, *self.coordinators])

    @property
    def pins(self) -> dict[str, str]:
        """By kind and name."""
        named = (("sites", self.sites), ("coordinators", self.coordinators))
        return {f"{kind} {entry.name}": entry.pin for kind, entries in named for entry in entries}

    @classmethod
    def read(cls, path: Path) -> Pinned:
        """Raises: ConfigError for a file that cannot be read or a key that is not known; SiteError, CertificateError
        for a certificate that has another name or pin than is written there, or a name or key that is there twice.
        """
        found = read_toml(
            path, _File, example="the one that `choral site init` writes", keys="each entry has pin and certificate"
        )
        pinned = {kind: Directory(_certificates(path, getattr(found, kind))) for kind in ("sites", "coordinators")}
        try:
            return cls(**pinned)
        except CertificateError as error:
            raise CertificateError(f"{path}: {error}", hint=error.hint) from None

    def write(self, path: Path) -> None:
        """Write the whole file, in one piece."""
        text = HEADER
        for kind in ("sites", "coordinators"):
            for certificate in getattr(self, kind):
                text += f'\n[{kind}."{certificate.name}"]\npin = "{certificate.pin}"\n'
                text += f'certificate = """\n{certificate.pem.strip()}\n"""\n'
        write_private(path, text.encode())

    def with_(self, certificate: Certificate, *, coordinator: bool = False) -> Pinned:
        """With one more. Raises: CertificateError if its name or its key is there."""
        kind = "coordinators" if coordinator else "sites"
        return replace(self, **{kind: Directory([*getattr(self, kind), certificate])})

    def without(self, name: str) -> Pinned:
        """Raises: SiteError for a name that is not there."""
        kind = self.kind_of(name)
        return replace(self, **{kind: getattr(self, kind).without(name)})

    def rotated(self, certificate: Certificate) -> Pinned:
        """With another certificate in the place of the one of that name. Raises: SiteError, CertificateError."""
        kind = self.kind_of(certificate.name)
        return replace(self, **{kind: getattr(self, kind).with_(certificate)})

    def kind_of(self, name: str) -> str:
        """ "sites" or "coordinators". Raises: SiteError for a name that is not there."""
        for kind in ("sites", "coordinators"):
            if name in getattr(self, kind):
                return kind
        known = ", ".join(entry.name for entry in (*self.sites, *self.coordinators)) or "nobody"
        raise SiteError(f"nobody is pinned as {name!a:.80}", hint=f"pinned: {known}")


def _certificates(path: Path, entries: dict[str, _Entry]) -> Iterator[Certificate]:
    for name, entry in entries.items():
        certificate = read_certificate(entry.certificate)
        if certificate.name != name:
            raise SiteError(f"{path}: the certificate under {name!a} is that of {certificate.name}")
        if certificate.pin != entry.pin:
            raise SiteError(
                f"{path}: the certificate of {name} does not have the pin that is written with it",
                hint="compare the pin with the other end; `choral site directory rotate` takes a new certificate",
            )
        yield certificate
