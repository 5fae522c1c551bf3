"""Where parties run: one after the other, as stacks of models, over processes."""

from __future__ import annotations

from choral.trainers.engines.cohort import Cohort
from choral.trainers.engines.direct import Direct
from choral.trainers.engines.fastest import Fastest
from choral.trainers.engines.sharded import ProcessError

__all__ = ["Cohort", "Direct", "Fastest", "ProcessError"]
