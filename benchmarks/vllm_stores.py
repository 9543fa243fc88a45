"""Where the engines of the benchmarks find their KV: a MinIO, and the connectors that use it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

if TYPE_CHECKING:
    from local_server import LocalServer

BUCKET = "kvb"
DOMAIN = "minio.test"
"""LMCache addresses buckets by virtual host only."""
SETTLE_S = 120.0


@dataclass(frozen=True, slots=True)
class Store:
    """A running MinIO and where engines write their logs."""

    server: LocalServer
    folder: Path
    options: Mapping[str, Any]
    """Of our connector, for all engines."""
    prefixes: set[str] = field(default_factory=set)
    """Of our connector's stores, as far as they were asked for."""

    def ours(self, prefix: str, *, role: str = "kv_both", **options: Any) -> dict[str, Any]:
        """The kv_transfer_config of our connector with a store under `prefix`."""
        self.prefixes.add(f"{prefix}/")
        return {
            "kv_connector": "KVStoreS3Connector",
            "kv_connector_module_path": "kvstore_s3.connectors.vllm",
            "kv_role": role,
            "kv_connector_extra_config": {"store": f"s3://{BUCKET}/{prefix}", **self.options, **options},
        }

    def environment(self, **settings: object) -> dict[str, str]:
        """What an engine with our connector needs; `settings` are ours, such as host_tier_bytes."""
        given = {f"KVSTORE_S3_{name.upper()}": str(value) for name, value in settings.items()}
        return self.server.environment() | given

    def chunks(self, prefix: str) -> dict[str, int]:
        """Names and bytes of the objects that are large enough to be KV."""
        with self.server.client() as client:
            found = {item.object_name: item.size or 0 for item in client.list_objects(BUCKET, prefix, recursive=True)}
        return {name: size for name, size in found.items() if name and size > 65536}

    def chunk_sizes(self, prefix: str) -> list[int]:
        """Bytes of each object that is large enough to be KV."""
        return list(self.chunks(prefix).values())

    def chunks_of_others(self) -> list[str]:
        """Names of the objects that our connector has not stored."""
        return [name for name in self.chunks("") if not name.startswith(tuple(self.prefixes))]

    def serve(self, names: Iterable[str]) -> None:
        """Have the server give these objects, to nobody: as a store in service, which was not idle for a minute."""
        with self.server.client() as client:
            for name in names:
                with client.get_object(BUCKET, name) as answer:
                    answer.read()

    def await_chunks(self, prefix: str, count: int) -> int:
        """Wait until `count` objects of KV are there, a moment at most; return how many there are."""
        deadline = time.monotonic() + SETTLE_S
        while (found := len(self.chunk_sizes(prefix))) < count and time.monotonic() < deadline:
            time.sleep(0.25)
        return found

    def settle(self, prefix: str) -> int:
        """Wait until no more objects of KV come, for two seconds; return how many there are."""
        before = -1
        while (found := len(self.chunk_sizes(prefix))) != before:
            before = found
            time.sleep(2)
        return found


@contextmanager
def running_store(folder: Path, **options: Any) -> Iterator[Store]:
    """A MinIO that also answers to virtual hosts below `DOMAIN`. Raises ServerMissingError where none can be had."""
    from minio_server import running_minio

    os.environ["MINIO_DOMAIN"] = DOMAIN
    with running_minio(BUCKET) as server:
        yield Store(server, folder, options)


def await_bytes(folder: Path, least: int) -> int:
    """Wait until files of `least` bytes are in a tier's directory, a moment at most; return how many bytes are."""
    deadline = time.monotonic() + SETTLE_S / 4
    while (found := _bytes_in(folder)) < least and time.monotonic() < deadline:
        time.sleep(0.25)
    return found


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget_pages(folder: Path) -> None:
    """Drop a directory's files from the system's memory, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


OFFLOADING: Mapping[str, dict[str, Any]] = {
    "OffloadingConnector": {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 2**30},
    },
    "OffloadingConnector, fs tier": {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 2**30,
            "secondary_tiers": [{"type": "fs", "root_dir": "FOLDER"}],
        },
    },
    "SimpleCPUOffloadConnector": {
        "kv_connector": "SimpleCPUOffloadConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 2**30},
    },
}
"""The engine's own ways to keep KV elsewhere. FOLDER stands for a directory."""


def offloading(name: str, folder: Path) -> dict[str, Any]:
    """The kv_transfer_config of one of them."""
    config = dict(OFFLOADING[name])
    extra = dict(config["kv_connector_extra_config"])
    if "secondary_tiers" in extra:
        extra["secondary_tiers"] = [{**tier, "root_dir": str(folder)} for tier in extra["secondary_tiers"]]
    return config | {"kv_connector_extra_config": extra}
