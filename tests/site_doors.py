"""Doors of sites that are in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from site_federation import Federation

from choral.network import SiteHost
from choral.network.door.handling import Handle, handler, limit
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
    path: Path,
    handle: Callable[[memoryview], bytes],
    *,
    limit: Callable[[], int] = lambda: 100,
    user: int | None = None,
) -> Iterator[str]:
    with DoorServer(path / "door", handle, request_limit=limit, user=user) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield str(server.path)
        finally:
            server.stop()
            thread.join()


@contextmanager
def doors(federation: Federation, place: Path) -> Iterator[dict[str, str]]:
    """Of all sites, by name: each answers as its own process would."""
    one = threading.Lock()  # the sites share this process, and with it torch's generator

    def alone(handle: Handle, raw: memoryview) -> bytes:
        with one:
            return handle(raw)

    with ExitStack() as stack:
        found = {}
        for name in federation.names:
            folder = federation.site(name)
            host = SiteHost(folder)
            (place / name).mkdir(exist_ok=True)

            found[name] = stack.enter_context(
                door(place / name, partial(alone, handler(folder, host)), limit=partial(limit, host))
            )
        yield found
