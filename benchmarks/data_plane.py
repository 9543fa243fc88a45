"""How bytes should come from a socket: the ways that were tried, for docs/decisions/2026-11-21-data-plane.md.

    python benchmarks/data_plane.py            # prints the table and keeps results/data_plane.json

A server process that only moves bytes runs on one core, the client on another. Beside a "hog", a thread that computes
in Python without pause as an engine process does, whoever wants the GIL back waits for up to 5 ms; client and hog may
then use all cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from record import record

MiB = 1024 * 1024
CONNECTIONS, SIZE = 8, 8 * MiB
DELAY_S = 0.02
REQUEST = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nHost: x\r\nAuthorization: " + b"x" * 300 + b"\r\n\r\n"


# The server: GET /n answers n bytes at once, HEAD answers after DELAY_S.


def serve(certificate: str) -> None:
    os.sched_setaffinity(0, {os.cpu_count() - 1})
    body = memoryview(bytearray(64 * MiB))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def answer_bulk(listener: socket.socket, tls: bool) -> None:
        while True:
            connection = listener.accept()[0]
            threading.Thread(target=bulk, args=(connection, tls), daemon=True).start()

    def bulk(connection: socket.socket, tls: bool) -> None:
        with contextlib.suppress(OSError):
            if tls:
                connection = context.wrap_socket(connection, server_side=True)
            while request := connection.recv(4096):
                size = int(request.split(b" ", 2)[1][1:])
                connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % size)
                connection.sendall(body[:size])

    class Heads(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            answer = b'HTTP/1.1 200 OK\r\nContent-Length: 1\r\nETag: "x"\r\nx-amz-meta-i: ' + b"x" * 200 + b"\r\n\r\n"
            asyncio.get_running_loop().call_later(DELAY_S, self.transport.write, answer)

    async def heads() -> None:
        server = await asyncio.get_running_loop().create_server(Heads, sock=listeners[2])
        await server.serve_forever()

    listeners = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(3)]
    print(*(listener.getsockname()[1] for listener in listeners), flush=True)
    for listener, tls in zip(listeners[:2], (False, True), strict=True):
        threading.Thread(target=answer_bulk, args=(listener, tls), daemon=True).start()
    asyncio.run(heads())


# Bulk reads. Each returns when `count` ranges have been read over CONNECTIONS connections.


def read_head(connection: socket.socket) -> None:
    """Exactly the head: peeked at first, so that no byte of the body goes anywhere but into its buffer."""
    head = connection.recv(4096, socket.MSG_PEEK)
    connection.recv(head.index(b"\r\n\r\n") + 4)


def read_threads(port: int, count: int, flags: int, context: ssl.SSLContext | None = None) -> None:
    def work(share: int) -> None:
        buffer = memoryview(bytearray(SIZE))
        connection = socket.create_connection(("127.0.0.1", port))
        connection.settimeout(None)
        if context:
            connection = context.wrap_socket(connection, server_hostname="localhost")
        with connection:
            for _ in range(share):
                connection.sendall(REQUEST % SIZE)
                if context:
                    connection.recv(4096)
                else:
                    read_head(connection)
                filled = 0
                while filled < SIZE:
                    filled += connection.recv_into(buffer[filled:], 0, *([] if context else [flags]))

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        list(threads.map(work, [count // CONNECTIONS] * CONNECTIONS))


class Bulk(asyncio.BufferedProtocol):
    def __init__(self, share: int) -> None:
        self.left, self.filled = share, -1
        self.head, self.buffer = memoryview(bytearray(256)), memoryview(bytearray(SIZE))
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(REQUEST % SIZE)

    def get_buffer(self, hint: int) -> memoryview:
        return self.head if self.filled < 0 else self.buffer[self.filled :]

    def buffer_updated(self, count: int) -> None:
        if self.filled < 0:
            end = bytes(self.head[:count]).index(b"\r\n\r\n") + 4
            self.buffer[: count - end] = self.head[end:count]
            count, self.filled = count - end, 0
        self.filled += count
        if self.filled == SIZE:
            self.left, self.filled = self.left - 1, -1
            if self.left:
                self.transport.write(REQUEST % SIZE)
            else:
                self.transport.close()
                self.done.set_result(None)


def read_buffered(port: int, count: int, context: ssl.SSLContext | None = None) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        options = {"ssl": context, "server_hostname": "localhost"} if context else {}
        pairs = [
            await loop.create_connection(lambda: Bulk(count // CONNECTIONS), "127.0.0.1", port, **options)
            for _ in range(CONNECTIONS)
        ]
        await asyncio.gather(*(protocol.done for _, protocol in pairs))

    asyncio.run(run())


# Heads: all `count` in flight at once over connections that are open already; the seconds from first to last.


class Head(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.done.set_result(data)


def head_protocols(port: int, count: int) -> tuple[float, float]:
    async def run() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(Head, "127.0.0.1", port) for _ in range(count)]

        async def one(head: Head) -> bytes:
            head.done = loop.create_future()
            head.transport.write(HEAD)
            return await head.done

        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one(head) for _, head in made))
        spent = time.perf_counter() - began, time.process_time() - cpu
        for transport, _ in made:
            transport.close()
        return spent

    return asyncio.run(run())


def head_epoll(port: int, count: int) -> tuple[float, float]:
    async def run() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        poller, made, waiting = select.epoll(), {}, {}
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setblocking(False)
            poller.register(connection, select.EPOLLIN)
            made[connection.fileno()] = connection

        def arrived() -> None:
            for number, _ in poller.poll(0):
                waiting.pop(number).set_result(made[number].recv(16384))

        async def one(number: int) -> bytes:
            waiting[number] = done = loop.create_future()
            made[number].send(HEAD)
            return await done

        loop.add_reader(poller.fileno(), arrived)
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one(number) for number in made))
        spent = time.perf_counter() - began, time.process_time() - cpu
        loop.remove_reader(poller.fileno())
        for connection in made.values():
            connection.close()
        return spent

    return asyncio.run(run())


def head_threads(port: int, count: int) -> tuple[float, float]:
    made = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]

    def one(connection: socket.socket) -> bytes:
        connection.send(HEAD)
        return connection.recv(16384)

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda _: time.sleep(0.05), made))
        began, cpu = time.perf_counter(), time.process_time()
        list(threads.map(one, made))
        spent = time.perf_counter() - began, time.process_time() - cpu
    for connection in made:
        connection.close()
    return spent


# The measurement.


@contextlib.contextmanager
def hogging(wanted: bool) -> Iterator[None]:
    ended = threading.Event()

    def hog() -> None:
        while not ended.is_set():
            sum(range(1000))

    thread = threading.Thread(target=hog)
    if wanted:
        os.sched_setaffinity(0, range(os.cpu_count()))
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if wanted:
            thread.join()
            os.sched_setaffinity(0, {0})


def measure_bulk(read: Callable[[int], None]) -> dict[str, float]:
    quick, slow = 128, 32
    seconds, cpu, hogged = [], [], []
    read(CONNECTIONS)
    for _ in range(3):
        began, spent = time.perf_counter(), time.process_time()
        read(quick)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - spent)
    with hogging(True):
        for _ in range(3):
            began = time.perf_counter()
            read(slow)
            hogged.append(time.perf_counter() - began)
    return {
        "mb_per_s": round(quick * SIZE / 1e6 / statistics.median(seconds)),
        "cpu_s_per_gb": round(statistics.median(cpu) / (quick * SIZE / 1e9), 3),
        "mb_per_s_beside_a_hog": round(slow * SIZE / 1e6 / statistics.median(hogged)),
    }


def measure_heads(run: Callable[[int, int], tuple[float, float]], port: int) -> dict[str, float]:
    rounds = [run(port, 512) for _ in range(3)]
    with hogging(True):
        hogged = [run(port, 512)[0] for _ in range(3)]
    return {
        "ms": round(1e3 * statistics.median(wall for wall, _ in rounds)),
        "cpu_us_per_head": round(1e6 / 512 * statistics.median(cpu for _, cpu in rounds)),
        "ms_beside_a_hog": round(1e3 * statistics.median(hogged)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pem = str(Path(folder, "pem"))
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
        subprocess.run([*command, *subject, "-keyout", pem, "-out", pem], check=True, capture_output=True)
        server = subprocess.Popen([sys.executable, __file__, "serve", pem], stdout=subprocess.PIPE, text=True)
        try:
            ports = [int(number) for number in server.stdout.readline().split()]
            os.sched_setaffinity(0, {0})
            run(*ports, ssl.create_default_context(cafile=pem))
        finally:
            server.kill()
            server.wait()


def run(plain: int, tls: int, heads: int, context: ssl.SSLContext) -> None:
    bulk = {
        "threads, recv_into MSG_WAITALL": partial(read_threads, plain, flags=socket.MSG_WAITALL),
        "threads, recv_into": partial(read_threads, plain, flags=0),
        "BufferedProtocol": partial(read_buffered, plain),
        "threads, TLS 1.3": partial(read_threads, tls, flags=0, context=context),
        "BufferedProtocol, TLS 1.3": partial(read_buffered, tls, context=context),
    }
    ways = {"asyncio.Protocol": head_protocols, "epoll inside the loop": head_epoll, "threads": head_threads}
    result: dict[str, dict[str, dict[str, float]]] = {"get_8_mib_x_8": {}, "head_x_512_at_20_ms": {}}
    for name, read in bulk.items():
        result["get_8_mib_x_8"][name] = measure_bulk(lambda count, read=read: read(count=count))
        print(f"{name:34}", result["get_8_mib_x_8"][name], flush=True)
    for name, way in ways.items():
        result["head_x_512_at_20_ms"][name] = measure_heads(way, heads)
        print(f"{name:34}", result["head_x_512_at_20_ms"][name], flush=True)
    record("data_plane", result)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["serve"] else main()
