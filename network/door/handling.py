"""What a site's door does with what is handed in: the coordinator's signed requests go to the site's host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from choral.network.door.sealed import OVERHEAD, unsealed
from choral.network.door.trained import OVERHEAD as TRAINED
from choral.network.door.trained import taken

if TYPE_CHECKING:
    from choral.network.host.host import SiteHost
    from choral.network.site.folder import SiteFolder

Handle = Callable[[memoryview], bytes]


def handler(folder: SiteFolder, host: SiteHost) -> Handle:
    """It raises WrongPeerError for what the coordinator did not sign. Raises: SiteError if none is pinned."""
    site, coordinator = folder.settings.name, folder.coordinator
    public = folder.hub_directory[coordinator].public_key

    def handle(raw: memoryview) -> bytes:
        request, trained = taken(raw)
        return host.handle(
            unsealed(request, public, coordinator=coordinator, site=site), sender=coordinator, trained=trained
        )

    return handle


def limit(host: SiteHost) -> int:
    """Bytes of the largest request at a door."""
    return host.request_limit + OVERHEAD + TRAINED
