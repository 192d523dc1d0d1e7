"""TLS as a pump between an encrypted socket and a plain one, on the reactor: whoever is behind it knows nothing of TLS.

Why not a TLS socket in the doors' and the clients' place: it holds decrypted bytes that no epoll reports, cannot
scatter and gather, and its reads may have to wait for a write; each of them would need to know. Why not `ssl`'s own
sockets in here: one read of theirs goes on as long as a peer keeps sending handshake messages (KeyUpdate), and so would
the loop. Bytes are handed to OpenSSL in memory instead, a bounded number at a time.

A TLS connection costs two descriptors more than a plain one, and one more copy of each byte. Standard library only.
"""

from __future__ import annotations

import socket
import ssl

from remora.reactor import READ, WRITE, Reactor, Timer, is_hangup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional

#: Encrypted bytes taken before others get their turn, and what is decrypted or encrypted at once.
_TURN_BYTES = 65536
#: Encrypted bytes that wait for a peer who does not read, beyond which nothing more is taken from either side.
_MAX_OUT_BYTES = 256 << 10
#: How long a peer may take to read the last bytes and close, too.
_FAREWELL_S = 2.0


class TlsPump:
    """One TLS connection. Owns `sock` and its own end of a socket pair, whose other end is `plain` once it is open.

    Args:
        sock: A connected socket.
        server_name: For a client, whom to expect: checked against the certificate if the context checks host names.
        handshake_s: How long the handshake may take.
        stall_s: How long a peer may leave bytes unread.
        on_open: Called once, when the handshake is done. An error that it raises closes the connection.
        on_close: Called once, when the connection is gone; `failure` says why, if it was not the peer's wish.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_name: Optional[str] = None,
        handshake_s: float,
        stall_s: float = 30.0,
        on_open: Callable[[TlsPump], None],
        on_close: Callable[[TlsPump], None],
    ) -> None:
        sock.setblocking(False)
        self.closed = False
        self.failure: Optional[Exception] = None
        #: What the other side of the program uses, and closes; set when the connection is open.
        self.plain: Optional[socket.socket] = None
        self._inner: Optional[socket.socket] = None
        self._reactor = reactor
        self._sock = sock
        self._on_open = on_open
        self._on_close = on_close
        self._stall_s = stall_s
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server_side, server_hostname=server_name)
        self._to_peer = memoryview(b"")
        self._to_inner = memoryview(b"")
        self._ended = False  # the peer sends nothing more
        self._done = False  # nothing more is sent to the peer
        self._leaving = False  # and it knows
        self._events = {sock: READ}
        self._timer: Optional[Timer] = reactor.call_later(handshake_s, self._too_slow)
        reactor.register(sock.fileno(), READ, self._peer_ready)
        if not server_side:
            self._advance()

    def certificate(self) -> Dict[str, Any]:
        """Return the peer's verified certificate, as `ssl.SSLSocket.getpeercert`; empty if there is none."""
        return self._tls.getpeercert() or {}

    @property
    def unsent(self) -> bool:
        """True if the peer has not been sent everything that the other side has."""
        if self._to_peer or self._out.pending:
            return True
        try:
            return self._inner is not None and bool(self._inner.recv(1, socket.MSG_PEEK))
        except OSError:  # nothing, or gone
            return False

    def descriptors(self) -> list[socket.socket]:
        """Return what a process that forked from this one should close."""
        return [self._sock] + ([self._inner] if self._inner is not None else [])

    def close(self, failure: Optional[Exception] = None) -> None:
        """Close both sides at once."""
        if self.closed:
            return
        self.closed = True
        self.failure = self.failure or failure
        if self._timer is not None:
            self._timer.cancel()
        for sock in self._events:
            self._reactor.unregister(sock.fileno())
        # A child that forked meanwhile may have copies: the connection must end all the same.
        for end in (self._sock, self._inner):
            if end is not None:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has ended already
                end.close()
        self._on_close(self)

    # -- readiness --------------------------------------------------------------------------------------------------

    def _peer_ready(self, events: int) -> None:
        if self.closed:
            return
        if is_hangup(events) and self._ended:
            self.close()  # neither side can send: nothing that is left can arrive
            return
        if events & WRITE:
            self._flush()
            self._advance()  # what had to wait for room
        if not self.closed and events & ~WRITE:
            self._receive()

    def _inner_ready(self, events: int) -> None:
        if self.closed:
            return
        if events & WRITE:
            self._deliver()
        self._advance()
        if not self.closed and is_hangup(events):
            self._forget_inner()  # gone; what it sent last is still read

    def _update(self) -> None:
        """Listen to what can be used now, and give up a peer who does not read."""
        if self.closed:
            return
        blocked = len(self._to_peer) > 0
        room = not self._to_inner and len(self._to_peer) < _MAX_OUT_BYTES
        self._listen(self._sock, (READ if room and not self._ended else 0) | (WRITE if blocked else 0))
        if self._inner is not None and self._inner in self._events:
            take = not blocked and not self._done
            self._listen(self._inner, (READ if take else 0) | (WRITE if self._to_inner else 0))
        if blocked and self._timer is None:
            self._timer = self._reactor.call_later(self._stall_s, self._too_slow)

    def _forget_inner(self) -> None:
        """Stop listening to the other side: level-triggered, its end would be told again and again."""
        if self._inner is not None and self._events.pop(self._inner, None) is not None:
            self._reactor.unregister(self._inner.fileno())

    def _listen(self, sock: socket.socket, events: int) -> None:
        if self._events[sock] != events:
            self._events[sock] = events
            self._reactor.modify(sock.fileno(), events)

    def _too_slow(self) -> None:
        self._timer = None
        self.close(TimeoutError("the TLS handshake took too long" if self.plain is None else "the peer does not read"))

    def _progress(self) -> None:
        if self._timer is not None and self.plain is not None and not self._leaving:
            self._timer.cancel()
            self._timer = None

    # -- moving bytes -----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        scratch = self._reactor.scratch[:_TURN_BYTES]
        try:
            count = self._sock.recv_into(scratch)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error)
            return
        if count:
            self._in.write(scratch[:count])
        else:
            self._ended = True
            self._in.write_eof()
        self._advance()

    def _advance(self) -> None:
        """Do whatever the bytes at hand allow."""
        try:
            if self.plain is None:
                self._handshake()
            if self.plain is not None and not self.closed:
                self._decrypt()
                self._encrypt()
        except ssl.SSLError as error:
            self._flush()  # the alert that tells the peer
            self.close(error)
        except OSError as error:
            self.close(error)
        else:
            self._flush()
            self._finish()
            self._update()

    def _handshake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            if self._ended:
                raise ConnectionResetError("the peer went away during the TLS handshake") from None
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.plain, self._inner = socket.socketpair()
        self._inner.setblocking(False)
        self._events[self._inner] = READ
        self._reactor.register(self._inner.fileno(), READ, self._inner_ready)
        try:
            self._on_open(self)
        except BaseException as error:
            self.plain.close()
            self.close(error if isinstance(error, Exception) else None)
            raise

    def _decrypt(self) -> None:
        while not self._to_inner and not self.closed:
            try:
                data = self._tls.read(_TURN_BYTES)
            except ssl.SSLWantReadError:
                return
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                data = b""
            if not data:
                self._end_inner()
                return
            self._to_inner = memoryview(data)
            self._deliver()

    def _end_inner(self) -> None:
        """The peer sends nothing more: tell the other side, which may still answer."""
        self._ended = True
        assert self._inner is not None
        try:
            self._inner.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other side is gone already

    def _deliver(self) -> None:
        assert self._inner is not None
        if not self._to_inner:
            return
        try:
            self._to_inner = self._to_inner[self._inner.send(self._to_inner) :]
        except BlockingIOError:
            return
        except OSError:
            self._to_inner = memoryview(b"")  # nobody is there to read it

    def _encrypt(self) -> None:
        assert self._inner is not None
        if self._done or self._to_peer or self._out.pending:
            return
        try:
            data = self._inner.recv(_TURN_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            self._tls.write(data)
            return
        self._done = True
        self._forget_inner()
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # our close_notify is written; the peer's is not waited for

    def _flush(self) -> None:
        while True:
            if not self._to_peer:
                self._to_peer = memoryview(self._out.read())
            if not self._to_peer or self.closed:
                return
            try:
                sent = self._sock.send(self._to_peer)
            except BlockingIOError:
                if self._out.pending:
                    self._to_peer = memoryview(bytes(self._to_peer) + self._out.read())
                return
            except OSError as error:
                self.close(error)
                return
            self._to_peer = self._to_peer[sent:]
            self._progress()

    def _finish(self) -> None:
        """Close once everything is sent and the peer has closed, too, or had its time."""
        if self.closed or not self._done or self._to_peer:
            return
        if self._ended:
            self.close()
        elif not self._leaving:
            self._leaving = True
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._reactor.call_later(_FAREWELL_S, self.close)
