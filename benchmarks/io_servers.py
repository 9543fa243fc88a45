"""The servers that bench-io measures against: byte_server.cpp, built here, and a real MinIO, on the server's core."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

BYTE_SERVER = "byte server"
BUCKET = "kvstore"
OBJECT = "bench/object"
OBJECT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a client goes, and with which credentials. `authority`: file of the certificate to trust, for https."""

    name: str
    url: str
    access_key: str
    secret_key: str
    authority: str | None = None

    @property
    def only_moves_bytes(self) -> bool:
        return self.name == BYTE_SERVER

    def environment(self) -> dict[str, str]:
        """What a client that reads the default AWS chain needs, and nothing from ~/.aws."""
        found = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
        return found | ({"AWS_CA_BUNDLE": self.authority, "SSL_CERT_FILE": self.authority} if self.authority else {})


def choose_cores() -> tuple[int, int]:
    """The client's core and the server's: two where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


def pin(process: int, core: int) -> None:
    """Keep all threads of `process` on `core`; those that they start will stay there too."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def object_bytes() -> bytes:
    """The content of OBJECT: 64-bit words that count, so that any range of it can be checked."""
    return np.arange(OBJECT_BYTES // 8, dtype="<u8").tobytes()


def build_byte_server(folder: Path) -> tuple[Path, bool]:
    """The program, and whether it speaks TLS: that needs OpenSSL's headers."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("bench-io needs a C++ compiler for its byte server (set CXX)")
    program, source = folder / "byte_server", HERE / "byte_server.cpp"
    plain = [compiler, "-std=c++20", "-O2", "-o", str(program), str(source)]
    if subprocess.run([*plain, "-DWITH_TLS", "-lssl", "-lcrypto"], capture_output=True).returncode == 0:
        return program, True
    print("TLS: skipped, the byte server was built without it (Debian, Ubuntu: apt install libssl-dev)")
    subprocess.run(plain, check=True)
    return program, False


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A key and its own certificate for 127.0.0.1, by the openssl program."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    # rustls takes no authority for a server's certificate, nor the other way round: this one is the server's alone.
    usage = ["-addext", "basicConstraints=critical,CA:FALSE"]
    command = ["openssl", "req", "-x509", *kind, *subject, *usage, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@contextmanager
def byte_server(program: Path, *, tls: tuple[Path, Path] | None = None, latency_ms: int = 0) -> Iterator[Endpoint]:
    """A byte server on the server's core, with the bucket's OBJECT in it."""
    secure = ["--certificate", str(tls[0]), "--key", str(tls[1])] if tls else []
    command = [str(program), "--latency-ms", str(latency_ms), *secure]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            pin(process.pid, choose_cores()[1])
            url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
            endpoint = Endpoint(BYTE_SERVER, url, "bench", "bench-secret-key", str(tls[0]) if tls else None)
            put_object(endpoint)
            yield endpoint
        finally:
            process.kill()


def put_object(endpoint: Endpoint) -> None:
    address = urlsplit(endpoint.url).netloc
    if endpoint.authority:
        context = ssl.create_default_context(cafile=endpoint.authority)
        connection: HTTPConnection = HTTPSConnection(address, context=context)
    else:
        connection = HTTPConnection(address)
    connection.request("PUT", f"/{BUCKET}/{OBJECT}", body=object_bytes())
    assert connection.getresponse().status == 200
    connection.close()


@contextmanager
def minio() -> Iterator[Endpoint | None]:
    """A real MinIO on the server's core, with the bucket's OBJECT in it; None, said, where there is none to be had."""
    import io

    from local_server import ServerMissingError
    from minio_server import running_minio

    try:
        context = running_minio(BUCKET)
        server = context.__enter__()
    except ServerMissingError as error:
        print(f"MinIO: skipped, {error}")
        yield None
        return
    try:
        pin(server.pid, choose_cores()[1])
        with server.client() as client:
            client.put_object(BUCKET, OBJECT, io.BytesIO(object_bytes()), OBJECT_BYTES, part_size=OBJECT_BYTES)
        yield Endpoint("MinIO", server.endpoint, server.access_key, server.secret_key)
    finally:
        context.__exit__(None, None, None)
