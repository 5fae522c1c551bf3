"""The local door of a site's process: an engine's component on the same machine hands bytes in and gets bytes out.

    coordinator: EngineCarrier ---> the engine ---> its component: client.relay ---> Unix socket: DoorServer, SiteHost

How an engine is adapted: its component at a site is `relay(socket, raw)`, which never raises, imports neither torch nor
Choral's rooms, and returns bytes for the coordinator. At the coordinator, an object with the two methods of
:class:`~choral.network.door.carrier.EngineAdapter`, `carry` and `alive`, is given to `EngineCarrier`, which is what
`choral.jobs.serving.serve` takes in the place of a hub. Identity, policy, ledger, data and approvals stay in the site's
process, which the engine's code cannot change, and which takes only what the coordinator signed, whoever carries it.
"""
