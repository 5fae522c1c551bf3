"""Certificates: what is made, held against another implementation, and what is not taken."""

from __future__ import annotations

import hashlib
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from Crypto.PublicKey import ECC
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from choral.network import (
    Certificate,
    CertificateError,
    CertifiedIdentity,
    Directory,
    UnknownPeerError,
    WrongPeerError,
    make_identity,
    read_certificate,
)
from choral.network.transport.certificates import parse_certificate, self_signed

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_another_implementation_reads_what_is_made(ends: Any) -> None:
    made = ends.identities["north"].certificate
    read = x509.load_pem_x509_certificate(made.pem.encode())
    assert read.fingerprint(hashes.SHA256()).hex() == made.pin == hashlib.sha256(made.der).hexdigest()
    assert read.version is x509.Version.v3
    assert read.subject == read.issuer
    assert [part.value for part in read.subject] == ["north"]
    key = read.public_key()
    assert isinstance(key, ed25519.Ed25519PublicKey)
    assert key.public_bytes_raw() == made.public_key
    read.verify_directly_issued_by(read)
    said = {extension.oid._name: extension for extension in read.extensions}
    assert said["basicConstraints"].critical
    assert not said["basicConstraints"].value.ca
    usage = said["keyUsage"].value
    assert (usage.digital_signature, usage.key_cert_sign, usage.key_agreement) == (True, False, False)
    assert set(said["extendedKeyUsage"].value) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert said["subjectAltName"].value.get_values_for_type(x509.DNSName) == ["north"]
    assert len(said) == 5
    assert (read.not_valid_before_utc, read.not_valid_after_utc) == (made.not_before, made.not_after)
    assert timedelta(days=3649) < made.not_after - datetime.now(UTC) <= timedelta(days=3650)
    assert read.serial_number.bit_length() > 100


def test_times_beyond_2049_have_four_digits() -> None:
    """RFC 5280, section 4.1.2.5."""
    key = ECC.generate(curve="Ed25519")
    for after in (datetime(2049, 12, 31, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)):
        der = self_signed("north", key, not_before=NOW, not_after=after)
        assert x509.load_der_x509_certificate(der).not_valid_after_utc == parse_certificate(der).not_after == after


def test_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    made = make_identity(tmp_path, "north")
    assert made.key_path.stat().st_mode & 0o777 == 0o600
    assert CertifiedIdentity.load(tmp_path, "north") == made
    assert "PRIVATE" not in repr(made)
    before = made.key_path.read_bytes()
    with pytest.raises(CertificateError, match="there already"):
        make_identity(tmp_path, "north")
    made.certificate_path.unlink()
    with pytest.raises(CertificateError, match="there already"):
        make_identity(tmp_path, "north")
    assert made.key_path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "../north", "a b", "-x", "n" * 64, "nörd", "north\n", ".x"])
def test_names_that_no_file_and_no_log_should_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="expected a name"):
        make_identity(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    made = make_identity(tmp_path, "north")
    made.key_path.chmod(0o640)
    with pytest.raises(CertificateError, match=r"may be read by other users \(mode 640\)") as caught:
        CertifiedIdentity.load(tmp_path, "north")
    assert "chmod 600" in caught.value.hint


def test_identities_that_cannot_be_used(tmp_path: Path) -> None:
    north, south = make_identity(tmp_path, "north"), make_identity(tmp_path, "south")
    (tmp_path / "west.crt").write_text(north.certificate.pem)
    with pytest.raises(CertificateError, match="is the certificate of north, not of west"):
        CertifiedIdentity.load(tmp_path, "west")
    with pytest.raises(CertificateError, match="cannot be read as a certificate"):
        CertifiedIdentity.load(tmp_path, "east")
    north.key_path.write_bytes(south.key_path.read_bytes())
    with pytest.raises(CertificateError, match="is not the key of the certificate"):
        CertifiedIdentity.load(tmp_path, "north")
    north.key_path.write_text("nothing")
    with pytest.raises(CertificateError, match="expected an Ed25519 private key"):
        CertifiedIdentity.load(tmp_path, "north")
    key = ECC.generate(curve="Ed25519")
    north.key_path.write_text(
        key.export_key(format="PEM", passphrase="x" * 3, protection="PBKDF2WithHMAC-SHA512AndAES256-CBC")
    )
    with pytest.raises(CertificateError, match="not encrypted"):
        CertifiedIdentity.load(tmp_path, "north")
    old = self_signed("south", ECC.import_key(south.key_path.read_text()), not_before=NOW, not_after=NOW)
    south.certificate_path.write_text(ssl.DER_cert_to_PEM_cert(old))
    with pytest.raises(CertificateError, match="expired on 2026-01-01"):
        CertifiedIdentity.load(tmp_path, "south")


def others(*, name: str = "north", issuer: str = "north", alternative: str = "north", ca: bool = False) -> bytes:
    """A certificate made by another library, close to ours."""
    key = ed25519.Ed25519PrivateKey.generate()
    builder = x509.CertificateBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
        public_key=key.public_key(),
        serial_number=5,
        not_valid_before=NOW,
        not_valid_after=NOW + timedelta(days=1),
    )
    usage = x509.KeyUsage(True, *[False] * 8)
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    identifier = x509.SubjectKeyIdentifier(hashlib.sha256(spki).digest()[:20])
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(uses, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(alternative)]), critical=False)
        .add_extension(identifier, critical=False)
    )
    return builder.sign(key, None).public_bytes(Encoding.DER)


