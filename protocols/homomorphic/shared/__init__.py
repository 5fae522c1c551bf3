"""Sums under a key that the parties share, by Microsoft SEAL: BFV for integers, CKKS for floats."""

from importlib.util import find_spec

from choral.errors import ConfigError

if find_spec("tenseal") is None:
    raise ConfigError(
        "sums under a shared key need tenseal, which is not installed",
        hint='pip install "choral[homomorphic]"; key = "split" needs nothing more',
    )
