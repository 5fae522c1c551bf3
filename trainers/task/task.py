"""What is trained: the three functions that a user already has, and the checks on what they return."""

from __future__ import annotations

import inspect
import math
import re
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from choral import nested
from choral.doors import worded
from choral.errors import ChoralError, ConfigError, DataError
from choral.trainers.task import arguments
from choral.trainers.task.initial_weights import InitialWeights
from choral.trainers.task.learning_rate import Schedule

_LONGEST_NAME = 200
_LIBRARY = re.compile(
    r"[/\\](site|dist)-packages[/\\]|^<|^" + re.escape(str(Path(__file__).parents[2]))
)  # not the user's

Built = tuple[nn.Module, torch.optim.Optimizer, Any]
Build = Callable[[Any], Built]
Fit = Callable[..., object]
Loss = Callable[[nn.Module, Any], torch.Tensor]
References = Mapping[str, Mapping[str, float]]
Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]
EvaluateParty = Callable[[nn.Module, Any], "float | Mapping[str, float]"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training job as its user has it: three functions, and one dataset per party.

    parties: name -> map-style dataset; may be given to the call that trains instead. min_classes: fewest classes among
        a party's labels, where these can be read cheaply.
    initial_weights: to start from, in the place of those that ``build`` and the seed make: a state dict, or the path of
        a .safetensors file. schedule: of the optimizer's learning rates from round to round.
    fit: ``fit(model, optimizer, loader)``; a parameter ``round``, if it has one, is the number of the round, from 1.
    loss: ``loss(model, batch) -> losses``, one per record, shape (n,); only algorithms that need gradients call it.
    held_out: the records that each party keeps back, disjoint from ``parties``; evaluate_party: ``evaluate`` on such a
        dataset, ``evaluate_party(model, dataset)``. Both are used only where numbers per party are asked for.
    engine: who computes at the parties, as `Compute` takes it, where this task knows a faster one; it is used where
        settings name the task.
    references: metric -> name -> level to hold the metric against (such as that of always the same answer), computed
        when it is asked for.
    """

    build: Build
    fit: Fit
    evaluate: Evaluate
    parties: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss | None = None
    initial_weights: InitialWeights | None = None
    schedule: Schedule | None = None
    min_classes: int = 2
    held_out: Mapping[str, Any] | None = None
    evaluate_party: EvaluateParty | None = None
    engine: Callable[[Any], Any] | None = None
    references: Callable[[], References] | None = None
    bounds: Sequence[tuple[float, float] | None] | None = None
    standardised: Mapping[str, float | int] | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError for a function that cannot be called as it will be, and values of other types."""
        arguments.function(self.build, "build", "dataset")
        arguments.function(self.fit, "fit", "model, optimizer, loader", optional="round")
        arguments.function(self.evaluate, "evaluate", "model")
        arguments.optional_function(self.loss, "loss", "model, batch")
        arguments.optional_function(self.evaluate_party, "evaluate_party", "model, dataset")
        arguments.optional_function(self.engine, "engine", "resident")
        if self.schedule is not None:
            arguments.instance(self.schedule, "schedule", Schedule, 'Schedule(kind="cosine")')
        least = arguments.whole_number(self.min_classes, "min_classes", 1, "1 allows parties of a single class")
        object.__setattr__(self, "min_classes", least)


def parties_of(task: Task, parties: Any) -> Mapping[str, Any]:
    """The parties that were given, by default the task's own. Raises: ConfigError for anything but a mapping."""
    found = task.parties if parties is None else parties
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"parties is {arguments.shown(found)}, expected a mapping of names to datasets",
            hint="parties={'north': dataset, 'south': dataset}",
        )
    return found


class TaskError(ChoralError):
    """One of the user's functions returned, trained or raised something that the engine cannot use."""


class DivergedError(ChoralError):
    """Training produced NaN or infinite weights. The run keeps its last good round."""


def takes_round(fit: Fit) -> bool:
    """Whether ``fit`` has a parameter of that name."""
    try:
        return "round" in inspect.signature(fit).parameters
    except (TypeError, ValueError):  # of a builtin, which says nothing
        return False


def call(fit: Fit, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, number: int) -> object:
    """Call ``fit`` in round ``number``, which it is told if it asks."""
    return fit(model, optimizer, loader, **({"round": number} if takes_round(fit) else {}))


