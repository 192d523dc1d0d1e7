"""ttrpc: what containerd speaks to a shim, Kata to its guest and vAccel to its agent, for Python.

    frames    bytes <-> frames, no I/O                  core        envelopes and the client's streams, no I/O
    messages  Request, Response, Status                 calls       the server's calls, no I/O
    sync      a blocking client that threads share      reactor     the server of the agent, PID 1 and the shim
    aio       the asyncio client                        aio_server  a task per call, on asyncio
    service   what a server offers, by function         server      a thread per call, on a reactor of its own

Importing this package imports none of them: a guest that only calls needs neither a server nor asyncio.
`docs/protocol-wire.md` has the layouts and their sources.
"""
