"""Signed JSON as a line of text: what is signed is the bytes that stand in the file, so that nobody has to write them
anew to check them.

    {"receipt":BODY,"signature":"128 hexadecimal digits"}

The signature is Ed25519 (RFC 8032) over ``PURPOSE[kind] + BODY``. BODY is ASCII JSON without a line break, each key
once, without NaN; what else it may hold is its format's matter.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from choral.errors import ChoralError
from choral.protocols.crypto.identity import Identity
from choral.protocols.crypto.keys import ed25519_sign, ed25519_verify

PURPOSE = {"receipt": b"choral receipt 1\n", "manifest": b"choral manifest 1\n"}
START = "0" * 64
"""In place of the digest of the line before the first."""


class EvidenceError(ChoralError):
    """A receipt or a manifest is damaged, edited, forged, or of another version."""


def body_of(content: Any) -> bytes:
    """Raises: EvidenceError for what JSON cannot hold."""
    try:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise EvidenceError(f"this cannot be written as evidence: {error}") from None


def sign(kind: str, body: bytes, identity: Identity) -> str:
    return ed25519_sign(identity.seed, PURPOSE[kind] + body).hex()


def signed_by(kind: str, body: bytes, signature: object, key: object) -> bool:
    """Whether this is the signature of that key on that body; False for what is no signature or no key."""
    try:
        return ed25519_verify(bytes.fromhex(str(key)), PURPOSE[kind] + body, bytes.fromhex(str(signature)))
    except (ValueError, ChoralError):
        return False


def line_of(body: bytes, identity: Identity) -> bytes:
    """A receipt's line, without its line break."""
    return b'{"receipt":' + body + b',"signature":"' + sign("receipt", body, identity).encode() + b'"}'


def parsed(line: bytes) -> tuple[dict[str, Any], bytes, str]:
    """Content, body and signature of a receipt's line; the signature is not checked. Raises: EvidenceError."""
    body, mark, rest = line.removeprefix(b'{"receipt":').rpartition(b',"signature":"')
    if not line.startswith(b'{"receipt":') or not mark or len(rest) != 130 or not rest.endswith(b'"}'):
        raise EvidenceError("a line that is no receipt")
    return content_of(body), body, rest[:-2].decode("ascii", "replace")


def content_of(body: bytes) -> dict[str, Any]:
    """Raises: EvidenceError for anything else than one JSON object with each key once."""
    try:
        content = json.loads(body, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"no JSON of ours: {error}") from None
    if not isinstance(content, dict):
        raise EvidenceError("a receipt or manifest is an object")
    return content


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")
