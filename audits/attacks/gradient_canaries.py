"""Canaries in gradient space, beside the user's own records, in the user's own private training: white box, one run.

    canaries = GradientCanaries(model, inputs, labels, canaries=1000)
    optimizer = torch.optim.SGD(canaries.model.parameters(), lr=0.5)
    canaries.watch(optimizer)
    model, optimizer, loader = privacy.wrap(canaries.model, optimizer, DataLoader(canaries.dataset, batch_size=256))
    ...  # train as ever, with the mean of a loss per record
    found = canaries.audit(privacy.spent(), batch_size=256)

A canary's gradient is far longer than the clipping norm and lies in a coordinate of its own, which no other record
touches: what it adds to a step is one clipping norm there, or nothing. The model is trained on as many more records;
its outputs on real ones are its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from choral.audits.attacks.canaries import flip_coins
from choral.audits.attacks.score_audit import audit_scores
from choral.audits.lower_bounds.separation import likelihood_scores, white_box_bound
from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.audits.findings.evidence import ScoreAudit
    from choral.privacy import Spent

_LOUD = 1000.0


class GradientCanaries:
    """A classifier and its records with canaries beside them. inputs: shape (records, ...); labels: (records,).

    Raises: ConfigError (fewer than 20 canaries, or unlike numbers of inputs and labels).
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, *, canaries: int) -> None:
        if canaries < 20 or len(inputs) != len(labels):
            raise ConfigError(f"{canaries} canaries, {len(inputs)} inputs, {len(labels)} labels: expected >= 20, alike")
        self.inside = flip_coins(canaries)
        self.model = _Beside(model, tuple(inputs.shape[1:]), canaries)
        flat = inputs.reshape(len(inputs), -1)
        marks = torch.cat([torch.ones(canaries, 1), _LOUD * torch.diag(torch.from_numpy(self.inside).float())], dim=1)
        rows = torch.cat([flat, flat.new_zeros(len(flat), 1 + canaries)], dim=1)
        more = torch.cat([flat.new_zeros(canaries, flat.shape[1]), marks.to(flat)], dim=1)
        self.dataset = TensorDataset(torch.cat([rows, more]), torch.cat([labels, labels.new_ones(canaries)]))
        self._released: list[torch.Tensor] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Write down what every step of the user's optimizer is given; call it before wrapping."""
        weight = self.model.canaries.weight

        def keep(*_: object) -> None:
            if weight.grad is not None:
                self._released.append(weight.grad.detach().double().cpu().reshape(-1).clone())

        optimizer.register_step_post_hook(keep)

    def audit(self, spent: Spent, *, batch_size: int, clip: float = 1.0, confidence: float = 0.95) -> ScoreAudit:
        """Hold what was released against what the ledger says; batch_size: the loader's; clip: max_grad_norm.

        The one-run bound decides; the white-box one, which assumes Gaussian noise, stands beside it.
        Raises: ConfigError (no step was watched).
        """
        if not self._released:
            raise ConfigError("no step was watched", hint="call watch(optimizer) before the training")
        scale = batch_size / clip
        scores = likelihood_scores(
            scale * torch.stack(self._released).numpy(), rate=spent.sample_rate, noise=spent.noise_multiplier
        )
        found = audit_scores(
            scores, self.inside, design="coins", delta=spent.delta, claimed=spent.epsilon, confidence=confidence,
            attack="canary gradients in every step",
        )  # fmt: skip
        white = white_box_bound(scores, self.inside, delta=spent.delta, confidence=confidence, claimed=spent.epsilon)
        return msgspec.structs.replace(found, bounds=(*found.bounds, white))


class _Beside(nn.Module):
    """The model, and for each canary one weight that changes no output and has a gradient all the same."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], canaries: int) -> None:
        super().__init__()
        self.model, self.shape, self.width = model, shape, int(np.prod(shape))
        self.canaries = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.canaries.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = self.model(x[:, : self.width].reshape(len(x), *self.shape))
        silent = self.canaries(x[:, self.width + 1 :])
        silent = silent - silent.detach()
        return own * (1.0 - x[:, self.width : self.width + 1]) + torch.cat(
            [silent, own.new_zeros(len(x), own.shape[1] - 1)], dim=1
        )
