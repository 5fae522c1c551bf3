"""Doors of sites that are in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from site_federation import Federation

from choral.network import SiteHost
from choral.network.door.sealed import unsealed
from choral.network.door.server import DoorServer
from choral.network.site.files.directory import Pinned
from choral.network.site.files.private import write_private


def coordinators_folder(federation: Federation) -> Path:
    """The coordinator's folder, as `choral site init` makes it, with the sites pinned and the code installed."""
    hub = federation.path / "hub"
    (hub / "tasks").mkdir(mode=0o700)
    write_private(hub / "tasks" / "linear.py", federation.code.encode())
    write_private(hub / "site.toml", b'name = "hub"\n')
    pinned = Pinned()
    for certificate in federation.certificates.values():
        pinned = pinned.with_(certificate)
    pinned.write(hub / "directory.toml")
    return hub


@contextmanager
def door(
    path: Path, handle: Callable[[memoryview], bytes], *, limit: int = 100, user: int | None = None
) -> Iterator[str]:
    with DoorServer(path / "door", handle, request_limit=lambda: limit, user=user) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield str(server.path)
        finally:
            server.stop()
            thread.join()


@contextmanager
def doors(federation: Federation, place: Path) -> Iterator[dict[str, str]]:
    one = threading.Lock()  # the sites share this process, and with it torch's generator
    with ExitStack() as stack:
        found = {}
        for name in federation.names:
            folder = federation.site(name)
            host, public = SiteHost(folder), folder.hub_directory["hub"].public_key
            (place / name).mkdir()

            def handle(raw: memoryview, host: SiteHost = host, public: bytes = public, name: str = name) -> bytes:
                with one:
                    return host.handle(unsealed(raw, public, coordinator="hub", site=name), sender="hub")

            found[name] = stack.enter_context(door(place / name, handle, limit=1 << 20))
        yield found
