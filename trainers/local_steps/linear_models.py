"""What is defined for linear models only: which features a party's records have, and dual coordinate ascent.

A linear model has one module with trainable parameters, a torch.nn.Linear, called once with a batch of shape (n, j).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from choral.trainers.algorithms.interface import Ascend, Done
from choral.trainers.local_steps.record_gradients import Records
from choral.trainers.task.task import TaskError, labels_of


def touched(records: Records) -> torch.Tensor:
    """n_k^j: how many records have feature j, float32 whole numbers, shape (d,); a bias belongs to every record.

    Raises: TaskError for a model that is not linear.
    """
    layer = _linear(records)
    counts = torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device)
    for features, _ in _features(records, layer):
        counts += (features != 0).sum(dim=0)
    pieces = {id(layer.weight): counts.expand(layer.out_features, -1)}
    if layer.bias is not None:
        pieces[id(layer.bias)] = counts.new_full((layer.out_features,), len(records))
    return torch.cat([pieces[id(parameter)].reshape(-1) for parameter in records.layout.parameters]).float()


def ascend(records: Records, weights: torch.Tensor, work: Ascend) -> Done:
    """Stochastic dual coordinate ascent (Shalev-Shwartz and Zhang 2013) on one party's block, as CoCoA+ asks for it.

    Of min 1/n sum_i log(1 + exp(-y_i x_i w)) + lambda/2 |w|^2, with w = 1/(lambda n) sum_i a_i y_i x_i, 0 <= a_i <= 1.
    A bias counts as one more feature, 1, and is regularised too.
    Raises: TaskError unless the model is linear with one output, the labels 0 and 1, and the loss the logistic one.
    """
    matrix, signs = _binary(records, weights)
    dual = work.dual.double().cpu().numpy().copy()
    if dual.shape != (len(records),):
        raise TaskError(f"party {records.party!r} has {len(records)} records and a dual block of shape {dual.shape}")
    scale = work.ridge * work.examples
    here = weights.double().cpu().numpy().copy()
    change = np.zeros_like(here)
    squares = work.slack * np.einsum("ij,ij->i", matrix, matrix) / scale
    for _ in range(work.passes):
        for index in torch.randperm(len(records)).tolist():
            row, sign = matrix[index], signs[index]
            new = coordinate(float(dual[index]), float(sign * (row @ here)), float(squares[index]))
            step = sign * (new - dual[index]) / scale * row
            change += step
            here += work.slack * step
            dual[index] = new
    return Done(vector=torch.from_numpy(change).to(weights), dual=torch.from_numpy(dual))


def coordinate(dual: float, margin: float, square: float) -> float:
    """The maximum over a = sigmoid(t): the root of t + margin + square (sigmoid(t) - dual), which rises with t."""
    low, high = -margin - square * (1.0 - dual), -margin + square * dual
    point = min(max(-margin, low), high)
    for _ in range(60):
        value = 1.0 / (1.0 + math.exp(-point)) if point > -700 else 0.0
        error = point + margin + square * (value - dual)
        if error > 0:
            high = point
        else:
            low = point
        moved = point - error / (1.0 + square * value * (1.0 - value))
        if abs(moved - point) <= 1e-14 * (1.0 + abs(point)):
            break
        point = moved if low < moved < high else (low + high) / 2.0
    return 1.0 / (1.0 + math.exp(-point)) if point > -700 else 0.0


def _linear(records: Records) -> nn.Linear:
    trained = {id(parameter) for parameter in records.layout.parameters}
    owners = [m for m in records.model.modules() if any(id(p) in trained for p in m.parameters(recurse=False))]
    if len(owners) != 1 or not isinstance(owners[0], nn.Linear):
        found = ", ".join(type(module).__name__ for module in owners) or "none"
        raise TaskError(
            f"the algorithm is for linear models; the modules with trainable parameters are {found}",
            hint="expected one torch.nn.Linear; FSVRG(scaled=False) works with any model",
        )
    return owners[0]


def _features(records: Records, layer: nn.Linear) -> Any:
    """Batches of (features, shape (n, j); the records' losses) at the model's present weights."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    try:
        for batch, count in records.batches():
            seen.clear()
            with torch.no_grad():
                losses = records.losses(batch, count)
            if len(seen) != 1 or seen[0].shape != (count, layer.in_features):
                raise TaskError(
                    f"the linear layer saw {[tuple(s.shape) for s in seen]} for {count} records; expected one batch of"
                    f" shape ({count}, {layer.in_features})"
                )
            yield seen[0], losses
    finally:
        handle.remove()


def _binary(records: Records, weights: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Features in the coordinates of the flat vector, float64, shape (n_k, d), and signs +1 or -1, shape (n_k,)."""
    layer, labels = _linear(records), labels_of(records.dataset)
    if layer.out_features != 1 or labels is None or not bool(((labels == 0) | (labels == 1)).all()):
        raise TaskError(
            f"party {records.party!r}: dual ascent is for one output and labels 0 and 1 that can be read",
            hint="a torch.nn.Linear(features, 1) and a TensorDataset whose last tensor has integer labels",
        )
    records.layout.write(weights)
    features, losses = (torch.cat(parts).double().cpu() for parts in zip(*_features(records, layer), strict=True))
    columns = {id(layer.weight): features}
    if layer.bias is not None:
        columns[id(layer.bias)] = features.new_ones(len(features), 1)
    matrix = torch.cat([columns[id(parameter)] for parameter in records.layout.parameters], dim=1)
    signs = 2.0 * labels.double() - 1.0
    expected = torch.nn.functional.softplus(-signs * (matrix @ weights.double().cpu()))
    if not torch.allclose(losses, expected, rtol=1e-3, atol=1e-4):
        raise TaskError(
            f"the loss of party {records.party!r} is not the logistic one, which dual ascent is for",
            hint="binary_cross_entropy_with_logits of the model's output, without a regulariser",
        )
    return matrix.numpy(), signs.numpy()
