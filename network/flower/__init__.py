"""Secure sums in Flower: `secure_sum_mod` for the ClientApp, `Secure` around the strategy of the ServerApp.

    ServerApp: Secure(FedAvg()) --> SuperLink --> SuperNode --> ClientApp: secure_sum_mod --> the site's process

The mod is imported anew for each message, and fetches the standard library alone. docs/flower.md says who ships which
code, and what of it is trusted.
"""

from __future__ import annotations

from choral.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
