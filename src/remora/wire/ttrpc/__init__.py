"""ttrpc: what containerd speaks to a shim, Kata to its guest and vAccel to its agent, for Python.

    frames    bytes <-> frames, no I/O                     core    envelopes and the client's streams, no I/O
    messages  Request, Response, Status                    calls   the server's calls, no I/O
    sync      a thread-safe blocking client, a threaded server
    reactor   the server on `remora.reactor`: the agent, the guest's PID 1, the shim
    aio       client and server for asyncio

Importing this package imports none of them: a guest that only calls needs neither a server nor asyncio.
`docs/protocol-wire.md` has the layouts and their sources.
"""
