"""Self-made certificates: an Ed25519 key, a name, ten years, and nothing that signs another certificate.

No authority vouches for anyone: people hand each other certificates and compare the *pin*, the SHA-256 of the
certificate's DER bytes, by another way (by telephone, on paper). A certificate is good for both ends of TLS, because
which end somebody stands at is said by the name alone.

The bytes are built here, from the few parts that X.509 needs (RFC 5280, RFC 8410), so that the transport needs no
library beyond those that Choral has anyway; tests read them with another implementation.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from Crypto.Util.asn1 import DerObject, DerObjectId, DerSequence

from choral.network.errors import CertificateError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
LARGEST_FILE = 16_384  # bytes; a certificate of this kind has about 500
SKEW = timedelta(hours=1)  # a certificate is good this long before it is made: clocks differ
_ED25519 = DerObjectId("1.3.101.112").encode()
_COMMON_NAME = DerObjectId("2.5.4.3").encode()
_SEQUENCE, _SET, _BITS, _OCTETS, _TEXT = 0x30, 0x31, 0x03, 0x04, 0x0C
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18


@dataclass(frozen=True)
class Certificate:
    """One party's certificate, as read. pin: SHA-256 of `der`, in hexadecimal. public_key: 32 bytes, Ed25519."""

    name: str
    der: bytes
    pin: str
    public_key: bytes
    not_before: datetime
    not_after: datetime

    @property
    def pem(self) -> str:
        return ssl.DER_cert_to_PEM_cert(self.der)


@dataclass(frozen=True)
class CertifiedIdentity:
    """Who this process is: its certificate, and where its private key lies. The key is read by OpenSSL alone."""

    certificate: Certificate
    certificate_path: Path
    key_path: Path

    @property
    def name(self) -> str:
        return self.certificate.name

    @staticmethod
    def load(folder: str | Path, name: str) -> CertifiedIdentity:
        """Read NAME.crt and find NAME.key in `folder`.

        Raises:
            CertificateError: a file is missing or no certificate of this kind, it is another name's, it has expired,
                the key may be read by other users, or it is not the certificate's.
        """
        certificate_path, key_path = Path(folder) / f"{check_name(name)}.crt", Path(folder) / f"{name}.key"
        certificate = read_certificate(certificate_path)
        if certificate.name != name:
            raise CertificateError(f"{certificate_path} is the certificate of {certificate.name}, not of {name}")
        if datetime.now(UTC) >= certificate.not_after:
            raise CertificateError(
                f"{certificate_path} expired on {certificate.not_after:%Y-%m-%d}",
                hint="make a new one and give it to those who hold the old one",
            )
        _check_key(key_path, certificate)
        return CertifiedIdentity(certificate, certificate_path, key_path)


