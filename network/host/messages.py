"""What a coordinator and a site say to each other: one request, one reply, both bounded before they are read.

    request       what for                                                            reply
    ProposeJob    a job, as an offer                                                  JobTaken, JobRefused
    TakeStep      one message of a sum; with it, if it is new, the exchange of it     StepTaken, TellAgain, StillBusy,
                                                                                      JobUnknown
    EndJob        nothing more is coming; the model that came of the last round       JobOver
    SignRun       the run's manifest, to be signed                                    RunSigned

Every request has the offer's digest, so that none is taken for another job's. A request may come twice: the drivers
give the same bytes the same answer, and the rest changes nothing the second time.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from choral.network.errors import OfferError
from choral.network.site.offer import LARGEST_OFFER

_MAGIC = b"choral site 1\n"
Digest = Annotated[str, Meta(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
Name = Annotated[str, Meta(max_length=64)]
_SMALL = 1 << 16
_REASON = "these bytes are no message between a coordinator and a site"


class ExchangeEnded(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the latest exchange ended that the site was told of. survived: its vector is in the sum. failed: and the
    round of it came to nothing.
    """

    number: Count
    exchange: Count
    survived: bool
    failed: bool


class ProposeJob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    offer: bytes


class TakeStep(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """told: the exchange that the message is of (`Told.message`); empty where the site was told of it before."""

    job: Digest
    channel: Name
    message: bytes
    told: bytes = b""
    past: ExchangeEnded | None = None


class EndJob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """model: digest of the one that came of round ``completed``, as receipts have it."""

    job: Digest
    past: ExchangeEnded | None
    completed: Count
    model: Digest


class SignRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """manifest: what is to be signed, as it will stand in the file."""

    job: Digest
    manifest: bytes


class JobTaken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The site has agreed, and is ready. made: anew for each party in memory, so that a restart can be told."""

    job: Digest
    made: Annotated[bytes, Meta(min_length=8, max_length=8)]


class JobRefused(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """No. Why is for the site to know."""


class JobUnknown(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The site knows of no such job: it was started anew, and wants to be asked again."""


class StepTaken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """parts: what the driver sends back, maybe nothing."""

    parts: Annotated[tuple[bytes, ...], Meta(max_length=1 << 16)] = ()


class JobOver(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """What the site has of the job's receipts: their number, the digest of the last, the keys that signed them."""

    receipts: Count
    head: Digest
    keys: Annotated[tuple[Digest, ...], Meta(min_length=1, max_length=64)]


class RunSigned(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    signature: Annotated[str, Meta(pattern="^[0-9a-f]{128}$")]


class StillBusy(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """It is at work on an earlier message, for which nobody waits any longer. It is out of this round, no more."""


class TellAgain(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """The exchange goes on from tensors that this site has not, for it was started anew: it wants them told."""


ToSite = ProposeJob | TakeStep | EndJob | SignRun
FromSite = JobTaken | JobRefused | JobUnknown | StepTaken | StillBusy | TellAgain | JobOver | RunSigned
_to_site: msgspec.msgpack.Decoder[ToSite] = msgspec.msgpack.Decoder(ToSite)
_from_site: msgspec.msgpack.Decoder[FromSite] = msgspec.msgpack.Decoder(FromSite)
T = TypeVar("T")


def written(message: ToSite | FromSite) -> bytes:
    return _MAGIC + msgspec.msgpack.encode(message)


def read_request(raw: bytes | memoryview, *, limit: int) -> ToSite:
    """What a coordinator asks. Raises: OfferError for anything else, or more bytes than agreed."""
    return _read(raw, _to_site, limit)


def read_reply(raw: bytes | memoryview, *, limit: int) -> FromSite:
    """What a site answers. Raises: OfferError for anything else, or more bytes than can be."""
    return _read(raw, _from_site, limit)


def _read(raw: bytes | memoryview, decoder: msgspec.msgpack.Decoder[T], limit: int) -> T:
    view = memoryview(raw)
    if len(view) > limit:
        raise OfferError(f"a message of {len(view)} bytes, expected at most {limit}")
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise OfferError(_REASON, hint="the other end may run another version of Choral")
    try:
        return decoder.decode(view[len(_MAGIC) :])
    except msgspec.MsgspecError:
        raise OfferError(_REASON) from None


def largest_offer() -> int:
    """Bytes of a request before anything is agreed on."""
    return LARGEST_OFFER + _SMALL


def largest_step(told: int, parties: int) -> int:
    """Bytes of a request once a model is agreed on. told: of an exchange at most. parties: in the roster."""
    return max(largest_offer(), told + 4096 * parties + _SMALL)


def largest_reply(length: int, parties: int) -> int:
    """Bytes of a reply: a vector of so many coordinates, as a ciphertext, or keys and shares for all parties."""
    return 32 * length + 4096 * parties + (1 << 22)
