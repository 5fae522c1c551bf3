"""Promises as they are written down: what a new user may type, and what is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from choral.errors import ConfigError
from choral.privacy import ClientPrivacy, CorrelatedPrivacy, Privacy


@pytest.mark.parametrize("kind", [Privacy, ClientPrivacy, CorrelatedPrivacy])
def test_epsilon_and_delta_are_taken_by_position(kind: Any) -> None:
    assert kind(3.0, 1e-5) == kind(epsilon=3.0, delta=1e-5)
    with pytest.raises(TypeError, match="positional"):
        kind(3.0, 1e-5, 1.0)
    for wrong in ("3", True, None):
        with pytest.raises(ConfigError, match=f"epsilon is {wrong!r}, expected a finite number"):
            kind(wrong, 1e-5)
        with pytest.raises(ConfigError, match=f"delta is {wrong!r}, expected a finite number"):
            kind(3.0, wrong)
    with pytest.raises(ConfigError, match=r"delta is 3\.0"):
        kind(1e-5, 3.0)
