"""Who is turned away, at which end, and what each end is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from Crypto.PublicKey import ECC
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from choral.errors import ConfigError
from choral.network import (
    CertifiedIdentity,
    Directory,
    PeerLostError,
    RefusedError,
    TransportError,
    WrongPeerError,
    make_identity,
)
from choral.network.transport.certificates import Certificate, parse_certificate, self_signed
from choral.network.transport.frames import Kind, header, pack_names
from choral.network.transport.pinned_tls import tls_context


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    with caplog.at_level(logging.INFO, "choral.network"):
        yield caplog


async def told(ends: Any, address: tuple[str, int], name: str = "north", **settings: Any) -> TransportError:
    """What a site learns that tries once."""
    with pytest.raises(TransportError) as caught:
        async with asyncio.timeout(20):
            await ends.make_link(name, address, **settings).run(patience=0.0)
    return caught.value


@contextlib.asynccontextmanager
async def shown(address: tuple[str, int], identity: Any, trusted: Any, **context: Any) -> AsyncIterator[Any]:
    """A raw client with this certificate."""
    reader, writer = await asyncio.open_connection(*address)
    made = tls_context(identity, trusted, server=False)
    for name, value in context.items():
        setattr(made, name, value)
    try:
        with contextlib.suppress(OSError, EOFError):
            await writer.start_tls(made)
            writer.write(b"\1\0\0\0" + bytes(8))
        yield reader
    finally:
        writer.transport.abort()
        await asyncio.sleep(0.02)


async def ended(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(OSError, EOFError):
        async with asyncio.timeout(5):
            return await reader.read() == b""
    return True


def saved(folder: Path, name: str, key: ECC.EccKey, der: bytes) -> CertifiedIdentity:
    """An identity without the checks of `load`."""
    (folder / f"{name}.key").write_text(key.export_key(format="PEM"))
    (folder / f"{name}.crt").write_text(ssl.DER_cert_to_PEM_cert(der))
    certificate = Certificate(name, der, "", b"", datetime.now(UTC), datetime.now(UTC))
    return CertifiedIdentity(certificate, folder / f"{name}.crt", folder / f"{name}.key")


def test_a_certificate_that_is_not_in_the_directory(ends: Any, logged: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, address):
            error = await told(ends, address, "stranger")
            assert isinstance(error, RefusedError)
            assert "hung up before it greeted" in str(error)
            assert "its log says which" in error.hint
            assert not hub.connected

    asyncio.run(main())
    assert "refused 127.0.0.1:" in logged.text
    assert "its certificate is not in the directory (self-signed certificate)" in logged.text


def test_another_certificate_with_a_name_of_the_directory(ends: Any, logged: Any, tmp_path: Path) -> None:
    other = make_identity(tmp_path, "north")

    async def main() -> None:
        async with ends.hub("north") as (hub, address):
            async with shown(address, other, ends.directory("coordinator")) as reader:
                assert await ended(reader)
            assert not hub.connected

    asyncio.run(main())
    assert "its certificate is not in the directory" in logged.text


@pytest.mark.parametrize(("from_days", "to_days", "said"), [(-9, -1, "has expired"), (1, 9, "is not valid yet")])
def test_times_are_held_though_the_certificate_is_pinned(
    ends: Any, logged: Any, tmp_path: Path, from_days: int, to_days: int, said: str
) -> None:
    key, now = ECC.generate(curve="Ed25519"), datetime.now(UTC)
    der = self_signed("north", key, not_before=now + timedelta(from_days), not_after=now + timedelta(to_days))
    wrong = saved(tmp_path, "north", key, der)

    async def main() -> None:
        async with ends.hub() as (hub, address):
            await hub.change(directory=Directory([parse_certificate(der)]))
            async with shown(address, wrong, ends.directory("coordinator")) as reader:
                assert await ended(reader)
            assert not hub.connected

    asyncio.run(main())
    assert f"its certificate {said}" in logged.text
    assert "UTC here" in logged.text


@pytest.mark.parametrize("name", ["north", "child"])
def test_a_certificate_that_a_sites_key_signed(ends: Any, logged: Any, tmp_path: Path, name: str) -> None:
    """A site vouches for nobody: the child of a pinned certificate is a stranger, chain and all."""
    parent = ends.identities["north"]
    signer = load_pem_private_key(parent.key_path.read_bytes(), None)
    above = x509.load_der_x509_certificate(parent.certificate.der)
    key, now = ECC.generate(curve="Ed25519"), datetime.now(UTC)
    public = load_pem_private_key(key.export_key(format="PEM").encode(), None).public_key()
    builder = x509.CertificateBuilder(
        above.subject,
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        public,
        7,
        now - timedelta(1),
        now + timedelta(1),
    )
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
        above.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    )
    made = (
        builder.add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(uses, False)
        .add_extension(identifier, False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .sign(signer, None)
    )
    child = saved(tmp_path, name, key, made.public_bytes(Encoding.DER))
    child.certificate_path.write_text(child.certificate_path.read_text() + parent.certificate.pem)

    async def main() -> None:
        async with ends.hub("north") as (hub, address):
            async with shown(address, child, ends.directory("coordinator")) as reader:
                assert await ended(reader)
            assert not hub.connected

    asyncio.run(main())
    assert "refused 127.0.0.1:" in logged.text
    assert "certificate" in logged.text.partition("refused")[2]


def test_the_pin_is_looked_up_after_tls(ends: Any, logged: Any) -> None:
    """A site removed while it shakes hands: TLS, begun under the old directory, takes it; its pin does not."""

    async def main() -> None:
        async with ends.hub("north") as (hub, address):
            reader, writer = await asyncio.open_connection(*address)
            await asyncio.sleep(0.1)  # the hub waits for the first byte of TLS
            await hub.change(directory=ends.directory("south"))
            await writer.start_tls(tls_context(ends.identities["north"], ends.directory("coordinator"), server=False))
            assert b"unknown" in await asyncio.wait_for(reader.read(), 5)
            writer.transport.abort()
            await asyncio.sleep(0.02)
            assert not hub.connected

    asyncio.run(main())
    assert "its certificate is not in the directory" in logged.text


@pytest.mark.parametrize("rotated", [False, True])
def test_the_pin_is_looked_up_again_before_a_site_is_taken_in(ends: Any, tmp_path: Path, rotated: bool) -> None:
    """It is removed, or rotated, while the older connection under its name is asked whether it lives."""

    async def main() -> None:
        async with ends.hub("north") as (hub, address), ends.raw_site(address):
            newer = asyncio.create_task(told(ends, address))
            await asyncio.sleep(0.2)
            south = ends.directory("south")
            new = make_identity(tmp_path, "north").certificate
            await hub.change(directory=south.with_(new) if rotated else south)
            error = await newer
            assert isinstance(error, RefusedError)
            assert error.code == "unknown"
            assert not hub.connected

    asyncio.run(main())


def test_no_certificate_at_all(ends: Any, logged: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (_, address):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            reader, writer = await asyncio.open_connection(*address)
            with contextlib.suppress(OSError):
                await writer.start_tls(context)
                await reader.read()
            writer.transport.abort()
            await asyncio.sleep(0.02)

    asyncio.run(main())
    assert "it showed no certificate" in logged.text


def test_tls_older_than_1_3_is_refused_by_both_ends(ends: Any, logged: Any) -> None:
    async def main() -> None:
        old = {"minimum_version": ssl.TLSVersion.TLSv1_2, "maximum_version": ssl.TLSVersion.TLSv1_2}
        async with ends.hub("north") as (hub, address):
            north, trusted = ends.identities["north"], ends.directory("coordinator")
            async with shown(address, north, trusted, **old) as reader:
                assert await ended(reader)
            assert not hub.connected
        context = tls_context(ends.identities["coordinator"], ends.directory("north"), server=True)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with ends.raw_hub(lambda raw: raw.ended(), context=context) as address:
            error = await told(ends, address)
            assert isinstance(error, PeerLostError)
            assert "no TLS" in str(error)

    asyncio.run(main())
    assert "it speaks no TLS 1.3 (unsupported protocol)" in logged.text


def test_no_session_is_resumed(ends: Any) -> None:
    """A session that is taken up again would skip the look at the certificate and its dates."""

    async def main() -> None:
        async with ends.hub("north") as (_, address), ends.raw_site(address) as raw:
            session = raw.writer.get_extra_info("ssl_object").session
            assert session is None or not session.has_ticket
            assert raw.writer.get_extra_info("ssl_object").version() == "TLSv1.3"

    asyncio.run(main())


@pytest.mark.parametrize("known", [False, True])
def test_a_hub_that_is_another_one(ends: Any, logged: Any, known: bool) -> None:
    """Known to the site under another name, or not at all: the site says so, and sends nothing."""
    got = []

    async def script(raw: Any) -> None:
        got.append(raw)

    async def main() -> None:
        async with ends.raw_hub(script, name="south") as address:
            link = ends.make_link("north", address)
            if known:  # as if both were in TLS's list: the name is held against the pin
                both = ends.directory("coordinator", "south")
                link._directory = both
                link._context = tls_context(ends.identities["north"], both, server=False)
            with pytest.raises(WrongPeerError) as caught:
                await link.run(patience=0.0)
            said = "shows the certificate of south" if known else "its certificate is not in the directory"
            assert said in str(caught.value)
            assert known or "compare its pin" in caught.value.hint
        assert not got

    asyncio.run(main())


def test_a_name_that_is_not_the_certificates(ends: Any, logged: Any) -> None:
    async def main() -> None:
        async with ends.hub("north") as (hub, address):
            async with ends.raw_site(address, hello=False) as raw:
                await raw.send(Kind.HELLO, 0, pack_names("south", "coordinator"))
                assert (await raw.read_until(Kind.REFUSE))[1] == b"name"
                assert await raw.ended()
            async with ends.raw_site(address, hello=False) as raw:
                await raw.send(Kind.HELLO, 0, pack_names("north", "another"))
                assert (await raw.read_until(Kind.REFUSE))[1] == b"called"
            async with ends.raw_site(address, hello=False) as raw:
                await raw.send(Kind.HELLO, 0, b"\2" + b"of the future")
                assert (await raw.read_until(Kind.REFUSE))[1] == b"version"
            async with ends.raw_site(address, hello=False) as raw:
                await raw.send(Kind.BEAT)
                assert (await raw.read_until(Kind.REFUSE))[1] == b"frame"
            assert not hub.connected

    asyncio.run(main())
    assert "says that it is 'south', and its certificate is that of north" in logged.text
    assert "north called 'another', and this is coordinator" in logged.text
    assert "north speaks version 2 of the transport" in logged.text
    assert "a BEAT frame instead of HELLO" in logged.text


@pytest.mark.parametrize(
    ("code", "said"),
    [(b"version", "another version"), (b"in use", "second process"), (b"\xff\x1b[2J", "does not know")],
)
def test_a_site_is_told_why_in_words_of_its_own(ends: Any, code: bytes, said: str) -> None:
    async def script(raw: Any) -> None:
        await raw.send(Kind.REFUSE, 0, code)

    async def main() -> None:
        async with ends.raw_hub(script, welcome=False) as address:
            error = await told(ends, address)
            assert isinstance(error, RefusedError)
            assert said in str(error)
            assert "\x1b" not in str(error) + error.code

    asyncio.run(main())


def test_a_second_connection_under_a_living_name_is_refused(ends: Any, logged: Any) -> None:
    async def main() -> None:
        rare = ends.limits(beat=1.5)  # so that it is the probe that is answered
        async with ends.hub("north") as (hub, address), ends.link("north", address, lambda _: b"first", limits=rare):
            await hub.wait_for(["north"], timeout=10)
            error = await told(ends, address)
            assert isinstance(error, RefusedError)
            assert error.code == "in use"
            assert "does a second process use this key?" in str(error)
            assert await hub.request("north", b"", timeout=10, reply_limit=9) == b"first"

    asyncio.run(main())
    assert "north is connected and alive; does a second process use its key?" in logged.text


def test_a_second_connection_takes_the_place_of_one_that_is_dead(ends: Any) -> None:
    async def main() -> None:
        async with ends.hub("north", silence=60, beat=20) as (hub, address), ends.raw_site(address) as raw:
            raw.writer.transport.pause_reading()  # it hears no probe: as if a router had forgotten it
            await hub.wait_for(["north"], timeout=10)
            begun = time.monotonic()
            async with ends.link("north", address, lambda request: b"second"):
                assert await hub.request("north", b"", timeout=20, reply_limit=9) == b"second"
            assert time.monotonic() - begun < 5

    asyncio.run(main())


@pytest.mark.parametrize("first", [b"", b"\x16", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" + bytes(100)])
def test_who_speaks_no_tls_or_is_slow_is_let_go(ends: Any, logged: Any, first: bytes) -> None:
    async def main() -> None:
        async with ends.hub("north", handshake=0.6, probe=0.3) as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(first)
            begun = time.monotonic()
            assert await ended(reader)
            assert time.monotonic() - begun < 3
            writer.transport.abort()
            await asyncio.sleep(0.02)

    asyncio.run(main())
    assert "refused 127.0.0.1:" in logged.text


def test_drops_of_bytes_do_not_hold_a_handshake_open(ends: Any, logged: Any) -> None:
    """Neither before TLS is up, nor between TLS and the greeting (slow loris)."""

    async def main() -> None:
        async with ends.hub("north", handshake=0.6, probe=0.3) as (hub, address):
            _reader, writer = await asyncio.open_connection(*address)
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                for letter in b"\x16\x03\x01\x02\x00" + bytes(500):
                    writer.write(bytes([letter]))
                    await writer.drain()
                    await asyncio.sleep(0.05)
            assert time.monotonic() - begun < 5
            writer.transport.abort()
            async with ends.raw_site(address, hello=False) as raw:
                begun = time.monotonic()
                with contextlib.suppress(OSError):
                    for letter in header(Kind.HELLO, 0, 400) + bytes(400):
                        raw.writer.write(bytes([letter]))
                        await raw.writer.drain()
                        await asyncio.sleep(0.05)
                assert time.monotonic() - begun < 4
            assert not hub.connected

    asyncio.run(main())
    assert logged.text.count("it did not greet in time") == 2


def test_a_hub_that_never_greets_is_left(ends: Any) -> None:
    async def main() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await reader.read()
            writer.transport.abort()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        async with server:
            begun = time.monotonic()
            error = await told(ends, server.sockets[0].getsockname()[:2], limits=ends.limits(handshake=0.5, probe=0.3))
            assert isinstance(error, PeerLostError)
            assert "did not greet within 0.5 s" in str(error)
            assert time.monotonic() - begun < 4

    asyncio.run(main())


def test_nobody_answers_at_the_address(ends: Any) -> None:
    error = asyncio.run(told(ends, ("127.0.0.1", 9)))
    assert "127.0.0.1:9: the coordinator's address does not answer" in str(error)


def test_connections_from_one_address_are_counted(ends: Any, logged: Any) -> None:
    async def main() -> None:
        async with ends.hub("north", connections_per_address=2, handshake=5.0) as (hub, address):
            held = [await asyncio.open_connection(*address) for _ in range(2)]
            await asyncio.sleep(0.05)
            reader, writer = await asyncio.open_connection(*address)
            assert await ended(reader)
            for _, each in [*held, (reader, writer)]:
                each.transport.abort()
            async with ends.link("north", address):
                assert await hub.wait_for(["north"], timeout=10)  # as soon as there is room
        async with ends.hub("north", attempts_a_minute=3) as (_, address):
            for _ in range(4):
                reader, writer = await asyncio.open_connection(*address)
                writer.transport.abort()
            await asyncio.sleep(0.1)

    asyncio.run(main())
    assert "more than 2 connections at once from one address" in logged.text
    assert "more than 3 connections a minute from one address" in logged.text


def test_a_flood_of_connections_does_not_fill_the_log(ends: Any, logged: Any) -> None:
    async def main() -> None:
        async with ends.hub("north", attempts_a_minute=1) as (hub, address):
            for _ in range(200):
                _, writer = await asyncio.open_connection(*address)
                writer.transport.abort()
            await asyncio.sleep(0.2)
            assert hub._unsaid > 0

    asyncio.run(main())
    assert 100 <= logged.text.count("refused 127.0.0.1") < 200


def test_addresses_that_are_none(ends: Any) -> None:
    for wrong in (("", 1), ("a b", 1), ("host\r\nX: y", 1), ("host", 0), ("host", 70000)):
        with pytest.raises(ConfigError, match="expected a host and a port"):
            ends.make_link("north", wrong)
    for proxy in ("https://proxy:1", "http://proxy", "proxy:8080", "http://u:secret@proxy:99999", "http://p:1/x"):
        with pytest.raises(ConfigError, match="proxy: expected http") as caught:
            ends.make_link("north", ("host", 1), proxy=proxy)
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="request_limit"):
        ends.make_link("north", ("host", 1), request_limit=-1)
