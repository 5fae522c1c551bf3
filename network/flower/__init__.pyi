"""The public names of this package; `__init__.py` fetches each when it is first used."""

from choral.jobs.engines.flower_job import serve as serve
from choral.jobs.engines.flower_strategy import Secure as Secure
from choral.network.flower.mod import secure_sum_mod as secure_sum_mod
