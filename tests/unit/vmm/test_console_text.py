"""What a guest writes on its console, as an operator reads it in an error."""

from __future__ import annotations

import socket

from remora.vmm.process import MonitorProcess


def test_a_guest_cannot_give_the_terminal_of_an_operator_orders() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(b"\x1b[2Jpanic:\tno root\r\n\x1b]0;title\x07\x1bP$q\x9b31mred\x00\xe2\x80\xaeend\n")
        process = MonitorProcess(1, ours)
        process.read_console()
        text = process.console_text()
        ours.close()
    assert text.startswith("panic:\tno root\n")
    assert all(one.isprintable() or one in "\n\t" for one in text)
