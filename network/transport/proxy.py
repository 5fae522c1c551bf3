"""The way out: a TCP connection to the coordinator, directly or through an HTTP proxy (CONNECT, RFC 9110).

The proxy sees the coordinator's address and bytes under TLS that it cannot read. One that takes TLS apart to look
inside cannot be passed: the coordinator's certificate is pinned.
"""

from __future__ import annotations

import asyncio
import base64
from urllib.parse import unquote, urlsplit

from choral.errors import ConfigError
from choral.network.errors import ProxyError, TransportError
from choral.network.transport.pinned_tls import READ_AHEAD, Streams

_ANSWER = 8192  # bytes of a proxy's answer that are read


def check_address(address: tuple[str, int]) -> tuple[str, int]:
    """Raises:
    ConfigError: it is no host and port.
    """
    host, port = address
    if not host or any(letter <= " " or letter > "~" for letter in host) or not 0 < port < 65536:
        raise ConfigError(f"expected a host and a port from 1 to 65535, got {host!a:.80} and {port!r}")
    return host, port


def check_proxy(url: str | None) -> None:
    """Raises:
    ConfigError: it is no proxy's address. What may be a password is not repeated.
    """
    if url is None:
        return
    try:
        parts = urlsplit(url)
        fits = parts.scheme == "http" and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError("proxy: expected http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT")


async def dial(address: tuple[str, int], proxy: str | None) -> asyncio.StreamWriter:
    """Connect to `address`, through `proxy` if there is one. What can be read before TLS is nobody's word.

    Raises:
        TransportError: nobody answers there.
        ProxyError: the proxy does not answer, or refuses.
    """
    if proxy is None:
        return (await _open(*address, TransportError, "the coordinator's address"))[1]
    parts = urlsplit(proxy)
    reader, writer = await _open(str(parts.hostname), int(parts.port or 0), ProxyError, "the proxy")
    try:
        host, port = address
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
        writer.write("\r\n".join([*lines, "", ""]).encode())
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
    except (OSError, EOFError, asyncio.LimitOverrunError) as error:
        writer.transport.abort()
        raise ProxyError(f"gave no answer to CONNECT ({type(error).__name__})", peer=_where(proxy)) from None
    except BaseException:
        writer.transport.abort()
        raise
    status = answer.partition(b"\r\n")[0][:80].decode("latin-1").split(" ", 2)
    if len(answer) > _ANSWER or status[0] not in ("HTTP/1.0", "HTTP/1.1") or status[1:2] != ["200"]:
        writer.transport.abort()
        said = " ".join(status)
        raise ProxyError(
            f"answered CONNECT with {said!a}",
            peer=_where(proxy),
            hint="whoever runs the proxy must allow CONNECT to the coordinator's host and port",
        )
    return writer


async def _open(host: str, port: int, kind: type[TransportError], what: str) -> Streams:
    try:
        return await asyncio.open_connection(host, port, limit=READ_AHEAD)
    except OSError as error:
        raise kind(
            f"{what} does not answer ({error.strerror or type(error).__name__})", peer=f"{host}:{port}"
        ) from None


def _where(proxy: str) -> str:
    parts = urlsplit(proxy)
    return f"{parts.hostname}:{parts.port}"