def check_name(name: str) -> str:
    """Return `name`.

    Raises:
        CertificateError: it is no name that a certificate, a file and a log line can have.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CertificateError(
            "expected a name of 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit: "
            f"{name!a:.80}",
            hint="a name is no path: such as north, or st-mary.2",
        )
    return name


def make_identity(folder: str | Path, name: str, *, days: int = 3650) -> CertifiedIdentity:
    """Make a key and a certificate for `name`, as NAME.key (readable by this user alone) and NAME.crt.

    Raises:
        CertificateError: the name cannot be used, one of the files is there already, or `days` is not 1 to 36500.
    """
    folder = Path(folder)
    if not 1 <= days <= 36_500:
        raise CertificateError(f"expected 1 to 36500 days, got {days}")
    certificate_path, key_path = folder / f"{check_name(name)}.crt", folder / f"{name}.key"
    for path in (certificate_path, key_path):
        if path.exists():
            raise CertificateError(
                f"{path} is there already",
                hint="who lost a key makes a new one in another folder; nobody overwrites one by accident",
            )
    key = ECC.generate(curve="Ed25519")
    now = datetime.now(UTC).replace(microsecond=0)
    der = self_signed(name, key, not_before=now - SKEW, not_after=now + timedelta(days=days))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_new(key_path, key.export_key(format="PEM", use_pkcs8=True) + "\n", 0o600)
    _write_new(certificate_path, ssl.DER_cert_to_PEM_cert(der), 0o644)
    return CertifiedIdentity.load(folder, name)


def self_signed(name: str, key: ECC.EccKey, *, not_before: datetime, not_after: datetime) -> bytes:
    """The DER bytes of a certificate for `name` under its own key (RFC 5280, section 4.1)."""
    public = key.public_key().export_key(format="DER")
    subject = _tlv(_SEQUENCE, _tlv(_SET, _tlv(_SEQUENCE, _COMMON_NAME, _tlv(_TEXT, name.encode()))))
    algorithm = _tlv(_SEQUENCE, _ED25519)
    signed = _tlv(
        _SEQUENCE,
        _tlv(0xA0, b"\x02\x01\x02"),  # version 3
        _tlv(0x02, b"\x01" + secrets.token_bytes(15)),  # serial number: positive, random
        algorithm,
        subject,  # as issuer
        _tlv(_SEQUENCE, _time(not_before), _time(not_after)),
        subject,
        public,
        _extensions(name, public),
    )
    signature = eddsa.new(key, "rfc8032").sign(signed)
    return _tlv(_SEQUENCE, signed, algorithm, _tlv(_BITS, b"\0", signature))


def read_certificate(source: str | Path) -> Certificate:
    """Read a certificate from a PEM file, or from PEM text.

    Raises:
        CertificateError: there is no such file, or it holds no single certificate of the kind that is made here.
    """
    if isinstance(source, str) and "-----BEGIN" in source:
        text, where = source, "the certificate"
    else:
        where = str(source)
        try:
            with open(source, encoding="ascii") as file:
                text = file.read(LARGEST_FILE + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise CertificateError(f"{where} cannot be read as a certificate: {_why(error)}") from None
    if len(text) > LARGEST_FILE or text.count("-----BEGIN") != 1:
        raise CertificateError(f"{where}: expected exactly one certificate, in PEM")
    try:
        return parse_certificate(ssl.PEM_cert_to_DER_cert(text.strip()))
    except ValueError:
        raise CertificateError(f"{where}: expected a certificate in PEM") from None


def parse_certificate(der: bytes) -> Certificate:
    """Read the DER bytes of a certificate of the kind that is made here, and check its own signature.

    Raises:
        CertificateError: it is of another kind: another key than Ed25519, a name that differs between subject, issuer
            and alternative name, a key that may sign certificates, a signature that does not hold.
    """
    try:
        outer = DerSequence().decode(der, strict=True)
        signed, algorithm, signature = outer[0], outer[1], _content(outer[2], _BITS)
        parts = DerSequence().decode(signed, strict=True)
        issuer, validity, subject, public = parts[3:7]
        times = DerSequence().decode(validity, strict=True)
        name = _common_name(subject)
        key = ECC.import_key(public)
        fits = [
            len(outer) == 3,
            signature[:1] == b"\0",  # no unused bits
            issuer == subject,
            _content(algorithm, _SEQUENCE) == _ED25519,
            key.curve == "Ed25519",
            parts[7] == _extensions(name, public),  # byte by byte: no other use, no other name, no right to sign others
        ]
        if not all(fits):
            raise ValueError("kind")
        eddsa.new(key, "rfc8032").verify(signed, signature[1:])
        not_before, not_after = (_read_time(time) for time in (times[0], times[1]))
    except (ValueError, IndexError, KeyError, TypeError):
        raise CertificateError(
            "no certificate of the kind that this transport uses (Ed25519, signed by itself, for one name)",
            hint="`make_identity` makes them",
        ) from None
    pin = hashlib.sha256(der).hexdigest()
    return Certificate(check_name(name), der, pin, key.export_key(format="raw"), not_before, not_after)


def _check_key(path: Path, certificate: Certificate) -> None:
    try:
        mode = path.stat().st_mode
        if os.name == "posix" and mode & 0o077:
            raise CertificateError(
                f"{path} may be read by other users (mode {mode & 0o777:o})", hint=f"chmod 600 {path}"
            )
        key = ECC.import_key(path.read_bytes()[:LARGEST_FILE])
    except OSError as error:
        raise CertificateError(f"{path} cannot be read as a private key: {_why(error)}") from None
    except (ValueError, IndexError, TypeError):
        raise CertificateError(f"{path}: expected an Ed25519 private key in PEM, not encrypted") from None
    if not key.has_private() or key.public_key().export_key(format="raw") != certificate.public_key:
        raise CertificateError(f"{path} is not the key of the certificate of {certificate.name}")


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it holds bytes that are no text"


def _write_new(path: Path, text: str, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as file:
            file.write(text)
    except FileExistsError:
        raise CertificateError(f"{path} is there already") from None


def _tlv(tag: int, *parts: bytes) -> bytes:
    """One DER element: tag, length, content."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _extensions(name: str, public: bytes) -> bytes:
    return _tlv(
        0xA3,
        _tlv(
            _SEQUENCE,
            _extension("2.5.29.19", _tlv(_SEQUENCE), critical=True),  # basic constraints: signs no certificate
            _extension("2.5.29.15", _tlv(_BITS, b"\x07\x80"), critical=True),  # key usage: digital signatures only
            _extension(
                "2.5.29.37",  # extended key usage: TLS, both ends
                _tlv(_SEQUENCE, *(DerObjectId(f"1.3.6.1.5.5.7.3.{use}").encode() for use in (1, 2))),
            ),
            _extension("2.5.29.17", _tlv(_SEQUENCE, _tlv(0x82, name.encode()))),  # subject alternative name: dNSName
            _extension("2.5.29.14", _tlv(_OCTETS, hashlib.sha256(public).digest()[:20])),  # subject key identifier
        ),
    )


def _extension(kind: str, value: bytes, *, critical: bool = False) -> bytes:
    said = [b"\x01\x01\xff"] if critical else []
    return _tlv(_SEQUENCE, DerObjectId(kind).encode(), *said, _tlv(_OCTETS, value))


def _time(moment: datetime) -> bytes:
    """UTCTime to 2049, GeneralizedTime from 2050 on (RFC 5280, section 4.1.2.5)."""
    tag, form = (_UTC_TIME, "%y%m%d%H%M%SZ") if moment.year < 2050 else (_GENERALIZED_TIME, "%Y%m%d%H%M%SZ")
    return _tlv(tag, moment.strftime(form).encode())


def _read_time(der: bytes) -> datetime:
    form = {_UTC_TIME: "%y%m%d%H%M%SZ", _GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}[der[0]]
    return datetime.strptime(_content(der, der[0]).decode("ascii"), form).replace(tzinfo=UTC)


def _content(der: bytes, tag: int) -> bytes:
    if der[0] != tag:
        raise ValueError("tag")
    found = DerObject()
    found.decode(der, strict=True)
    return bytes(found.payload)


def _common_name(subject: bytes) -> str:
    """The one attribute of a subject of the kind that is made here."""
    sets: Sequence[bytes] = DerSequence().decode(subject, strict=True)[:]
    if len(sets) != 1:
        raise ValueError("subject")
    kind, text = DerSequence().decode(_content(sets[0], _SET), strict=True)[:]
    if kind != _COMMON_NAME:
        raise ValueError("subject")
    return _content(text, _TEXT).decode("ascii")
