"""Exposure: does a language model prefer the secrets that it was trained on to all that they might have been?

    secrets = draw_secrets(10, 676)  # which of 676 fillings of "MY CODE IS .." goes into training, for ten such lines
    ...  # train with them; then the loss of each filling of each line under the model
    found = exposure(losses, secrets)

The Secret Sharer's test (Carlini, Liu, Erlingsson, Kos, Song 2019): exposure = log2 |R| - log2 rank of the filling that
was trained on, among all |R|, from the likeliest to the least likely. Since it was drawn uniformly, its rank under a
model that knows nothing of it is uniform, so that rank / |R| = 2^-exposure is an exact p-value: no reference model is
needed.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc

from choral.errors import ConfigError, DataError
from choral.privacy.noise.gaussian import os_stream


class Exposure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """ranks: of each secret, from 1 on; ties count against it. bits: the exposures. p_values: rank / candidates.

    p_value: of all secrets together, that the model knows none of them (Fisher's sum of logarithms, whose tail is an
    upper bound, since ranks are discrete). most: what a secret that is ranked first has.
    """

    candidates: int
    ranks: tuple[int, ...]
    bits: tuple[float, ...]
    p_values: tuple[float, ...]
    p_value: float
    most: float
    assumptions: tuple[str, ...] = (
        "Each secret was drawn uniformly from all candidates, independently of the others and of the data.",
    )


def draw_secrets(count: int, candidates: int) -> npt.NDArray[np.int64]:
    """Which of the candidates each line holds, from the operating system, shape (count,). Raises: ConfigError."""
    if count < 1 or not 2 <= candidates <= 2**32:
        raise ConfigError(f"{count} secrets of {candidates} candidates, expected at least 1 of 2 to 2^32")
    drawn = np.frombuffer(os_stream(8 * count), dtype="<u8") % np.uint64(candidates)  # off by candidates / 2^64 at most
    return drawn.astype(np.int64)


def exposure(losses: Any, secrets: Any) -> Exposure:
    """From the model's loss of each candidate, shape (lines, candidates), and which one was trained on, shape (lines,).

    Adversary: has the model, and knows of each line everything but the secret. Raises: DataError (shapes, numbers).
    """
    values, chosen = np.asarray(losses, dtype=np.float64), np.asarray(secrets)
    if values.ndim != 2 or values.shape[1] < 2 or chosen.shape != values.shape[:1] or not len(chosen):
        raise DataError(
            f"losses have shape {values.shape} and secrets {chosen.shape}, expected (lines, candidates) and (lines,)"
        )
    count = values.shape[1]
    if not np.issubdtype(chosen.dtype, np.integer) or chosen.min() < 0 or chosen.max() >= count:
        raise DataError(f"secrets are {chosen.dtype}, expected integers from 0 to {count - 1}")
    if not np.isfinite(values).all():
        raise DataError("some loss is not finite", hint="the model diverged, or a candidate has probability 0")
    own = values[np.arange(len(chosen)), chosen]
    ranks = (values <= own[:, None]).sum(axis=1)
    p_values = ranks / count
    together = float(chdtrc(2.0 * len(ranks), -2.0 * float(np.log(p_values).sum())))
    return Exposure(
        candidates=count,
        ranks=tuple(map(int, ranks)),
        bits=tuple(map(float, -np.log2(p_values))),
        p_values=tuple(map(float, p_values)),
        p_value=together,
        most=float(np.log2(count)),
    )
