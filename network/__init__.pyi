"""The public names of this package; `__init__.py` fetches each when it is first used."""

from choral.network.errors import BusyError as BusyError
from choral.network.errors import CertificateError as CertificateError
from choral.network.errors import FrameError as FrameError
from choral.network.errors import MessageTooLargeError as MessageTooLargeError
from choral.network.errors import PeerFailedError as PeerFailedError
from choral.network.errors import PeerLostError as PeerLostError
from choral.network.errors import ProxyError as ProxyError
from choral.network.errors import RefusedError as RefusedError
from choral.network.errors import RequestTimeoutError as RequestTimeoutError
from choral.network.errors import TransportError as TransportError
from choral.network.errors import UnknownPeerError as UnknownPeerError
from choral.network.errors import WrongPeerError as WrongPeerError
from choral.network.transport.answering import Request as Request
from choral.network.transport.blocking import BlockingHub as BlockingHub
from choral.network.transport.certificates import Certificate as Certificate
from choral.network.transport.certificates import CertifiedIdentity as CertifiedIdentity
from choral.network.transport.certificates import make_identity as make_identity
from choral.network.transport.certificates import read_certificate as read_certificate
from choral.network.transport.directory import Directory as Directory
from choral.network.transport.hub import Hub as Hub
from choral.network.transport.limits import Limits as Limits
from choral.network.transport.link import Link as Link
