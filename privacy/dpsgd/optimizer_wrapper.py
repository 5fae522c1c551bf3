"""The shell of the private optimizer: to schedulers, Lightning and checkpoints it looks like the user's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from choral.privacy.errors import PrivacyError, UnsupportedModelError


class OptimizerWrapper(Optimizer):
    """An optimizer over another one, whose groups, state, defaults and `state_dict` it shows and sets.

    `Optimizer.__init__` is not called: nothing is held here but what subclasses add.
    """

    original_optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        self.original_optimizer = optimizer

    @property
    def params(self) -> list[nn.Parameter]:
        """All parameters of the optimizer that are trained."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The other's groups, hyper-parameters included."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The other's state, of moments and the like."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The other's defaults."""
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """Return the other's state."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.original_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Iterable[Any]]) -> None:
        """Add a group to the other."""
        self.original_optimizer.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Hook the other's steps, each of which is one of released gradients."""
        return self.original_optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Likewise, after each."""
        return self.original_optimizer.register_step_post_hook(hook)

    def __repr__(self) -> str:
        return repr(self.original_optimizer)


def refuse_unsupported(optimizer: Any, module: nn.Module) -> None:
    """Refuse what is no optimizer, takes a closure, or holds other parameters than those of `module`.

    Raises: PrivacyError, UnsupportedModelError.
    """
    if isinstance(optimizer, OptimizerWrapper):
        raise PrivacyError("the optimizer is already private", hint="Wrap the original optimizer.")
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
        raise PrivacyError(
            f"optimizer is a {type(optimizer).__name__}, expected a torch optimizer that needs no closure",
            hint="SGD, Adam and their kin work.",
        )
    known = {id(p) for p in module.parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if any(id(p) not in known for p in params):
        raise UnsupportedModelError(
            "the optimizer holds parameters that are not the model's",
            hint="Build the optimizer from model.parameters() of the model you wrap, after any copy or move.",
        )
    if not params:
        raise UnsupportedModelError("the optimizer holds no trainable parameter", hint="Check requires_grad.")
