"""The public names of this package; `__init__.py` fetches each when it is first used."""

from choral.audits import ReportError as ReportError
from choral.audits import audit as audit
from choral.audits import compare as compare
from choral.errors import ChoralError as ChoralError
from choral.errors import ConfigError as ConfigError
from choral.errors import DataError as DataError
from choral.locks import NoLocksError as NoLocksError
from choral.privacy import AccountingError as AccountingError
from choral.privacy import AdaptiveClip as AdaptiveClip
from choral.privacy import BudgetExceededError as BudgetExceededError
from choral.privacy import ClientPrivacy as ClientPrivacy
from choral.privacy import CorrelatedPrivacy as CorrelatedPrivacy
from choral.privacy import LedgerError as LedgerError
from choral.privacy import PerLayerClip as PerLayerClip
from choral.privacy import Privacy as Privacy
from choral.privacy import PrivacyError as PrivacyError
from choral.privacy import Spent as Spent
from choral.privacy import UnsupportedLoaderError as UnsupportedLoaderError
from choral.privacy import UnsupportedModelError as UnsupportedModelError
from choral.protocols import Grouped as Grouped
from choral.protocols import Homomorphic as Homomorphic
from choral.protocols import Masked as Masked
from choral.protocols import Plain as Plain
from choral.protocols import Policy as Policy
from choral.protocols import PolicyError as PolicyError
from choral.protocols import ProtocolError as ProtocolError
from choral.trainers import Compute as Compute
from choral.trainers import Encoding as Encoding
from choral.trainers import Keep as Keep
from choral.trainers import Participation as Participation
from choral.trainers import Run as Run
from choral.trainers import RunFolderError as RunFolderError
from choral.trainers import Task as Task
from choral.trainers import TaskError as TaskError
from choral.trainers import centralize as centralize
from choral.trainers import federate as federate
from choral.trainers import federated_statistics as federated_statistics

__version__: str
