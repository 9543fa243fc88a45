"""This package's profiles, measured through its own save and load; and CacheGen as published, which it has too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.bitstream import Header, parse_header
from kvstore_s3.codec.calibration import Calibration, calibration_digest
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.connectors.transformers.calibrating import CalibrateOptions, calibrate
from kvstore_s3.connectors.transformers.windows import plan_windows
from kvstore_s3.encode import Encoding, encode_object, view_bits
from kvstore_s3.load import decode_section
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.memory import MemoryStore
from kvstore_s3.quality import QUALITIES, Quality
from quality.corpus import CHUNK, Corpus
from quality.measure import Judge, Point, Values

SCALABLE = ("small", "balanced", "near-lossless")
TIMED_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of coding: a line of the tables. `artefact` are the bytes of a calibration, None without one."""

    name: str
    artefact: bytes | None = None
    calibration: Calibration | None = None
    seconds: float = 0.0

    @property
    def digest(self) -> bytes | None:
        return None if self.artefact is None else calibration_digest(self.artefact)

    def encoding(self, quality: Quality, layout: KVLayout) -> Encoding:
        learned = (self.digest, self.calibration) if self.digest and self.calibration else None
        return Encoding(quality, Settings().layer_group, Rotation.from_layout(layout), learned)


def namespace_of(model: Any) -> Namespace:
    """Any name will do: the store lives as long as the measurement."""
    return Namespace(model="measured", revision="1", layout=KVLayout.from_config(model.config, dtype="bfloat16"))


def calibrate_span(model: Any, namespace: Namespace, corpus: Corpus, span: str | None, most: int) -> Mode:
    """Learn a calibration of one span (None: the default) as `kvstore-s3 calibrate` does.

    The layer group is the default one, for span "all" at most so large that the transform has `most` dimensions.
    """
    begin = time.perf_counter()
    documents = [document.tolist() for document in corpus.documents]
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    total = sum(map(len, documents))
    sample = plan_windows(documents, chunk_tokens=CHUNK, max_tokens=max(total, 1), context_tokens=context)
    layout = namespace.layout
    options = CalibrateOptions() if span is None else CalibrateOptions(span=span)
    if span == "all":
        options = replace(
            options, layer_group=max(1, min(layout.layers, most // (2 * layout.kv_heads * layout.head_dim)))
        )
    artefact = calibrate(model, namespace, sample, options).to_bytes()
    calibration = Calibration.from_bytes(artefact, namespace.layout, namespace.digest)
    name = f"ours, {calibration.span}{' (default)' if span is None else ''}"
    return Mode(name, artefact, calibration, time.perf_counter() - begin)


def measure_mode(
    mode: Mode, namespace: Namespace, judge: Judge, qualities: Iterable[str], *, timed: bool
) -> list[Point]:
    """Save every window's context, load it at each quality, judge what comes back."""
    loaded = asyncio.run(_round_trip(mode, namespace, judge.windows[:, : judge.context], judge.kv, list(qualities)))
    points = []
    for name, (values, size) in loaded.items():
        speeds = measure_speed(mode, namespace, judge.kv, QUALITIES[name]) if timed else (None, None)
        bits = 8 * size / values.numel()
        judged = judge.judge(values)
        points.append(Point(mode.name, name, bits, judged, encode_gb_s=speeds[0], decode_gb_s=speeds[1]))
    return points


async def _round_trip(
    mode: Mode, namespace: Namespace, contexts: torch.Tensor, kv: Values, qualities: list[str]
) -> dict[str, tuple[Values, int]]:
    """Restored KV, and the bytes of objects that a reader of each quality reads: header, index, its levels."""
    objects = MemoryStore()
    stores = {name: _open(objects, namespace, name) for name in qualities}
    writer = next(iter(stores.values()))
    if mode.artefact is not None:
        await writer.calibrations.publish(mode.artefact)
    for tokens, values in zip(contexts, kv, strict=True):
        await writer.save(tokens, values.contiguous())
    found = {name: await _load_all(store, contexts, kv) for name, store in stores.items()}
    for store in stores.values():
        await store.close()
    return found


def _open(objects: ObjectStore, namespace: Namespace, quality: str) -> KVStore:
    return KVStore(objects, namespace, Settings(profile=quality), probe=False)


async def _load_all(store: KVStore, contexts: torch.Tensor, kv: Values) -> tuple[Values, int]:
    out, size = torch.empty_like(kv), 0
    for tokens, restored in zip(contexts, out, strict=True):
        hit = await store.lookup(tokens)
        values = await store.load(hit)
        if values.shape != restored.shape or hit.quality != store.quality.name:
            raise SystemExit(f"saved {len(tokens)} tokens, loaded {values.shape[2]} of quality {hit.quality}")
        restored.copy_(values)
        for chunk in hit.chunks:
            levels = [section for section in chunk.table.sections if section.level < store.quality.levels]
            size += chunk.table.header_length + sum(section.stored_length for section in levels)
    return out, size


def example_object(mode: Mode, namespace: Namespace, chunk: torch.Tensor, quality: Quality) -> tuple[bytearray, Header]:
    """The object of one chunk at position 0."""
    from kvstore_s3.bitstream import Identity

    identity = Identity(namespace.digest, bytes(32), namespace.layout.full_shard, namespace.layout, CHUNK)
    data, _ = encode_object(identity, chunk, mode.encoding(quality, namespace.layout), 0)
    header = parse_header(memoryview(data), identity, profiles=quality.accepts, calibrations=None)
    return data, header


def measure_speed(mode: Mode, namespace: Namespace, kv: Values, quality: Quality) -> tuple[float, float]:
    """GB of bfloat16 a second and core, encode and decode, checksums included; the thread's CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encode_s, decode_s = [], []
    for values in kv[:TIMED_CHUNKS]:
        chunk = values[:, :, :CHUNK].contiguous()
        begin = time.thread_time()
        data, header = example_object(mode, namespace, chunk, quality)
        middle = time.thread_time()
        decode_object(memoryview(data), header, mode, quality, chunk)
        decode_s.append(time.thread_time() - middle)
        encode_s.append(middle - begin)
    torch.set_num_threads(threads)
    size = 2 * chunk.numel() / 1e9
    return size / sorted(encode_s)[TIMED_CHUNKS // 4], size / sorted(decode_s)[TIMED_CHUNKS // 4]


def decode_object(data: memoryview, header: Header, mode: Mode, quality: Quality, like: torch.Tensor) -> torch.Tensor:
    """As the loader does it: verify, then decode, the sections of each layer group."""
    out = np.empty_like(view_bits(like))
    groups: dict[int, list[int]] = {}
    for number, section in enumerate(header.table.sections):
        if section.level < quality.levels:
            groups.setdefault(section.layer_begin, []).append(number)
    for begin, numbers in groups.items():
        sections = [header.table.sections[number] for number in numbers]
        payloads = [header.verify(n, data[s.offset : s.end]) for n, s in zip(numbers, sections, strict=True)]
        target = out[begin : sections[0].layer_end]
        decode_section(header, numbers, payloads, target, 0, mode.calibration)
    return torch.from_numpy(out).view(like.dtype)
