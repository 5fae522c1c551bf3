"""Clipping norms: one for the whole vector, one for each layer, or one that follows a quantile of the norms.

What a mechanism pays for is the most by which one record (or client) can change the sum, C. However it is split over
layers, and wherever adaptive clipping moves it, the noise is noise multiplier times the C of that step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from choral.errors import ConfigError
from choral.privacy.accounting.plain_numbers import is_number


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """A clipping norm that follows a quantile of the norms (Andrew, Thakkar, McMahan, Ramaswamy 2021).

    The norms are of clients' updates in `ClientPrivacy(clip=...)`, of records' gradients in
    `Privacy(max_grad_norm=...)`. Each client or record also says, inside the same noisy sum, whether its norm was at
    most the present one, as +1/2 or -1/2; a client whose update is zero says 0, so that zeroing it out takes away
    everything it sends. From the noisy share b of those that were, C becomes C exp(-rate (b - quantile)).

    Cost: nothing beside. The answer is one more coordinate of the clipped vector, of size sqrt(share) clipping norms,
    and the vector has the rest, so vector and answer together have norm 1 and one mechanism pays for both: the noise of
    the vector is 1 / sqrt(1 - share) times larger, that of the count is z / (2 sqrt(share)) clients or records. (This
    is their z^-2 = z_update^-2 + (2 sigma_count)^-2, section 3, with share = z^2 / (2 sigma_count)^2.)

    Args:
        start: the first clipping norm, > 0. quantile: of the norms, in (0, 1). rate: of the geometric steps, > 0.
        share: of the squared sensitivity that goes to the count, in (0, 1).
    """

    start: float = 1.0
    quantile: float = 0.5
    rate: float = 0.2
    share: float = 0.05

    def __post_init__(self) -> None:
        check_clip(self.start)
        for name, most in (("quantile", 1.0), ("share", 1.0), ("rate", 10.0)):
            if not (is_number(getattr(self, name)) and 0.0 < getattr(self, name) < most):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a number above 0 and below {most:g}")

    def moved(self, clip: float, within: float) -> float:
        """Return the next clipping norm (algorithm 1); within, a noisy share, is brought back to [0, 1]."""
        moved = clip * math.exp(-self.rate * (min(max(within, 0.0), 1.0) - self.quantile))
        return min(max(moved, 1e-6 * self.start), 1e6 * self.start)


@dataclass(frozen=True)
class PerLayerClip:
    """Each layer's gradient clipped to a norm of its own, C_l; a record counts for C = sqrt(sum of C_l^2) in all.

    Noise and accounting are those of a single clipping norm C: the concatenation of the clipped layers is no longer
    than C (McMahan, Ramage, Talwar, Zhang 2018, section 3). A layer is what holds a trainable parameter itself.

    Args:
        norms: a number, C, split evenly: C_l = C / sqrt(L) for L layers; or C_l by the name of a layer, or of a module
            whose layers share one norm, as `named_modules()` gives it. The innermost name given counts, and every
            trainable parameter must have one.
    """

    norms: float | Mapping[str, float] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.norms, Mapping):
            if not self.norms:
                raise ConfigError("PerLayerClip: no layer is given a norm", hint="PerLayerClip(1.0) splits evenly.")
            object.__setattr__(self, "norms", dict(self.norms))  # nobody changes it later
        for norm in self.norms.values() if isinstance(self.norms, Mapping) else [self.norms]:
            check_clip(norm)

    def bounds(self, names: Sequence[str]) -> dict[str, float]:
        """Return C_l by layer for parameters of these dotted names. Raises: ConfigError (a name without, or unused)."""
        layers = dict.fromkeys(self.layer(name) for name in names)
        if not isinstance(self.norms, Mapping):
            return dict.fromkeys(layers, self.norms / math.sqrt(len(layers)))
        unused = [name for name in self.norms if name not in layers]
        if unused:
            raise ConfigError(
                f"PerLayerClip: {unused[0]!r} holds no trainable parameter of its own", hint="Leave it out."
            )
        return dict(self.norms)

    def layer(self, name: str) -> str:
        """Return which of the layers a parameter belongs to. Raises: ConfigError."""
        path = name.rpartition(".")[0]
        if not isinstance(self.norms, Mapping):
            return path
        while path not in self.norms:
            if not path:
                raise ConfigError(f"PerLayerClip: parameter {name} is in none of the layers that have a norm")
            path = path.rpartition(".")[0]
        return path


ClippingNorm = float | PerLayerClip | AdaptiveClip


class Clipping:
    """A clipping norm and where it is now: `norm` is the C of the next step, which adaptive clipping moves."""

    def __init__(self, setting: ClippingNorm) -> None:
        self.setting = setting
        self.norm = norm_of_all(setting)


def norm_of_all(setting: ClippingNorm) -> float:
    """Return the most that one record counts for in all, C; of adaptive clipping, at first."""
    if isinstance(setting, AdaptiveClip):
        return setting.start
    if isinstance(setting, PerLayerClip):
        return math.hypot(*setting.norms.values()) if isinstance(setting.norms, Mapping) else setting.norms
    return setting


def settings_of(setting: ClippingNorm) -> dict[str, float | int | str]:
    """Return the clipping as plain data, for a run's record: C, and what other kinds than a number have."""
    plain: dict[str, float | int | str] = {"max_grad_norm": norm_of_all(setting)}
    if isinstance(setting, AdaptiveClip):
        return plain | {"quantile": setting.quantile, "clip_rate": setting.rate, "clip_share": setting.share}
    if isinstance(setting, PerLayerClip):
        named = setting.norms if isinstance(setting.norms, Mapping) else {}
        return plain | {"clipping": "by layer"} | {f"max_grad_norm.{layer}": norm for layer, norm in named.items()}
    return plain


def check_norm(setting: ClippingNorm) -> None:
    """Raise ConfigError unless `setting` is one of the three kinds, and a number in range."""
    if not isinstance(setting, AdaptiveClip | PerLayerClip) and (
        isinstance(setting, bool) or not isinstance(setting, int | float) or not 1e-30 <= setting <= 1e30
    ):
        raise ConfigError(
            f"max_grad_norm is {setting}, expected a finite number > 0, PerLayerClip or AdaptiveClip", hint="Try 1.0."
        )


def check_clip(clip: float) -> None:
    """Raise ConfigError unless 1e-30 <= clip <= 1e30."""
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 1e-30 <= clip <= 1e30:
        raise ConfigError(f"the clipping norm is {clip}, expected a finite number > 0", hint="Try 1.0.")
