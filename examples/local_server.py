"""S3 servers on this machine, for development and tests: find or build the program, start it, stop it for certain."""

from __future__ import annotations

import fcntl
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

from minio import Minio
from urllib3 import PoolManager
from urllib3.util import Retry

START_S = 90.0
STOP_S = 5.0


_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvstore-s3" / "servers"


class ServerMissingError(Exception):
    """A server cannot be had here; the message says what to install."""


@dataclass(frozen=True, slots=True)
class GoProgram:
    """A server that is built by `go install`, at the one version that it was tested with."""

    name: str
    package: str
    version: str

    @property
    def cached(self) -> Path:
        return _CACHE / f"{self.name}-{self.version}" / self.name

    def find(self) -> Path | None:
        """The program on PATH, or the one built earlier."""
        found = shutil.which(self.name)
        return Path(found) if found else self.cached if self.cached.is_file() else None

    def build(self) -> Path:
        """Build the program into the cache; minutes, once: who comes meanwhile waits. Raises ServerMissingError."""
        self.cached.parent.mkdir(parents=True, exist_ok=True)
        with Path(self.cached.parent, "lock").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            return self.find() or self._build()

    def _build(self) -> Path:
        go = shutil.which("go")
        if go is None:
            raise ServerMissingError(f"{self.name} is not installed, and neither is go, which could build it")
        print(f"building {self.name} {self.version} with go (once; takes minutes)", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=self.cached.parent) as target:
            environment = {**os.environ, "GOBIN": target, "CGO_ENABLED": "0"}
            built = subprocess.run(
                [go, "install", f"{self.package}@{self.version}"], env=environment, capture_output=True, text=True
            )
            if built.returncode:
                raise ServerMissingError(f"go could not build {self.name}: {built.stderr.strip()[-500:]}")
            Path(target, self.name).rename(self.cached)
        return self.cached


MINIO = GoProgram("minio", "github.com/minio/minio", "v0.0.0-20260212201848-7aac2a2c5b7c")
VERSITYGW = GoProgram("versitygw", "github.com/versity/versitygw/cmd/versitygw", "v1.8.0")


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running S3 server: where it listens, and the credentials it was started with."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    pid: int

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server, and nothing from ~/.aws."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "KVSTORE_S3_ENDPOINT_URL": self.endpoint,
            "NO_PROXY": "127.0.0.1",
        }

    @contextmanager
    def client(self) -> Iterator[Minio]:
        """MinIO's SDK for this server; its connections are closed at the end, or the server would wait for them."""
        # A server that has just started may still answer 503, with the advice to come back in a minute.
        retries = Retry(10, status_forcelist=[503], backoff_factor=0.05, respect_retry_after_header=False)
        address = urlsplit(self.endpoint).netloc
        with PoolManager(retries=retries) as connections:
            yield Minio(address, self.access_key, self.secret_key, secure=False, http_client=connections)

    def make_bucket(self, name: str) -> None:
        """Create the bucket if it is not there yet."""
        with self.client() as client:
            if not client.bucket_exists(name):
                client.make_bucket(name)


def free_port() -> int:
    with reserved_port() as port:
        return port


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1 that the system gives to nobody else meanwhile.

    A server that is told to listen on it can, as nobody does yet, and servers set SO_REUSEADDR, too.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


# Runs the command so that it gets SIGTERM when the thread that started it ends, however that comes about.
_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path, *, bound: bool) -> subprocess.Popen[bytes]:
    """Start a server in a process group of its own, so that Ctrl-C reaches it through us alone.

    `bound`: it ends with the thread that called this.
    """
    wrapper = [sys.executable, "-I", "-c", _BOUND, str(os.getpid())] if bound else []
    with log.open("ab") as output:
        return subprocess.Popen(
            [*wrapper, *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def wait_ready(name: str, process: subprocess.Popen[bytes], endpoint: str, path: str, log: Path) -> None:
    """Return when the server answers `path` with less than 500; raise ServerMissingError when it ends or is late."""
    deadline = monotonic() + START_S
    while not _answers(endpoint, path):
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)  # a server tells nobody when it begins to listen; but its end is an event
        if process.returncode is not None or monotonic() > deadline:
            state = "ended" if process.returncode is not None else "did not answer"
            tail = log.read_text(errors="replace").strip()[-500:]
            raise ServerMissingError(f"{name} {state} while starting: {tail}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it started."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, what)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)
            return
    process.wait()


@contextmanager
def running(
    name: str,
    command: Callable[[int], Sequence[str]],
    *,
    credentials: tuple[str, str],
    environment: Mapping[str, str],
    ready_path: str = "/",
    port: int | None = None,
) -> Iterator[LocalServer]:
    """Run a server on a port of 127.0.0.1, a free one unless given, until the end of the block."""
    reserved = nullcontext(port) if port else reserved_port()
    with tempfile.TemporaryDirectory(prefix="kvstore-s3-") as scratch, reserved as chosen:
        log = Path(scratch, "log")
        endpoint = f"http://127.0.0.1:{chosen}"
        process = spawn(command(chosen), environment, log, bound=True)
        try:
            wait_ready(name, process, endpoint, ready_path, log)
            yield LocalServer(name, endpoint, *credentials, process.pid)
        finally:
            stop(process)


def _answers(endpoint: str, path: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
