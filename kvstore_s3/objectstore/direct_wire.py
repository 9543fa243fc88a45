"""One kept-alive connection as a thread uses it: blocking calls that move as much as they can each.

Plain sockets read with MSG_WAITALL: one system call, and one fight for the GIL, for megabytes. Bytes land where the
caller wants them. No timer runs beside a transfer: the kernel ends each call after `window_s`, and `Pace` judges it.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from typing import Protocol

from kvstore_s3.objectstore.s3_errors import TlsRefusedError

_LOW_WATER = 1024 * 1024
"""Bytes that must have arrived until the kernel wakes a thread that waits for many: each wake-up costs CPU."""
_SCRATCH_BYTES = 8 * 1024
"""More than a head needs; what it catches of a body is copied, so it is not much more."""


class SlowTransferError(TimeoutError):
    """Fewer bytes moved than a transfer must move."""


class Pace:
    """Judges a transfer once a window: fewer than `slowest` bytes per second end it. Pure."""

    def __init__(self, slowest: float, window_s: float, now: float) -> None:
        self._slowest = slowest
        self._window_s = window_s
        self._since = now
        self._moved = 0

    def moved(self, count: int, now: float) -> None:
        """`count` bytes more have moved. Raises SlowTransferError at the end of a window that moved too few."""
        self._moved += count
        passed = now - self._since
        if passed < 0.9 * self._window_s:  # the kernel's clock ticks a little differently
            return
        if self._moved < self._slowest * passed:
            raise SlowTransferError(f"{self._moved} bytes in {passed:.1f} s")
        self._since, self._moved = now, 0


class Wire(Protocol):
    """A connection. All methods but `kill` are for the one thread that uses it at the time."""

    scratch: bytearray
    used: bool
    """Whether an exchange went well on it before: then its next failure may be the server's idle timeout."""
    reusable: bool
    """Whether the last exchange ended in order, so that another may follow."""

    def handshake(self) -> None:
        """Do what is left to do before the first byte."""

    def receive(self, view: memoryview, *, fill: bool) -> int | None:
        """Read into `view`, all of it with `fill` if it comes in time. None: nothing came for a window; 0: the end."""

    def send(self, parts: list[memoryview]) -> int:
        """Send some bytes of `parts`, from their beginning. 0: nothing went out for a window."""

    def readable(self, patience_s: float) -> bool:
        """Whether bytes, or the end, are there or come within `patience_s`."""

    def kill(self) -> None:
        """End whatever another thread does with it, at once. The connection is unusable afterwards."""

    def close(self) -> None:
        """Close it."""


class PlainWire:
    """A `Wire` without TLS."""

    def __init__(self, sock: socket.socket, window_s: float) -> None:
        sock.settimeout(None)
        patience = struct.pack("ll", int(window_s), max(1, int(window_s % 1 * 1e6)))  # 0 would be for ever
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._sock = sock
        self.scratch = bytearray(_SCRATCH_BYTES)
        self.used = self.reusable = False

    def handshake(self) -> None:
        return

    def receive(self, view: memoryview, *, fill: bool) -> int | None:
        bulk = len(view) - _LOW_WATER
        if not fill or bulk < _LOW_WATER:
            return self._receive(view, socket.MSG_WAITALL if fill else 0)
        # Not to the end of the view: of fewer bytes than the mark, the kernel would never tell.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _LOW_WATER)
        try:
            return self._receive(view[:bulk], socket.MSG_WAITALL)
        finally:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _receive(self, view: memoryview, flags: int) -> int | None:
        try:
            return self._sock.recv_into(view, 0, flags)
        except BlockingIOError:
            return None

    def send(self, parts: list[memoryview]) -> int:
        try:
            return self._sock.sendmsg(parts)
        except BlockingIOError:
            return 0

    def readable(self, patience_s: float) -> bool:
        return _poll(self._sock, patience_s)

    def kill(self) -> None:
        _shut_down(self._sock)

    def close(self) -> None:
        self._sock.close()


class TlsWire:
    """A `Wire` with TLS: OpenSSL decrypts record by record (16 KiB), straight into the caller's buffer."""

    def __init__(self, sock: socket.socket, window_s: float, context: ssl.SSLContext, host: str) -> None:
        sock.settimeout(window_s)  # OpenSSL would not see the kernel's own
        self._sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        self._ready = False
        self.scratch = bytearray(_SCRATCH_BYTES)
        self.used = self.reusable = False

    def handshake(self) -> None:
        if self._ready:
            return
        try:
            self._sock.do_handshake()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise ConnectionResetError("the connection ended during the TLS handshake") from error
        except ssl.SSLError as error:
            raise TlsRefusedError(str(error)) from error
        self._ready = True

    def receive(self, view: memoryview, *, fill: bool) -> int | None:
        try:
            return self._sock.recv_into(view)
        except TimeoutError:
            return None
        except ssl.SSLError as error:
            raise ConnectionResetError("TLS broke off") from error

    def send(self, parts: list[memoryview]) -> int:
        sent = 0
        try:
            for part in parts:
                count = self._sock.send(part)
                sent += count
                if count < len(part):
                    break
        except TimeoutError:
            return sent
        except ssl.SSLError as error:
            raise ConnectionResetError("TLS broke off") from error
        return sent

    def readable(self, patience_s: float) -> bool:
        return self._sock.pending() > 0 or _poll(self._sock, patience_s)

    def kill(self) -> None:
        _shut_down(self._sock)

    def close(self) -> None:
        self._sock.close()


def _poll(sock: socket.socket, patience_s: float) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(patience_s * 1e3))


def _shut_down(sock: socket.socket) -> None:
    try:
        # Not SSLSocket's own shutdown, which would turn it into a plain socket under the thread that is reading.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # it is not connected any more