def raised_by(error: Exception, what: str) -> ChoralError:
    """The error itself if it is of this package, else a TaskError that says what raised it, in which line."""
    if isinstance(error, ChoralError):
        return error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _LIBRARY.search(frame.filename)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    made = TaskError(f"{what} raised {type(error).__name__}: {error}{place}", hint="the task's own code raised this")
    made.__cause__ = error
    return made


def checked_build(build: Build, dataset: Any) -> Built:
    """Call ``build`` and check its result.

    Raises: TaskError if it is not (model, optimizer, loader), if nothing is trainable, if the optimizer holds
    parameters of another model, or has a scheduler; ConfigError for layers whose state cannot be averaged (BatchNorm).
    """
    built = build(dataset)
    if not (isinstance(built, tuple) and len(built) == 3):
        raise TaskError(f"build returned {type(built).__name__}; expected a tuple (model, optimizer, loader)")
    model, optimizer, loader = built
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        got = f"({type(model).__name__}, {type(optimizer).__name__}, {type(loader).__name__})"
        raise TaskError(f"build returned {got}; expected (torch.nn.Module, torch.optim.Optimizer, loader)")
    if not isinstance(loader, Iterable):
        raise TaskError(f"build returned a loader of type {type(loader).__name__}, which cannot be iterated over")
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not own:
        raise TaskError("the model has no trainable parameter")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held & own:
        raise TaskError(
            "the optimizer holds no trainable parameter of the model",
            hint="create the optimizer from the parameters of the model that build returns",
        )
    if not held <= {id(parameter) for parameter in model.parameters()}:
        raise TaskError(
            "the optimizer also holds parameters that are not the model's",
            hint="what is trained must be part of the model that build returns",
        )
    _refuse_batch_norm(model)
    _refuse_scheduler(model, optimizer, loader)
    return model, optimizer, loader


