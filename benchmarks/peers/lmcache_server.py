"""LMCache beside us: its server over the same MinIO, in its multi-process mode, the only one that runs on a CPU."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

if TYPE_CHECKING:
    from local_server import LocalServer

START_S = 240.0


class PeerMissingError(Exception):
    """LMCache cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class LMCache:
    """Its environment, and the bucket that it uses by virtual host, `bucket`.`domain`."""

    venv: Path
    server: LocalServer
    bucket: str
    domain: str
    folder: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin/python"

    @property
    def host(self) -> str:
        return f"{self.bucket}.{self.domain}"

    def connector(self, port: int) -> dict[str, Any]:
        """The kv_transfer_config of an engine that asks the server on `port`."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port},
        }

    def environment(self) -> dict[str, str]:
        """Nothing of ours: PYTHONPATH leads to this checkout."""
        return {"LMCACHE_TRACK_USAGE": "false", "PYTHONPATH": ""}

    @contextmanager
    def running(self) -> Iterator[int]:
        """Its server, with empty memory, on a port. Raises `PeerMissingError`."""
        from local_server import free_port, spawn, stop

        port, http_port, log = free_port(), free_port(), self.folder / "lmcache-server.log"
        command = self._in_our_network(list(self._command(port, http_port)))
        environment = self.environment() | {"PYTHONHASHSEED": "0"}
        process = spawn(command, environment, log, bound=True)
        try:
            _await_answer(process, http_port, log)
            yield port
        finally:
            stop(process)

    def version(self) -> str:
        code = "import importlib.metadata as m; print(m.version('lmcache'))"
        found = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    def _command(self, port: int, http_port: int) -> Iterator[str]:
        endpoint = urlsplit(self.server.endpoint)
        adapter = {
            "type": "s3",
            "s3_endpoint": f"s3://{self.host}:{endpoint.port}",
            "s3_region": "us-east-1",
            "s3_num_io_threads": 4,
            "s3_prefer_http2": False,
            "disable_tls": True,
            "aws_access_key_id": self.server.access_key,
            "aws_secret_access_key": self.server.secret_key,
        }
        from local_server import free_port

        yield from [str(self.venv / "bin/lmcache"), "server", "--host", "localhost", "--port", str(port)]
        yield from ["--chunk-size", "256", "--supported-transfer-mode", "auto", "--l1-size-gb", "1"]
        yield from ["--no-l1-use-lazy", "--http-port", str(http_port), "--prometheus-port", str(free_port())]
        yield from ["--max-workers", "2", "--eviction-policy", "LRU", "--l2-adapter", json.dumps(adapter)]

    def _in_our_network(self, command: list[str]) -> list[str]:
        """The command, where `host` leads to this machine: as it is, or with a hosts file that only it sees."""
        with suppress(OSError):
            if socket.gethostbyname(self.host) == "127.0.0.1":
                return command
        hosts = self.folder / "hosts"
        hosts.write_text(Path("/etc/hosts").read_text() + f"\n127.0.0.1 {self.domain} {self.host}\n")
        mount = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts"
        if shutil.which("unshare") is None or _run(["unshare", "--mount", "sh", "-c", mount]):
            raise PeerMissingError(
                f"LMCache addresses buckets by virtual host: add '127.0.0.1 {self.domain} {self.host}' to /etc/hosts, "
                "or run as root, which can give it a hosts file of its own"
            )
        return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]


def _run(command: list[str]) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode


def find_lmcache(server: LocalServer, bucket: str, domain: str, folder: Path) -> LMCache:
    """LMCache in the environment that BENCH_LMCACHE_VENV names. Raises `PeerMissingError`."""
    venv = os.environ.get("BENCH_LMCACHE_VENV", "")
    if not venv or not Path(venv, "bin/lmcache").exists():
        raise PeerMissingError("there is no environment with LMCache; make bench-vllm builds one")
    return LMCache(Path(venv), server, bucket, domain, folder)


def _await_answer(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not _answers(port):
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        if process.returncode is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace").strip()[-500:]
            raise PeerMissingError(f"LMCache's server did not start: {tail}")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
