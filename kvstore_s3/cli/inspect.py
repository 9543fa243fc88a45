"""ls and stat: what a store holds, from its listing and, for details, from headers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvstore_s3.bitstream import PARTS_KV, PROFILES, Header
from kvstore_s3.calibrations import read_current
from kvstore_s3.cli.inventory import (
    NamespaceTotals,
    check_prefix,
    choose_namespace,
    open_objects,
    parse_name,
    take_inventory,
)
from kvstore_s3.cli.output import Report, align_table, count_noun, format_bytes
from kvstore_s3.cli.verify import expect_identity, read_header
from kvstore_s3.errors import DamagedObjectError, ObjectNotFoundError
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.quality import QUALITIES

if TYPE_CHECKING:
    from kvstore_s3.config import Settings

SAMPLE_OBJECTS = 64
"""Headers that stat reads for its details."""

CODEC_NAMES = {0: "raw", 1: "lossless", 2: "planes", 3: "scalable", 4: "nothing", 5: "cachegen"}
_PROFILE_NAMES = {number: name for name, number in PROFILES.items()}


def list_store(settings: Settings, prefix: str | None) -> Report:
    """List namespaces, or the chunks of the one that starts with `prefix`."""
    return asyncio.run(_list_store(settings, check_prefix(prefix)))


def stat_store(settings: Settings, prefix: str | None) -> Report:
    """Totals of the store, or details of the namespace that starts with `prefix`."""
    return asyncio.run(_stat_store(settings, check_prefix(prefix)))


async def _list_store(settings: Settings, prefix: str) -> Report:
    async with open_objects(settings) as objects:
        namespaces, foreign = await take_inventory(objects, prefix)
        if prefix:
            return await _list_chunks(objects, namespaces[choose_namespace(namespaces, prefix)])
        rows = [summarise(totals) for totals in namespaces.values()]
        header = ("NAMESPACE", "MODEL", "DTYPE", "CHUNKS", "TOKENS", "SIZE", "BITS/VALUE")
        cells = [
            (
                row["namespace"][:16],
                row["model"] or row["problem"],
                row["dtype"] or "-",
                f"{row['chunks']:,}",
                "-" if row["tokens"] is None else f"{row['tokens']:,}",
                format_bytes(row["bytes"]),
                _format_bits(row["bits_per_value"]),
            )
            for row in rows
        ]
        lines = align_table(header, cells) if rows else [f"nothing stored in {objects.url}"]
        return Report({"store": objects.url, "namespaces": rows, "foreign": foreign}, lines)


async def _list_chunks(objects: ObjectStore, totals: NamespaceTotals) -> Report:
    sizes: dict[bytes, tuple[int, int]] = {}
    async for info in objects.list(f"{totals.hex}/"):
        name = parse_name(info.key)
        if name is not None and name.key is not None:
            count, size = sizes.get(name.key, (0, 0))
            sizes[name.key] = (count + 1, size + info.size)
    found = sorted(sizes.items())
    chunks = [{"chunk": key.hex(), "shards": count, "bytes": size} for key, (count, size) in found]
    lines = align_table(
        ("CHUNK", "SHARDS", "BYTES"), [(key.hex(), str(count), f"{size:,}") for key, (count, size) in found]
    )
    return Report({"store": objects.url, **summarise(totals), "chunk_list": chunks}, lines)


async def _stat_store(settings: Settings, prefix: str) -> Report:
    async with open_objects(settings) as objects:
        namespaces, foreign = await take_inventory(objects, prefix)
        if prefix:
            totals = namespaces[choose_namespace(namespaces, prefix)]
            details = await _sample_headers(objects, totals)
            return _describe_namespace(objects.url, totals, details, await _find_current(objects, totals))
        data: dict[str, Any] = {
            "store": objects.url,
            "namespaces": len(namespaces),
            "objects": sum(totals.objects for totals in namespaces.values()),
            "chunks": sum(len(totals.chunks) for totals in namespaces.values()),
            "tokens": sum(totals.tokens or 0 for totals in namespaces.values()),
            "bytes": sum(totals.size for totals in namespaces.values()),
            "foreign": foreign,
        }
        lines = [
            f"store       {objects.url}",
            f"namespaces  {data['namespaces']:,}",
            f"chunks      {data['chunks']:,} in {count_noun(data['objects'], 'object')}",
            f"tokens      {data['tokens']:,}",
            f"size        {format_bytes(data['bytes'])}",
        ]
        if foreign:
            lines.append(f"foreign     {count_noun(foreign, 'object')} not written by kvstore_s3")
        return Report(data, lines)


def summarise(totals: NamespaceTotals) -> dict[str, Any]:
    """One namespace as a row of JSON; None where its description is missing or damaged."""
    namespace = totals.namespace
    return {
        "namespace": totals.hex,
        "model": namespace and namespace.model,
        "revision": namespace and namespace.revision,
        "dtype": namespace and namespace.layout.dtype,
        "chunk_tokens": namespace and namespace.chunk_tokens,
        "objects": totals.objects,
        "chunks": len(totals.chunks),
        "incomplete_chunks": totals.incomplete,
        "tokens": totals.tokens,
        "bytes": totals.size,
        "bits_per_value": totals.bits_per_value and round(totals.bits_per_value, 3),
        "calibrations": [digest.hex() for digest in sorted(totals.calibrations)],
        "problem": totals.problem,
    }


@dataclass(slots=True)
class _Sample:
    """What the headers say. `level_bytes` and `values` are those of scalable objects."""

    headers: int = 0
    damaged: int = 0
    codecs: Counter[str] = field(default_factory=Counter)
    sections: Counter[int] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)
    calibrations: Counter[str] = field(default_factory=Counter)
    level_bytes: Counter[int] = field(default_factory=Counter)
    values: int = 0

    def add(self, header: Header) -> None:
        identity, sections = header.identity, header.table.sections
        profile = _PROFILE_NAMES[header.table.profile]
        self.headers += 1
        self.codecs.update(CODEC_NAMES.get(section.codec, str(section.codec)) for section in sections)
        self.sections[len(sections)] += 1
        self.profiles[profile] += 1
        if profile == "scalable":
            self.calibrations[header.calibration.hex() if header.calibration else "none"] += 1
            self.level_bytes.update(dict.fromkeys(range(sections[-1].level + 1), 0))
            for section in sections:
                self.level_bytes[section.level] += section.stored_length
            self.values += identity.raw_bytes(identity.shard.layers, PARTS_KV) // identity.layout.itemsize

    def bits_by_quality(self) -> dict[str, float]:
        """Bits a value that a reader of each quality reads of the scalable objects, headers aside."""
        found = {}
        for quality in QUALITIES.values():
            if self.values and quality.object_profile == "scalable" and quality.levels <= len(self.level_bytes):
                read = sum(self.level_bytes[level] for level in range(quality.levels))
                found[quality.name] = round(read * 8 / self.values, 3)
        return found


async def _sample_headers(objects: ObjectStore, totals: NamespaceTotals) -> _Sample:
    sample = _Sample()
    if totals.namespace is None:
        return sample
    names = islice(
        ((key, shard) for key in sorted(totals.chunks) for shard in sorted(totals.chunks[key], key=str)), SAMPLE_OBJECTS
    )
    for key, shard in names:
        object_key = f"{totals.hex}/{key.hex()}/{shard.name}"
        name = parse_name(object_key)
        try:
            info = await objects.head(object_key)
            if info is None or name is None:
                continue
            header = await read_header(objects, info, expect_identity(name, totals.namespace))
        except ObjectNotFoundError:
            continue
        except DamagedObjectError:
            sample.damaged += 1
            continue
        sample.add(header)
    return sample


async def _find_current(objects: ObjectStore, totals: NamespaceTotals) -> str | None:
    """The calibration that writers use, None where there is none, or a damaged calibration.json (see check)."""
    try:
        digest = await read_current(objects, totals.hex) if totals.names_calibration else None
    except (DamagedObjectError, ObjectNotFoundError):
        return None
    return digest.hex() if digest else None


def _describe_namespace(url: str, totals: NamespaceTotals, sample: _Sample, current: str | None) -> Report:
    namespace = totals.namespace
    data = {
        "store": url,
        **summarise(totals),
        "identity": None if namespace is None else _identity(namespace),
        "shards": {shard.name: count for shard, count in totals.shards.items()},
        "unmarked_shards": [shard.name for shard in totals.unmarked],
        "sampled_headers": sample.headers,
        "sampled_damaged": sample.damaged,
        "sections_by_codec": dict(sample.codecs),
        "objects_by_profile": dict(sample.profiles),
        "objects_by_calibration": dict(sample.calibrations),
        "levels": len(sample.level_bytes),
        "bits_per_value_by_level": [
            round(sample.level_bytes[level] * 8 / sample.values, 3) for level in sorted(sample.level_bytes)
        ],
        "bits_per_value_by_quality": sample.bits_by_quality(),
        "calibration_bytes": {digest.hex(): size for digest, size in totals.calibrations.items()},
        "current_calibration": current,
        "sections_per_object": {str(count): objects for count, objects in sample.sections.items()},
    }
    lines = [f"namespace     {totals.hex}"]
    if namespace is None:
        lines.append(f"problem       {totals.problem}; run check")
    else:
        layout = namespace.layout
        lines += [
            f"model         {namespace.model}",
            f"revision      {namespace.revision}",
            f"layout        {layout.layers} layers x {layout.kv_heads} KV heads x {layout.head_dim}, {layout.dtype}",
            f"chunk         {namespace.chunk_tokens:,} tokens, {_format_raw_chunk(namespace)} uncompressed",
        ]
    codecs = ", ".join(f"{name} in {count_noun(count, 'section')}" for name, count in sample.codecs.most_common())
    lines += [
        f"chunks        {len(totals.chunks):,} in {count_noun(totals.objects, 'object')}",
        f"tokens        {'-' if totals.tokens is None else f'{totals.tokens:,}'}",
        f"size          {format_bytes(totals.size)}, {_format_bits(totals.bits_per_value)} bits a value",
        f"codecs        {codecs or '-'} ({count_noun(sample.headers, 'header')} read)",
    ]
    if len(totals.shards) > 1 or totals.incomplete:
        lines += _describe_shards(totals)
    if set(sample.profiles) - {"lossless"}:
        lines += _describe_lossy(sample)
    for digest, size in sorted(totals.calibrations.items()):
        used = ", used by writers" if digest.hex() == current else ""
        lines.append(f"calibration   {digest.hex()[:16]}, {format_bytes(size)}{used}")
    if sample.damaged:
        lines.append(f"damaged       {count_noun(sample.damaged, 'header')} of those read; run check")
    return Report(data, lines)


def _describe_shards(totals: NamespaceTotals) -> list[str]:
    counts = ", ".join(f"{shard.name} of {count:,}" for shard, count in sorted(totals.shards.items(), key=str))
    lines = [f"shards        {counts} chunks"]
    if totals.incomplete:
        lines.append(
            f"incomplete    {count_noun(totals.incomplete, 'chunk')} without some layers or heads of the model"
        )
    return lines


def _describe_lossy(sample: _Sample) -> list[str]:
    profiles = ", ".join(f"{name} in {count_noun(count, 'object')}" for name, count in sample.profiles.most_common())
    lines = [f"profiles      {profiles}"]
    if sample.values:
        bits = ", ".join(f"{name} {value:.2f}" for name, value in reversed(sample.bits_by_quality().items()))
        lines.append(f"levels        {len(sample.level_bytes)}; bits a value that are read: {bits}")
        coded = ", ".join(
            f"{'no calibration' if digest == 'none' else digest[:16]} in {count_noun(count, 'object')}"
            for digest, count in sample.calibrations.most_common()
        )
        lines.append(f"coded with    {coded}")
    return lines


def _identity(namespace: Namespace) -> Mapping[str, Any]:
    import json

    document: Mapping[str, Any] = json.loads(namespace.to_json())
    return document


def _format_raw_chunk(namespace: Namespace) -> str:
    return format_bytes(namespace.layout.bytes_per_token * namespace.chunk_tokens)


def _format_bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.2f}"
