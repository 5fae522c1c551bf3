"""The local subproblem of FSVRG and DANE, on a party's records: a stochastic way and an exact one."""

from __future__ import annotations

import math

import torch

from choral.trainers.algorithms.interface import Minimise, Svrg
from choral.trainers.local_steps import linear_models as linear
from choral.trainers.local_steps.record_gradients import Records
from choral.trainers.task.task import TaskError

_NEWTON_STEPS = 50
_TOLERANCE = 1e-6  # of the slope, relative to the gradients that it is a difference of: what float32 can show
_ACCEPTED = 1e-3  # relative to where it started


def svrg(records: Records, weights: torch.Tensor, work: Svrg) -> torch.Tensor:
    """Variance-reduced steps record by record (Johnson and Zhang 2013); return w_k - w_t. See :class:`Svrg`."""
    here = weights.clone()
    direction = work.direction.to(here)
    scale = None
    if work.shares is not None:
        own = linear.touched(records).to(here) / len(records)
        scale = torch.where(own > 0, work.shares.to(here) / own.clamp(min=1e-30), 1.0)
    for _ in range(work.passes):
        for index in torch.randperm(len(records)).tolist():
            batch = records.batch([index])
            records.layout.write(here)
            difference = records.gradient_here(batch, 1)
            records.layout.write(weights)
            difference -= records.gradient_here(batch, 1)
            if scale is not None:
                difference *= scale
            here -= work.step * (difference + direction + work.pull * (here - weights))
    return here - weights


def minimise(records: Records, weights: torch.Tensor, work: Minimise) -> torch.Tensor:
    """Damped Newton steps by conjugate gradients; return w_k - w_t. See :class:`Minimise`.

    Steps are judged by the gradient's norm alone: values in float32 show a minimum only to half as many digits.
    Raises: TaskError if the party's objective is not convex here, or has no minimum that is found.
    """
    anchor, direction = records.gradient(weights).double(), work.direction.double().to(weights.device)

    def slope(change: torch.Tensor) -> torch.Tensor:
        here = (weights.double() + change).to(weights.dtype)
        return records.gradient(here).double() - anchor + direction + work.pull * change

    change = torch.zeros_like(anchor)
    residual = slope(change)
    started = float(residual.norm())
    floor = _TOLERANCE * float(anchor.norm() + direction.norm())
    for _ in range(_NEWTON_STEPS):
        if float(residual.norm()) <= floor:
            break
        here = (weights.double() + change).to(weights.dtype)
        step = _conjugate_gradients(records, here, work.pull, -residual)
        length = 1.0
        while length > 1e-4 and not float(slope(change + length * step).norm()) < float(residual.norm()):
            length /= 2
        if length <= 1e-4:
            break
        change = change + length * step
        residual = slope(change)
    if not (math.isfinite(started) and float(residual.norm()) <= max(_ACCEPTED * started, 10 * floor)):
        raise TaskError(
            f"the local problem of party {records.party!r} has no minimum that was found",
            hint="the exact solver is for convex losses; give a larger mu or ridge, or solve it inexactly",
        )
    return change.to(weights.dtype)


def _conjugate_gradients(records: Records, weights: torch.Tensor, pull: float, target: torch.Tensor) -> torch.Tensor:
    """Solve (Hessian + pull) x = target to 1e-4; raises TaskError where the curvature is negative."""
    solution, residual = torch.zeros_like(target), target.clone()
    direction, square = residual.clone(), float(residual @ residual)
    goal = 1e-8 * square
    for _ in range(min(len(target), 250)):
        curved = records.curvature(weights, direction) + pull * direction
        along = float(direction @ curved)
        if along < -1e-6 * float(direction @ direction):
            raise TaskError(
                f"the loss of party {records.party!r} is not convex at these weights",
                hint="the exact solver is for convex losses; solve it inexactly",
            )
        if along <= 0.0:
            break
        solution += square / along * direction
        residual -= square / along * curved
        new = float(residual @ residual)
        if new <= goal:
            break
        direction, square = residual + new / square * direction, new
    return solution if solution.any() else target
