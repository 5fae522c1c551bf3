"""Buffers may not change in private training: what they follow of the records would be published without noise."""

from __future__ import annotations

import torch
from torch import nn

from choral.privacy.errors import UnsupportedModelError


class UnchangedBuffers:
    """The buffers of a model as they were at the beginning of a pass; nothing is known of them until then."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}  # itself, its version, its value
        self.remembered = False

    def remember(self) -> None:
        """Take the buffers as they are now for what they must stay."""
        buffers = self._model.named_buffers()
        self._known, self.remembered = {name: (b, b._version, b.detach().clone()) for name, b in buffers}, True

    def check(self, *, thorough: bool) -> None:
        """Compare buffers with those at the beginning; unless `thorough`, those that torch saw change.

        Raises: UnsupportedModelError (one has changed).
        """
        for name, buffer in self._model.named_buffers():
            before, version, value = self._known.get(name, (None, 0, None))
            if not thorough and before is not None and buffer is before and before._version == version:
                continue
            if value is None or buffer.shape != value.shape or not torch.equal(value.to(buffer.device), buffer):
                raise UnsupportedModelError(
                    f"buffer {name} changes during training: it would publish the data without noise",
                    hint="Remove the running statistics, or freeze them.",
                )
