"""Choral's sums in NVFlare: a recipe, a controller that is the coordinator, and a component that only hands bytes on.

    ChoralRecipe("visits.toml").execute(ProdEnv(startup_kit_location=...))

No code travels with the job: all three classes are installed at both ends, and the sites' are told so in their own
`local/resources.json` (:func:`~choral.network.nvflare.local_files.write_local`). The party is the site's process
(`choral join SITE --local SOCKET`), to which :class:`ChoralSite` hands bytes.
"""

from __future__ import annotations

from choral.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
