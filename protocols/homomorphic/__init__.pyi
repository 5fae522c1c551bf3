"""The public names of this package; `__init__.py` fetches each when it is first used."""

from choral.protocols.homomorphic.front import Homomorphic as Homomorphic
from choral.protocols.homomorphic.shared.float_sum import FloatResult as FloatResult
from choral.protocols.homomorphic.shared.float_sum import FloatSpec as FloatSpec
from choral.protocols.homomorphic.shared.float_sum import FloatSum as FloatSum