def test_only_certificates_that_name_one_party_and_sign_no_other_are_read() -> None:
    assert parse_certificate(others()).name == "north"  # of this kind, whoever made it
    for wrong in ({"ca": True}, {"issuer": "south"}, {"alternative": "south"}):
        with pytest.raises(CertificateError, match="no certificate of the kind"):
            parse_certificate(others(**wrong))
    signed = bytearray(others())
    signed[-1] ^= 1
    with pytest.raises(CertificateError, match="no certificate of the kind"):
        parse_certificate(bytes(signed))
    with pytest.raises(CertificateError, match="no certificate of the kind"):
        parse_certificate(others() + b"\0")
    other = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    builder = x509.CertificateBuilder(name, name, other.public_key(), 5, NOW, NOW + timedelta(days=1))
    with pytest.raises(CertificateError, match="no certificate of the kind"):
        parse_certificate(builder.sign(other, hashes.SHA256()).public_bytes(Encoding.DER))


def test_no_byte_of_a_certificate_may_differ(ends: Any) -> None:
    der = ends.identities["north"].certificate.der
    for at in range(len(der)):
        changed = bytearray(der)
        changed[at] ^= 0x20
        with pytest.raises(CertificateError):
            parse_certificate(bytes(changed))
        with pytest.raises(CertificateError):
            parse_certificate(der[:at])


def test_files_that_hold_no_certificate(tmp_path: Path, ends: Any) -> None:
    pem = ends.identities["north"].certificate.pem
    for text in ("", "north", pem + pem, pem.replace("A", "!"), "x" * 20_000 + pem):
        (tmp_path / "x.crt").write_text(text)
        with pytest.raises(CertificateError, match=r"x\.crt"):
            read_certificate(tmp_path / "x.crt")
    (tmp_path / "x.crt").write_bytes(b"\xff")
    with pytest.raises(CertificateError, match="no text"):
        read_certificate(tmp_path / "x.crt")


def with_key_of(name: str, identity: CertifiedIdentity) -> Certificate:
    key = ECC.import_key(identity.key_path.read_text())
    return parse_certificate(self_signed(name, key, not_before=NOW, not_after=NOW + timedelta(days=1)))


def test_a_directory_has_one_certificate_and_one_key_for_each_name(ends: Any, tmp_path: Path) -> None:
    north, south = (ends.identities[name].certificate for name in ("north", "south"))
    directory = Directory([north, south.pem])
    assert (len(directory), directory["south"], "west" in directory) == (2, south, False)
    with pytest.raises(CertificateError, match="two certificates for one name"):
        Directory([north, make_identity(tmp_path, "north").certificate])
    with pytest.raises(CertificateError, match="two certificates for one name"):
        Directory([north, make_identity(tmp_path, "North").certificate])
    with pytest.raises(CertificateError, match="west and north have one key"):
        Directory([north, with_key_of("west", ends.identities["north"])])
    with pytest.raises(UnknownPeerError, match="no 'west'"):
        _ = directory["west"]


def test_a_name_belongs_to_one_pin(ends: Any, tmp_path: Path) -> None:
    north, south = (ends.identities[name].certificate for name in ("north", "south"))
    directory = Directory([north])
    assert directory.name_of(north.der) == "north"
    for other in (south.der, None, b"", north.der + b"\0"):
        with pytest.raises(WrongPeerError, match="not in the directory"):
            directory.name_of(other)
    new = make_identity(tmp_path, "north").certificate
    rotated = directory.with_(new).with_(south)
    assert rotated.name_of(new.der) == "north"
    with pytest.raises(WrongPeerError):
        rotated.name_of(north.der)
    assert [left.name for left in rotated.without("north")] == ["south"]
    assert directory["north"] == north  # the first one is as it was
    with pytest.raises(UnknownPeerError):
        directory.without("south")
