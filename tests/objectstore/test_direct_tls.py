"""The direct data plane over TLS: what is verified, and that bytes, cancellation and resumption are as without."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import ssl
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from objectstore.scripted_server import RESET, STALL, Request, kept, running
from objectstore.suite import KEY, PATIENCE_S, read
from objectstore.test_direct import DATA, Scene, descriptors, no_more_descriptors_than, piece, range_of

from kvstore_s3.config import MiB
from kvstore_s3.errors import StoreRefusedError, StoreUnavailableError
from kvstore_s3.objectstore.base import ObjectInfo

pytestmark = pytest.mark.usefixtures("authority")


class Authority:
    """A certificate authority made for these tests, and a server's certificate for 127.0.0.1 or another name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.bundle = folder / "authority.pem"
        self.certificate = self.issue("authority", self.key.public_key(), authority=True)
        self.bundle.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, key: ec.EllipticCurvePublicKey, *, authority: bool) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if authority else self.certificate.subject
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        names = [x509.IPAddress(ipaddress.ip_address(name))] if name[0].isdigit() else [x509.DNSName(name)]
        return builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(self.key, hashes.SHA256())

    def context(self, name: str) -> ssl.SSLContext:
        """What a server called `name` serves with."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = self.folder / f"{name}.pem"
        plain = (
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        certificate = self.issue(name, key.public_key(), authority=False)
        pem.write_bytes(key.private_bytes(*plain) + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def authority(made: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The authority, trusted by AWS_CA_BUNDLE."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASHOWN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(made.bundle))
    return made


async def test_ranges_bodies_and_heads_go_over_tls(authority: Authority) -> None:
    data = os.urandom(3 * MiB)
    stored: list[bytes] = []

    def script(request: Request) -> bytes:
        match request.method:
            case "PUT":
                stored.append(request.body)
                return kept("200 OK", b"", 'ETag: "x"')
            case "HEAD":
                return kept("200 OK", b"", "Content-Length: 7", "x-amz-meta-a: b")
        return piece(request, data=data)

    async with running(script, tls=authority.context("127.0.0.1")) as server:
        scene = Scene(server)
        assert await read(scene.store, KEY, 5, 2 * MiB) == data[5 : 2 * MiB + 5]
        assert await scene.store.put(KEY, data)
        assert await scene.store.put(KEY, data, replace=True)
        assert await scene.store.head(KEY) == ObjectInfo(KEY, 7, {"a": "b"})
        assert await read(scene.store, KEY, 0, 3 * MiB) == data
        assert stored == [data, data]
        assert scene.direct
        assert len(server.connections) == 2  # one for bytes, one for heads
        await scene.store.close()


async def test_a_certificate_of_an_unknown_authority_is_refused_by_every_verb(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE")
    async with running(piece, tls=authority.context("127.0.0.1")) as server:
        scene = Scene(server)
        for attempt in (read(scene.store, KEY, 0, 10), scene.store.head(KEY), scene.store.put(KEY, b"x")):
            with pytest.raises(StoreRefusedError, match=r"offers no valid TLS.*AWS_CA_BUNDLE"):
                await attempt
        assert server.requests == []
        await scene.store.close()


async def test_a_certificate_for_another_name_is_refused(authority: Authority) -> None:
    async with running(piece, tls=authority.context("other.example")) as server:
        scene = Scene(server)
        for attempt in (read(scene.store, KEY, 0, 10), scene.store.head(KEY)):
            with pytest.raises(StoreRefusedError, match="offers no valid TLS"):
                await attempt
        await scene.store.close()


async def test_tls_with_a_server_that_has_none_is_refused(authority: Authority) -> None:
    async with running(piece) as server:
        scene = Scene(server, endpoint_url=server.endpoint.replace("http:", "https:"), max_attempts=1)
        for attempt in (read(scene.store, KEY, 0, 10), scene.store.head(KEY)):
            with pytest.raises((StoreRefusedError, StoreUnavailableError)):
                await attempt
        await scene.store.close()


async def test_a_body_that_breaks_is_resumed_over_tls(authority: Authority) -> None:
    def script(request: Request) -> bytes:
        return piece(request, send=None if range_of(request)[0] else 300)

    async with running(script, tls=authority.context("127.0.0.1")) as server:
        scene = Scene(server)
        assert await read(scene.store, KEY, 0, 1000) == DATA[:1000]
        assert [range_of(request)[0] for request in server.requests] in ([0, 300], [0, 0])  # a reset may overtake bytes
        await scene.store.close()


async def test_an_idle_tls_connection_that_the_server_closed_is_no_failure(authority: Authority) -> None:
    async with running(piece, tls=authority.context("127.0.0.1")) as server:
        scene = Scene(server, max_attempts=1)
        await read(scene.store, KEY, 0, 10)
        await server.hang_up()
        assert await read(scene.store, KEY, 0, 10) == DATA[:10]
        await scene.store.close()


async def test_a_transfer_over_tls_that_stalls_is_given_up(authority: Authority) -> None:
    stalled = kept("206 Partial Content", b"x" * 10, "Content-Length: 1000", "Content-Range: bytes 0-999/1000") + STALL
    turn = iter([piece])

    def script(request: Request) -> bytes:
        return next(turn, lambda _: stalled)(request)

    async with running(script, tls=authority.context("127.0.0.1")) as server:
        scene = Scene(server, read_timeout_s=60.0, max_attempts=1)
        await read(scene.store, KEY, 0, 10)  # with it, the handshake is over, which may take long
        plane = scene.store._client._plane
        plane._limits = replace(plane._limits, window_s=0.3)
        plane._connections._idle[-1][0]._sock.settimeout(0.3)
        with pytest.raises(StoreUnavailableError, match="did not answer in time"):
            await asyncio.wait_for(read(scene.store, KEY, 0, 1000), PATIENCE_S)
        assert scene.count("slow_transfers") == 1
        await scene.store.close()


@pytest.mark.parametrize("turns", [0, 1, 3, 10, 50])
async def test_a_cancelled_read_over_tls_ends_at_once_and_leaves_no_connection(
    authority: Authority, turns: int
) -> None:
    stalled = kept("206 Partial Content", b"x" * 10, "Content-Length: 1000", "Content-Range: bytes 0-999/1000") + STALL
    turn = iter([piece])

    def script(request: Request) -> bytes:
        return next(turn, lambda _: stalled)(request)

    async with running(script, tls=authority.context("127.0.0.1")) as server:
        scene = Scene(server, read_timeout_s=60.0)
        await read(scene.store, KEY, 0, 10)
        before = descriptors()
        task = asyncio.create_task(read(scene.store, KEY, 0, 1000))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE_S)
        await no_more_descriptors_than(before, server)
        await scene.store.close()


async def test_a_server_that_breaks_off_the_handshake_is_unavailable() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, running(lambda _: RESET) as other:
        scene = Scene(other, endpoint_url=f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", max_attempts=1)
        for attempt in (read(scene.store, KEY, 0, 10), scene.store.head(KEY)):
            with pytest.raises(StoreUnavailableError):
                await attempt
        await scene.store.close()
