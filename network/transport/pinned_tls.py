"""Who may be at the other end: names, and the one certificate that each has."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from choral.network.errors import CertificateError, UnknownPeerError, WrongPeerError
from choral.network.transport.certificates import Certificate, CertifiedIdentity, read_certificate

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
READ_AHEAD = 512 * 1024  # bytes


class Directory:
    """The certificates of the peers, by name. It never changes: `with_` and `without` give another one.

    Raises:
        CertificateError: two entries have one name (capitals aside), one certificate or one key.
    """

    def __init__(self, certificates: Iterable[Certificate | str] = ()) -> None:
        """certificates: as read, or as PEM text."""
        self._by_name: dict[str, Certificate] = {}
        self._by_pin: dict[str, Certificate] = {}
        keys: dict[bytes, str] = {}
        names: set[str] = set()
        for given in certificates:
            new = read_certificate(given) if isinstance(given, str) else given
            if new.name.lower() in names:
                raise CertificateError(
                    f"two certificates for one name: {new.name}", hint="`with_` puts a new one in the old one's place"
                )
            if new.public_key in keys:
                raise CertificateError(
                    f"{new.name} and {keys[new.public_key]} have one key",
                    hint="each party makes a key of its own; one that two of them hold names neither",
                )
            keys[new.public_key] = new.name
            names.add(new.name.lower())
            self._by_name[new.name] = self._by_pin[new.pin] = new

    def __iter__(self) -> Iterator[Certificate]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Certificate:
        if name not in self._by_name:
            raise UnknownPeerError(f"no {name!a:.80} in the directory")
        return self._by_name[name]

    def with_(self, certificate: Certificate | str) -> Directory:
        """This directory with one more, or with another certificate in the place of the one of the same name."""
        new = read_certificate(certificate) if isinstance(certificate, str) else certificate
        return Directory([*(old for old in self if old.name != new.name), new])

    def without(self, name: str) -> Directory:
        return Directory(old for old in self if old.name != self[name].name)

    def name_of(self, der: bytes | None) -> str:
        """Whose certificate this is, by its pin.

        Raises:
            WrongPeerError: nobody's here.
        """
        found = self._by_pin.get(hashlib.sha256(der or b"").hexdigest())
        if found is None:
            raise WrongPeerError("its certificate is not in the directory")
        return found.name


def tls_context(identity: CertifiedIdentity, peers: Iterable[Certificate], *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 and nothing older; both ends show a certificate, and only the peers' are taken.

    OpenSSL holds each certificate against the list and against the clock; the caller then looks its pin up in the
    directory of that moment (`Directory.name_of`). No session is resumed: one that is would not be looked at again.
    The name is checked by the pin, so it is not sent in the clear as TLS would (SNI).

    Raises:
        CertificateError: the identity's files changed since they were read, and cannot be used now.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if server:
        context.num_tickets = 0
    try:
        context.load_cert_chain(identity.certificate_path, identity.key_path, password=lambda: "")
    except (OSError, ValueError) as error:
        raise CertificateError(f"the certificate or key of {identity.name} cannot be used: {in_words(error)}") from None
    pems = "".join(peer.pem for peer in peers)
    if pems:
        context.load_verify_locations(cadata=pems)
    return context


async def secured(plain: asyncio.StreamWriter, context: ssl.SSLContext, *, server: bool, seconds: float) -> Streams:
    """The streams over TLS. They are new: what was read of the plain ones is from nobody, and none of it is in them.

    `StreamWriter.start_tls` would go on with the same reader, and give out as the peer's what a proxy sent behind its
    answer. Raises: OSError, EOFError if the handshake fails.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_AHEAD, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = await loop.start_tls(
        plain.transport, protocol, context, server_side=server, ssl_handshake_timeout=seconds
    )
    if transport is None:
        raise EOFError
    protocol.connection_made(transport)  # which `start_tls` leaves to its caller
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def refusal(error: BaseException) -> str:
    """Why a TLS handshake failed, for the log of the end that refused."""
    if isinstance(error, ssl.SSLCertVerificationError):
        now = f"; it is {datetime.now(UTC):%Y-%m-%d %H:%M} UTC here"
        said = {
            9: f"its certificate is not valid yet: compare the clocks{now}",
            10: f"its certificate has expired{now}",
            18: "its certificate is not in the directory",
            20: "its certificate is not in the directory, and another one signed it",
            24: "its certificate was signed with a key that may sign none",
            79: "its certificate was signed with a key that may sign none",
        }.get(error.verify_code, "its certificate was refused")
        return f"{said} ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        said = in_words(error)
        known = {
            "unsupported protocol": "it speaks no TLS 1.3",
            "peer did not return a certificate": "it showed no certificate",
            "http request": "it speaks HTTP, not TLS",
            "wrong version number": "it speaks no TLS",
        }
        return f"{known[said]} ({said})" if said in known else said
    if isinstance(error, TimeoutError):
        return "it did not greet in time"
    return "it hung up before it greeted"


def in_words(error: OSError | ValueError) -> str:
    """What OpenSSL or the system calls it; without what it may quote."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS failed").lower().replace("_", " ")
    return str(getattr(error, "strerror", None) or type(error).__name__)