def _refuse_batch_norm(model: nn.Module) -> None:
    """Layers whose running statistics training changes; not those without any, nor those that stay in eval mode."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if not layers:
        return
    modes = {module: module.training for module in model.modules()}
    model.train()
    training = {name for name, module in layers.items() if module.training and module.track_running_stats}
    for module, mode in modes.items():
        module.training = mode
    for name, module in layers.items():
        if name not in training:
            continue
        if module.affine and not any(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError(
                f"layer {name!r} is {type(module).__name__} with frozen weights, but model.train() puts it in training"
                " mode, where its running statistics change, which cannot be averaged between parties",
                hint="keep it in eval mode: override train(mode) of the model; or use torch.nn.GroupNorm",
            )
        raise ConfigError(
            f"layer {name!r} is {type(module).__name__}: its running statistics mix the records of a batch"
            " and cannot be averaged between parties",
            hint="replace it by torch.nn.GroupNorm; accuracy is usually within a point",
        )


def _refuse_scheduler(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    attached = any("initial_lr" in group for group in optimizer.param_groups)
    holders = [optimizer, loader, *model.modules()]
    held = (value for holder in holders for value in getattr(holder, "__dict__", {}).values())
    if attached or any(isinstance(value, torch.optim.lr_scheduler.LRScheduler) for value in held):
        raise TaskError(
            "build attached a learning-rate scheduler, whose state no round hands on to the next: it would be undone at"
            " the parties and go on in the cloud",
            hint="give schedule=Schedule(kind=...) ([training.schedule] in settings), let fit take the number of the"
            " round, fit(model, optimizer, loader, round), or make the scheduler in fit for the steps of one round",
        )


def check_returned(returned: object, models: tuple[nn.Module, ...], party: str) -> None:
    """What ``fit`` returns is not used; a few things show that it did not do what it should.

    Raises: TaskError for a generator or coroutine (nothing ran), or a model that is none of ``models``.
    """
    if returned is None:  # as usual: what follows asks abstract classes
        return
    if isinstance(returned, Generator | Coroutine | AsyncGenerator):
        if isinstance(returned, Generator | Coroutine):
            returned.close()
        raise TaskError(
            f"fit at party {party!r} returned a {type(returned).__name__}: nothing of it has run",
            hint="fit must be a plain function, without yield or async",
        )
    if isinstance(returned, nn.Module) and all(returned is not model for model in models):
        raise TaskError(
            f"fit at party {party!r} returned another model than it was given", hint="train the given model in place"
        )


def metrics_of(evaluate: Evaluate, model: nn.Module) -> dict[str, float]:
    """Call ``evaluate`` on the model in eval mode, without gradients; a bare number is filed under "accuracy".

    An infinite number is recorded as the largest that there is.
    Raises: TaskError if the result is neither a number nor a mapping of names to numbers, or one is NaN.
    """
    model.eval()
    with torch.no_grad():
        result = evaluate(model)
    named = result if isinstance(result, Mapping) else {"accuracy": result}
    try:
        metrics = {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError):
        raise TaskError(
            f"evaluate returned {type(result).__name__}; expected a number, or a dict of names to numbers"
        ) from None
    for name, value in metrics.items():
        if math.isnan(value):
            raise TaskError(f"evaluate returned {value} for {name!r}; expected a finite number")
        if math.isinf(value):  # as a perplexity before any training; files of JSON have no infinity
            metrics[name] = math.copysign(sys.float_info.max, value)
    if not metrics:
        raise TaskError("evaluate returned no metric")
    return metrics


def check_parties(parties: Mapping[str, Any], *, least: int, min_classes: int) -> dict[str, int]:
    """The number of examples of each party.

    Raises: ConfigError for fewer than ``least`` parties; DataError for a party without a length, without records,
    or whose labels (where they can be read cheaply) have fewer than ``min_classes`` classes.
    """
    if len(parties) < least:
        raise ConfigError(
            f"expected at least {least} parties, got {len(parties)}",
            hint="for one data owner use "
            + worded(command="--centralized (choral train)", python="Privacy.wrap or centralize"),
        )
    return {name: check_party(name, dataset, min_classes) for name, dataset in parties.items()}


def check_party(name: str, dataset: Any, min_classes: int) -> int:
    """The number of examples of one party. Raises: as :func:`check_parties`."""
    if not name or not isinstance(name, str):
        raise ConfigError(f"party names must be non-empty strings, got {name!r}", hint="e.g. 'north'")
    if not name.isprintable() or len(quote(name, safe="")) > _LONGEST_NAME:
        raise ConfigError(
            f"party name {name[:40]!r} is too long or not printable", hint="ledgers are files of that name"
        )
    try:
        examples = len(dataset)
    except TypeError:  # of what has no length, and of a tensor that is a number
        raise DataError(
            f"party {name!r} has a dataset without a length", hint="give it a map-style torch dataset"
        ) from None
    if not examples:
        raise DataError(f"party {name!r} has no records", hint="leave it out, or change the split")
    labels = None if min_classes == 1 else labels_of(dataset)
    if labels is None or (min_classes == 2 and bool((labels != labels[:1]).any())):  # a seventh of what unique takes
        return examples
    if (classes := len(torch.unique(labels))) < min_classes:
        raise DataError(
            f"party {name!r} has {classes} class in {examples} records; expected at least {min_classes}",
            hint="raise the split's alpha, merge parties, or allow it with "
            + worded(command="--split.min-classes 1", python="min_classes=1"),
        )
    return examples


def labels_of(dataset: Any) -> torch.Tensor | None:
    """Integer class labels, shape (n,), if the dataset shows them without reading each record; else None."""
    if isinstance(dataset, torch.utils.data.Subset):
        whole = labels_of(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices)]
    is_tensors = isinstance(dataset, torch.utils.data.TensorDataset)
    labels = dataset.tensors[-1] if is_tensors else getattr(dataset, "targets", None)
    if not isinstance(labels, torch.Tensor | list):
        return None
    labels = torch.as_tensor(labels)
    return labels if labels.ndim == 1 and not labels.is_floating_point() else None


def raw_bytes(dataset: Any) -> int:
    """Size of the raw examples, in bytes: as the dataset says, else that of the first one times the length."""
    if isinstance(own := getattr(dataset, "nbytes", None), int):
        return own
    return len(dataset) * _size(dataset[0])


def _size(item: Any) -> int:
    return sum(map(_size_of_leaf, nested.leaves(item, packed=True)))


def _size_of_leaf(item: Any) -> int:
    if isinstance(item, str):
        return len(item.encode())
    return len(item) if isinstance(item, bytes) else int(getattr(item, "nbytes", 8))
