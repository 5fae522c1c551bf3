"""Errors of the network: what could not be carried, and whose end it is about.

| type | what happened |
|---|---|
| CertificateError | a certificate, a key file or a directory of certificates cannot be used as it is |
| UnknownPeerError | a name that is not in the directory |
| WrongPeerError | the other end is not the one that was called: its certificate is another |
| RefusedError | the other end turned this one away |
| PeerLostError | the connection is gone, or was never there in the time given |
| RequestTimeoutError | the other end is connected and has not answered in the time given |
| MessageTooLargeError | a message beyond the bound that was set for it |
| FrameError | bytes that are no frames of this transport |
| BusyError | more requests at once than agreed |
| PeerFailedError | the other end's handler stopped with an error, which it keeps for itself |
| ProxyError | the proxy did not open the way |
| SiteError | a file of a site cannot be used as it is: its settings, directory, log or their permissions |
| OfferError | what a coordinator sent is no offer of a job |
| OfferRefusedError | a site does not agree to a job. Why is for the site's own log |
"""

from __future__ import annotations

from collections.abc import Sequence

from choral.errors import ChoralError


class TransportError(ChoralError):
    """A message was not carried. peer: the name of the other end, or its address, or "" if it is about this end."""

    def __init__(self, message: str, *, peer: str = "", hint: str = "") -> None:
        super().__init__(f"{peer}: {message}" if peer else message, hint=hint)
        self.peer = peer


class CertificateError(TransportError):
    """A certificate, a key file or a directory of certificates cannot be used as it is."""


class UnknownPeerError(TransportError):
    """A name that is not in the directory, or no longer."""


class WrongPeerError(TransportError):
    """The other end is not the one that was called: its certificate is not the one in the directory."""


class RefusedError(TransportError):
    """The other end turned this one away. code: the reason in one word, "" if it gave none."""

    def __init__(self, message: str, *, peer: str = "", code: str = "", hint: str = "") -> None:
        super().__init__(message, peer=peer, hint=hint)
        self.code = code


class PeerLostError(TransportError):
    """The connection is gone, or was never there in the time given."""


class RequestTimeoutError(TransportError):
    """The other end is connected and has not answered in the time given."""


class MessageTooLargeError(TransportError):
    """A message beyond the bound that was set for it. Nothing of it is used."""


class FrameError(TransportError):
    """Bytes that are no frames of this transport, or frames in an order that it does not have."""


class BusyError(TransportError):
    """More requests at once than agreed."""


class PeerFailedError(TransportError):
    """The other end's handler stopped with an error. What it was stands in the log of that end and nowhere else."""


class ProxyError(TransportError):
    """The proxy did not open the way to the coordinator."""


class SiteError(ChoralError):
    """A file of a site cannot be used as it is: its settings, its directory, its log, or their permissions."""


class OfferError(ChoralError):
    """What a coordinator sent is no offer of a job."""


class OfferRefusedError(ChoralError):
    """A site does not agree to a job. reasons: each, for the site's own log and screen; a coordinator gets none."""

    def __init__(self, reasons: Sequence[str], *, hint: str = "") -> None:
        super().__init__("; ".join(reasons), hint=hint)
        self.reasons = tuple(reasons)
