"""A party whose training is done by an engine's process, by code that this process neither runs nor sees.

The site's process is the party all the same: it holds every message against what was approved, has the key, checks what
it is handed, encodes, masks and signs. What it cannot do is to know what the code did with the data: no promise of
differential privacy is made or kept here, and offers of such jobs are refused where the data has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from choral.network.door.trained import Trained
from choral.network.errors import SiteError
from choral.protocols.driver import Agreed, Answer, NeedsVector, PartyDriver
from choral.protocols.interface import IntVector
from choral.trainers.algorithms.interface import Done, Failed, Train, Work

if TYPE_CHECKING:
    from choral.trainers.federated.terms.training_terms import TrainingTerms


class TrainFirstError(Exception):
    """All is agreed, and a vector is asked for that nobody has trained yet. Nothing has changed: ask again with it."""

    def __init__(self, needs: NeedsVector) -> None:
        super().__init__("nothing was trained yet")
        self.needs = needs


class EngineTrainer:
    """In the place of training: what the engine's process handed in (`LocalTrainer`). examples: how many this site
    has.
    """

    trained: Trained | None = None

    def __init__(self, terms: TrainingTerms, examples: int) -> None:
        self._length, self._examples = sum(math.prod(shape) for shape in terms.shapes.values()), examples

    @property
    def length(self) -> int:
        return self._length

    def do(
        self, orders: Iterable[tuple[str, Work]], weights: torch.Tensor, round_number: int
    ) -> Iterator[tuple[str, Done | Failed]]:
        del round_number
        for name, work in orders:
            try:
                yield name, Done(vector=self._change(weights, work))
            except SiteError as error:
                yield name, Failed(error=error)

    def _change(self, weights: torch.Tensor, work: Work) -> torch.Tensor:
        """w_k - w_t. Raises: SiteError."""
        trained, self.trained = self.trained, None
        if trained is None or not isinstance(work, Train):
            raise SiteError("the engine's process handed in no vector")
        if trained.examples != self._examples:
            raise SiteError(
                f"the engine's process says it trained on {trained.examples} examples, and site.toml says"
                f" {self._examples} records",
                hint="what this site counts for is agreed on: records is what the training reads",
            )
        if len(trained.weights) != 4 * self._length:
            raise SiteError(f"the engine's process handed in {len(trained.weights)} bytes for {self._length} numbers")
        found = torch.from_numpy(np.frombuffer(trained.weights, "<f4").astype(np.float32))
        if not bool(torch.isfinite(found).all()):
            raise SiteError("the engine's process handed in weights that are not finite")
        return found - weights


class PausingDriver:
    """A driver that asks for a vector only once it is there (`PartyDriver`). Raises (`handle`): TrainFirstError."""

    def __init__(self, driver: PartyDriver, trainer: EngineTrainer) -> None:
        self._driver, self._trainer = driver, trainer

    def handle(self, raw: bytes) -> Answer:
        answer = self._driver.handle(raw)
        if isinstance(answer, NeedsVector) and self._trainer.trained is None:
            raise TrainFirstError(answer)
        return answer

    def supply(self, vector: IntVector | torch.Tensor) -> tuple[bytes, ...]:
        return self._driver.supply(vector)

    def decline(self) -> None:
        self._driver.decline()

    def public_state(self) -> bytes:
        return self._driver.public_state()

    def agreed(self) -> Agreed | None:
        return self._driver.agreed()


def wanted_weights(weights: torch.Tensor) -> bytes:
    """As `Trained` has them."""
    return weights.detach().cpu().numpy().astype("<f4").tobytes()
