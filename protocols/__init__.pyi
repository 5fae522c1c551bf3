"""The public names of this package; `__init__.py` fetches each when it is first used."""

from choral.protocols.errors import DisputedSharesError as DisputedSharesError
from choral.protocols.errors import FaultyPartyError as FaultyPartyError
from choral.protocols.errors import FaultyPartyOrServerError as FaultyPartyOrServerError
from choral.protocols.errors import FaultyServerError as FaultyServerError
from choral.protocols.errors import GarbledSumError as GarbledSumError
from choral.protocols.errors import InputError as InputError
from choral.protocols.errors import KeyDisputeError as KeyDisputeError
from choral.protocols.errors import LateVectorError as LateVectorError
from choral.protocols.errors import MessageError as MessageError
from choral.protocols.errors import PolicyError as PolicyError
from choral.protocols.errors import ProtocolError as ProtocolError
from choral.protocols.errors import SpecError as SpecError
from choral.protocols.errors import StateUsedError as StateUsedError
from choral.protocols.errors import TooFewSurvivorsError as TooFewSurvivorsError
from choral.protocols.homomorphic import Homomorphic as Homomorphic
from choral.protocols.interface import SecureSum as SecureSum
from choral.protocols.interface import SumResult as SumResult
from choral.protocols.interface import SumRound as SumRound
from choral.protocols.interface import SumSession as SumSession
from choral.protocols.interface import SumSpec as SumSpec
from choral.protocols.masking.in_process import Masked as Masked
from choral.protocols.masking.policy import Policy as Policy
from choral.protocols.plain import Plain as Plain
