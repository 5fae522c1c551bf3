"""What of the user's objects may change in a round: the weights, and nothing that would be lost without a word.

In a federation every party's optimizer begins each round as ``build`` made it, parties share one model, and a run that
is resumed makes all objects anew. So what else ``fit`` changes in them would be kept in one arm and lost in another.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from choral.trainers.task.task import TaskError

_log = logging.getLogger("choral.trainers")
_SETTINGS = ("lr", "momentum", "weight_decay", "betas")
_Numbers = Mapping[tuple[str, str], tuple[Any, Any]]


class Groups:
    """The optimizer's settings as ``build`` made them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._made = [
            {name: _copied(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._begun = [{name: made[name] for name in _SETTINGS if name in made} for made in self._made]
        self._now = self._begun

    def _as_made(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether every setting is the very one that is kept, and none more is there. Of what can change within, such
        as a rate in a tensor, a copy is kept, which is never that.
        """
        return all(
            len(group) == len(made) + 1 and all(map(is_, map(group.get, made), made.values()))
            for group, made in zip(optimizer.param_groups, self._made, strict=False)
        )

    def begin(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        """Put them back, the learning rates times the round's factor. Raises: TaskError if there is no rate."""
        if factor == 1.0 and len(optimizer.param_groups) == len(self._made) and self._as_made(optimizer):
            self._now = self._begun
            return
        for group, made in zip(optimizer.param_groups, self._made, strict=True):
            for name in group.keys() - made.keys() - {"params"}:
                del group[name]
            group.update({name: _copied(value) for name, value in made.items()})
            if factor != 1.0:
                if "lr" not in group:
                    raise TaskError(
                        f"the schedule has no learning rate to change in a {type(optimizer).__name__}",
                        hint="leave out the schedule, or let fit take the number of the round",
                    )
                group["lr"] = group["lr"] * factor
        self._now = [
            {name: _copied(group[name]) for name in _SETTINGS if name in group} for group in optimizer.param_groups
        ]

    def check(self, optimizer: torch.optim.Optimizer, party: str) -> None:
        """Raises: TaskError for a setting that ``fit`` left changed, but by a scheduler that it made itself."""
        if self._now is self._begun and self._as_made(optimizer):
            return
        for group, before in zip(optimizer.param_groups, self._now, strict=False):
            for name, value in before.items():
                if "initial_lr" not in group and group.get(name) != value:
                    raise TaskError(
                        f"fit at {party} left the optimizer's {name} at {group.get(name)}, and began at {value}: the"
                        " next round begins there again",
                        hint="give schedule=Schedule(kind=...), or let fit take the number of the round,"
                        " fit(model, optimizer, loader, round), and put it back at its end",
                    )


def _copied(value: Any) -> Any:
    """A deep copy; of what cannot change, itself, which is most of it."""
    return value if isinstance(value, int | float | str | None) else copy.deepcopy(value)


class Attributes:
    """Numbers that are attributes of the user's modules, as they were before any training."""

    def __init__(self, model: nn.Module) -> None:
        self._before = _numbers(dict(model.named_modules()))

    def settle(self, party: str, *, takes_round: bool) -> None:
        """Put back what ``fit`` changed. Raises: TaskError unless it is told the round, and so can set them anew."""
        changed = [
            (owner, name, before, getattr(owner, name, None))
            for (_, name), (owner, before) in self._before.items()
            if getattr(owner, name, None) != before
        ]
        for owner, name, before, _ in changed:
            setattr(owner, name, before)
        if changed and not takes_round:
            owner, name, before, now = changed[0]
            raise TaskError(
                f"fit at {party} changed {name!r} of the model's {type(owner).__name__} from {before} to {now}: it is"
                " no part of what is summed, the next party would see it, and a resumed run would not",
                hint="make it a trainable parameter, or let fit take the number of the round,"
                " fit(model, optimizer, loader, round), and set it from that",
            )


class Watched:
    """Numbers that are attributes of the user's dataset, sampler or collate object: named on the log if they change."""

    def __init__(self, dataset: Any, loader: Any) -> None:
        sampler = loader.sampler if isinstance(loader, DataLoader) else None
        self._before = _numbers({"dataset": dataset, "loader": loader, "sampler": sampler})

    def tell(self, party: str) -> bool:
        """Whether something changed, and so was told."""
        for (place, name), (owner, before) in self._before.items():
            if (now := getattr(owner, name, None)) != before:
                _log.warning(
                    "fit at %s changed %r of its %s from %s to %s: a resumed run begins with %s again; fit can take the"
                    " number of the round, fit(model, optimizer, loader, round)",
                    *(party, name, place, before, now, before),
                )
                return True
        return False


def _numbers(owners: Mapping[str, Any]) -> _Numbers:
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    for place, owner in owners.items():
        if type(owner).__module__.partition(".")[0] in ("torch", "choral", "builtins", "transformers", "torchvision"):
            continue
        for name, value in getattr(owner, "__dict__", {}).items():
            if type(value) in (int, float) or (type(value) is bool and name != "training"):
                found[place, name] = owner, value
    return found
