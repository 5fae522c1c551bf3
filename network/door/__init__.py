"""The local door of a site's process: an engine's component on the same machine hands bytes in and gets bytes out.

    coordinator: EngineCarrier ---> the engine ---> its component: client.relay ---> Unix socket: DoorServer, SiteHost

How an engine is adapted: its component at a site is `relay(socket, raw)`, which never raises, imports neither torch nor
Choral's rooms, and returns bytes for the coordinator. At the coordinator an object with two methods, `carry` and
`alive` (:class:`~choral.network.door.carrier.Engine`), is given to :class:`~choral.network.door.carrier.EngineCarrier`,
which is what `choral.jobs.serving.serve` takes in the place of a hub. Identity, policy, ledger, data and approvals
stay in the site's process, which the engine's code cannot change, and which the coordinator's signature reaches whoever
carries it.
"""
