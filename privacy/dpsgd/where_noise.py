"""Where the noise of a record-level promise is added: by each data owner alone, or in shares under a secure sum."""

from __future__ import annotations

from typing import Literal, get_args

from choral.errors import ConfigError
from choral.privacy.dpsgd.clip_settings import AdaptiveClip, ClippingNorm

Where = Literal["local", "distributed"]


def check_noise(noise: str, colluders: int, max_grad_norm: ClippingNorm) -> None:
    """Raise ConfigError unless these go together in a promise."""
    if not isinstance(noise, str) or noise not in get_args(Where):
        raise ConfigError(f"noise is {noise!r:.80}, expected one of {', '.join(get_args(Where))}")
    check_colluders(colluders)
    if noise == "distributed" and isinstance(max_grad_norm, AdaptiveClip):
        raise ConfigError(
            'noise="distributed" with AdaptiveClip: the plan fixes the clipping norm for all parties and steps',
            hint="Take a number, or PerLayerClip.",
        )


def check_colluders(colluders: int) -> None:
    """Raise ConfigError unless it is a number from 1: any other party knows its own share of the noise."""
    if isinstance(colluders, bool) or not isinstance(colluders, int) or colluders < 1:
        raise ConfigError(
            f"colluders is {colluders!r:.80}, expected an integer >= 1",
            hint="Every other party knows its own share of the noise, so that one at least is never unknown to it.",
        )


def refuse_shares(noise: str) -> None:
    """Raise ConfigError where one data owner would train alone on a promise whose noise comes from many."""
    if noise != "local":
        raise ConfigError(
            f'noise="{noise}": a share of the noise protects nothing without the others\' in a secure sum',
            hint='Privacy(noise="local") trains alone; noise in shares is for the parties of a federated training.',
        )
