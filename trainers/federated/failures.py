"""What is said of parties and rounds that fail: which party, which parameter, for what reason, what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from choral.errors import ChoralError
from choral.privacy import EncodingError
from choral.protocols.errors import TooFewSurvivorsError
from choral.trainers.algorithms.interface import LocalTrainer
from choral.trainers.task.task import DivergedError, TaskError


def kind_of(error: ChoralError) -> str:
    """How a party's training failed, in words that hold nothing of data or code."""
    if isinstance(error, DivergedError):
        return "its training diverged"
    return "its update cannot be encoded" if isinstance(error, EncodingError) else "its training failed"


def beyond(
    error: EncodingError, vector: torch.Tensor, where: str, shapes: Mapping[str, tuple[int, ...]]
) -> EncodingError:
    """The same error with the place of the largest coordinate, and the setting that bounds it."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    place, name = int(vector.abs().nan_to_num(torch.inf).argmax()), "the last number"
    place %= max(sum(sizes.values()), 1) if len(vector) % max(sum(sizes.values()), 1) == 0 else len(vector)
    for candidate, size in sizes.items():
        if place < size:
            name = repr(candidate)
            break
        place -= size
    return EncodingError(
        f"{where}: {error} (in {name})",
        hint="raise secure_sum.value_bound (in Python Encoding(value_bound=...)), the same for all parties, or lower"
        " the learning rate; docs/secure-sums.md says how to find a bound on public data",
    )


def all_failed(errors: Mapping[str, ChoralError], number: int) -> ChoralError:
    """What ends a run of which no party could train: the error that they have in common, with each one's reason.

    Where some diverged and others' updates were too large, that is divergence.
    """
    first = next(iter(errors.values()))
    kinds = {type(error) for error in errors.values()}
    kind = kinds.pop() if len(kinds) == 1 else TaskError
    if DivergedError in kinds and kinds <= {DivergedError, EncodingError}:
        kind = DivergedError
    made = kind(f"no party could train in round {number}: {_reasons(errors)}", hint=first.hint)
    made.__cause__ = first.__cause__ or first
    return made


def with_reasons(error: ChoralError, errors: Mapping[str, ChoralError]) -> ChoralError:
    """The error, and why parties failed that are missing."""
    if not errors or not isinstance(error, TooFewSurvivorsError):
        return error
    what = f"training failed at {len(errors)} parties ({_reasons(errors)}), so that too few are left"
    return TooFewSurvivorsError(
        what, survivors=error.survivors, needed=error.needed, missing=error.missing, hint=error.hint
    )


def _reasons(errors: Mapping[str, ChoralError]) -> str:
    said = "; ".join(f"{name}: {error}" for name, error in list(errors.items())[:10])
    return said + (f"; and {len(errors) - 10} more" if len(errors) > 10 else "")


def nothing_made(trainer: LocalTrainer, name: str) -> TaskError:
    return TaskError(
        f"the engine {type(trainer).__name__} made nothing of the work of party {name!r}",
        hint="LocalTrainer.do yields one result per order",
    )
