"""What the final model is worth at each party, on records that the party held out: asked for, and in the clear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from choral.errors import ConfigError, DataError
from choral.trainers.task.task import EvaluateParty, TaskError, metrics_of

LEAST_RECORDS = 5
NOTE = (
    "Computed from records that each party held out, in the clear and without noise: no privacy promise and no secure"
    " sum covers these numbers. With few records held out, a party's number tells about these records."
)


class PerParty(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model after the last round at each party. note: what it rests on, in words.

    records: held-out records of every party, 0 where there are none. metrics: what ``evaluate_party`` returned, for the
    parties with at least ``least`` of them; a bare number is filed under "accuracy".
    """

    note: str = NOTE
    least: int = LEAST_RECORDS
    records: dict[str, int]
    metrics: dict[str, dict[str, float]]


def check_held_out(
    held_out: Mapping[str, Any] | None,
    evaluate_party: EvaluateParty | None,
    parties: Mapping[str, Any],
    *,
    private: bool,
) -> None:
    """Refuse what cannot give numbers per party; nothing to check where neither argument is given.

    Virtual parties are refused: the numbers are of every party. A training record among the held-out ones is found
    where it can be seen cheaply: the same dataset, the same index of the same dataset, or the same tensors. A copy of
    single records is not.

    Raises: ConfigError for one argument without the other, a name that is no party, fewer than two parties with
        ``LEAST_RECORDS`` held-out records, or held-out records that some party trains on; DataError for a dataset
        without a length.
    """
    if held_out is None and evaluate_party is None:
        return
    if held_out is None or evaluate_party is None:
        missing = "held_out" if held_out is None else "evaluate_party"
        raise ConfigError(
            f"numbers per party need both held_out and evaluate_party; {missing} is not given",
            hint="held_out={'north': dataset, ...} and evaluate_party(model, dataset)",
        )
    if unknown := sorted(held_out.keys() - parties.keys()):
        raise ConfigError(f"held_out names {unknown[0]!r}, which is no party", hint="name the parties as in parties=")
    for name, dataset in held_out.items():
        if not isinstance(dataset, Sized):
            raise DataError(f"held_out of party {name!r} has no length", hint="give it a map-style torch dataset")
    enough = sum(len(dataset) >= LEAST_RECORDS for dataset in held_out.values())
    if enough < 2:
        raise ConfigError(
            f"{enough} of {len(parties)} parties have {LEAST_RECORDS} held-out records or more, expected at least 2",
            hint="hold out more records, or leave the numbers per party out",
        )
    _refuse_training_records(held_out, parties, private)


def per_party_of(
    held_out: Mapping[str, Any] | None,
    evaluate_party: EvaluateParty | None,
    model: nn.Module,
    parties: Mapping[str, Any],
) -> PerParty | None:
    """The model at each party, in eval mode and without gradients; None where it was not asked for.

    Raises: TaskError, as :func:`choral.trainers.task.task.metrics_of` does, naming the party.
    """
    if held_out is None or evaluate_party is None:
        return None
    records = {name: len(held_out.get(name, ())) for name in parties}
    metrics = {
        name: _at(name, held_out[name], evaluate_party, model)
        for name, count in records.items()
        if count >= LEAST_RECORDS
    }
    return PerParty(records=records, metrics=metrics)


def _at(name: str, dataset: Any, evaluate_party: EvaluateParty, model: nn.Module) -> dict[str, float]:
    try:
        return metrics_of(lambda final: evaluate_party(final, dataset), model)
    except TaskError as error:
        raise TaskError(f"evaluate_party at {name!r}: {error}", hint=error.hint) from None


def _refuse_training_records(held_out: Mapping[str, Any], parties: Mapping[str, Any], private: bool) -> None:
    prefixes: dict[int, int] = {}
    chosen: dict[int, set[int]] = {}
    for dataset in parties.values():
        for whole, indices in _parts(dataset):
            if indices is None:
                prefixes[_identity(whole)] = max(prefixes.get(_identity(whole), 0), len(whole))
            else:
                chosen.setdefault(_identity(whole), set()).update(indices)
    for name, dataset in held_out.items():
        for whole, indices in _parts(dataset):
            prefix, among = prefixes.get(_identity(whole), 0), chosen.get(_identity(whole), set())
            held = range(len(whole)) if indices is None else indices
            if not (any(i < prefix or i in among for i in held) or _equal(whole, parties[name])):
                continue
            why = (
                "the privacy promise would not cover a number that is computed from them without noise"
                if private
                else "such a number tells what was learnt by heart"
            )
            raise ConfigError(
                f"held_out of party {name!r} has records that were trained on; {why}",
                hint="hold records back before training, and give these",
            )


def _parts(dataset: Any) -> Iterator[tuple[Any, set[int] | None]]:
    """The datasets that this one is made of, each with the indices that are used, or None for all."""
    indices: list[int] | None = None
    while isinstance(dataset, Subset):
        outer = [int(index) for index in dataset.indices]
        indices = outer if indices is None else [outer[index] for index in indices]
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset) and indices is None:
        for part in dataset.datasets:
            yield from _parts(part)
    else:
        yield dataset, None if indices is None else set(indices)


def _identity(dataset: Any) -> int:
    """The same for two datasets whose records begin at one place in memory."""
    place = dataset.tensors[0].data_ptr() if isinstance(dataset, TensorDataset) else 0
    return place or id(dataset)


def _equal(one: Any, other: Any) -> bool:
    """Whether two datasets are copies of the same tensors."""
    if not (isinstance(one, TensorDataset) and isinstance(other, TensorDataset)) or len(one) == 0:
        return False
    pairs = list(zip(one.tensors, other.tensors, strict=False))
    return all(a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in pairs)
