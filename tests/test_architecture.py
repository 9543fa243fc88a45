"""Imports point one way. This file is the rule; `make check` runs it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kvstore_s3"

LAYERS = {
    "errors": 1,
    "config": 1,
    "metrics": 1,
    "arena": 2,
    "bitstream": 2,
    "covers": 2,
    "families": 2,
    "hashing": 2,
    "hub": 2,
    "layout": 2,
    "namespace": 2,
    "pace": 2,
    "planner": 2,
    "quality": 2,
    "recycling": 2,
    "rope": 2,
    "section_index": 2,
    "weights": 2,
    "codec": 3,
    "objectstore": 3,
    "tier": 3,
    "transfer": 3,
    "arguments": 4,
    "assembly": 4,
    "calibrations": 4,
    "device_load": 4,
    "device_pages": 4,
    "device_save": 4,
    "devices": 4,
    "encode": 4,
    "gauges": 4,
    "hits": 4,
    "inspection": 4,
    "load": 4,
    "loader": 4,
    "lookup": 4,
    "reader": 4,
    "runtime": 4,
    "saving": 4,
    "shards": 4,
    "shared_link": 4,
    "store": 4,
    "streaming": 4,
    "tiers": 4,
    "verdicts": 4,
    "cli": 5,
    "connectors": 5,
}
"""Room -> layer. A room imports lower layers, and its own layer as far as `SAME_LAYER` says."""

SAME_LAYER = {1, 2, 4}
"""Layers whose rooms may import each other. On layer 3 siblings are strangers; on 5 only cli may use connectors."""

SHARED_WITH_SIBLINGS = ("kvstore_s3.objectstore.base", "kvstore_s3.objectstore.awaiting")
"""What transfer and tier may know of the object stores."""

ENGINES = {"transformers", "vllm", "sglang", "peft"}
PURE = {
    "bitstream",
    "errors",
    "families",
    "hashing",
    "layout",
    "metrics",
    "namespace",
    "planner",
    "quality",
    "rope",
    "section_index",
    "weights",
}
NATIVE_USERS = {"kvstore_s3.codec", "kvstore_s3.transfer.buffers"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the rooms; write them out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "kvstore_s3" else None


def violation(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`, or None."""
    here, there = room_of(importer), room_of(imported)
    if imported.split(".")[0] in ENGINES and here != "connectors":
        return "only connectors import an engine"
    if there == "_native" and not any(importer == user or importer.startswith(user + ".") for user in NATIVE_USERS):
        return "only the codecs and transfer.buffers use the native module"
    if here in PURE and imported.split(".")[0] in {"torch", "aiobotocore", "asyncio", "typer"}:
        return "pure rooms neither compute with torch nor do I/O"
    if here is None or there is None or there == "_native" or here == there or there.startswith("__"):
        return None
    if here not in LAYERS or there not in LAYERS:
        return "a room that is not in LAYERS"
    if LAYERS[there] < LAYERS[here]:
        return None
    if LAYERS[there] > LAYERS[here]:
        return "imports point downwards only"
    if LAYERS[here] in SAME_LAYER or (here, there) == ("cli", "connectors"):
        return None
    if here in ("transfer", "tier") and imported.startswith(SHARED_WITH_SIBLINGS):
        return None
    return "siblings do not import each other"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [(name, why) for name in imports_of(tree) if (why := violation(name_of(path), name))]
    assert found == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_config_reads_the_environment(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {name.rpartition(".")[2] for name in imports_of(tree)}
    assert name_of(path) == "kvstore_s3.config" or not (attributes | imported) & {"environ", "environb", "getenv"}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec"}
    assert not {name.split(".")[0] for name in imports_of(tree)} & {
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
    }


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("kvstore_s3.hashing", "kvstore_s3.store"),
        ("kvstore_s3.codec.lossless", "kvstore_s3.objectstore.base"),
        ("kvstore_s3.transfer.prefetcher", "kvstore_s3.objectstore.s3"),
        ("kvstore_s3.store", "kvstore_s3.cli"),
        ("kvstore_s3.connectors.transformers", "kvstore_s3.cli"),
        ("kvstore_s3.cli.warm", "transformers.AutoModel"),
        ("kvstore_s3.store", "kvstore_s3._native"),
        ("kvstore_s3.layout", "torch"),
        ("kvstore_s3.store", "kvstore_s3.brand_new_room"),
    ],
)
def test_the_rule_refuses(importer: str, imported: str) -> None:
    assert violation(importer, imported) is not None


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("kvstore_s3.transfer.prefetcher", "kvstore_s3.objectstore.base.ObjectStore"),
        ("kvstore_s3.store", "kvstore_s3.codec.registry"),
        ("kvstore_s3.cli.warm", "kvstore_s3.connectors.transformers"),
        ("kvstore_s3.codec.lossless", "kvstore_s3._native"),
        ("kvstore_s3.connectors.transformers", "transformers.DynamicCache"),
    ],
)
def test_the_rule_allows(importer: str, imported: str) -> None:
    assert violation(importer, imported) is None
