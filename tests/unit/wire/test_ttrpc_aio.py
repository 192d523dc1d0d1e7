"""What is the asyncio server's own: time."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from remora.wire.remora_v1 import NoopRequest, NoopResponse
from remora.wire.ttrpc.aio import Client
from remora.wire.ttrpc.aio_server import Server
from remora.wire.ttrpc.core import request_frame
from remora.wire.ttrpc.service import Context, Method


async def echo(request: NoopRequest, _context: Context) -> NoopResponse:
    return NoopResponse(data=request.data)


def test_who_stops_in_the_middle_of_a_frame_is_closed_and_an_idle_client_is_not(tmp_path: Path) -> None:
    async def run() -> None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        services = {"s": {"Noop": Method(NoopRequest, NoopResponse, echo)}}
        server = await Server.start(listening, services, frame_timeout_s=0.2)
        idle_sock = socket.socket(socket.AF_UNIX)
        idle_sock.connect(str(tmp_path / "s"))
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        async with await Client.connect(idle_sock) as idle:
            await idle.call("s", "Noop", NoopRequest(), NoopResponse)
            writer.write(b"".join(request_frame(1, "s", "Noop", NoopRequest(data=b"x" * 100)))[:50])
            assert await asyncio.wait_for(reader.read(), 10) == b""
            await idle.call("s", "Noop", NoopRequest(), NoopResponse)
        writer.close()
        await server.close()

    asyncio.run(run())
