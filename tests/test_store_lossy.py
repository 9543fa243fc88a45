"""KVStore with lossy profiles: what is read, what is accepted, what a reader learns, and calibrations that fail."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from codec.calibrations import make_calibration

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.calibrations import Calibrations, artefact_key, current_key
from kvstore_s3.codec.calibration import Calibration, calibration_digest
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.load import StoredChunk
from kvstore_s3.objectstore.memory import MemoryStore
from kvstore_s3.quality import QUALITIES, describe_quality, find_quality, quality_of, worst_quality

LAYOUT = KVLayout(6, 2, 16, "bfloat16", rope={"rope_type": "default", "rope_theta": 10000.0})
CHUNK = 64
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=CHUNK)
TOKENS = list(range(100, 100 + 4 * CHUNK + 7))
WHOLE = 4 * CHUNK
SCALABLE = ("near-lossless", "balanced", "small")

_names = itertools.count()


@pytest.fixture
def url() -> str:
    """A store in memory of the test's own."""
    return f"memory://lossy-{next(_names)}"


def draw_kv(seed: int = 0, tokens: int = len(TOKENS), layout: KVLayout = LAYOUT) -> torch.Tensor:
    """KV whose channels have scales of their own, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, layout.head_dim)
    values = torch.randn(layout.layers, 2, tokens, layout.kv_heads, layout.head_dim, generator=generator) * scales
    return values.to(getattr(torch, layout.dtype))


def error_of(found: torch.Tensor, kv: torch.Tensor) -> float:
    """Relative error of the first tokens of `kv`."""
    exact = kv[:, :, : found.shape[2]].float()
    return float((found.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


@asynccontextmanager
async def open_store(url: str, profile: str, **overrides: object) -> AsyncIterator[KVStore]:
    settings = Settings(layer_group=2, profile=profile, **overrides)
    async with KVStore.open(url, NAMESPACE, settings) as store:
        yield store


async def fill(url: str, profile: str, *, tokens: int = len(TOKENS)) -> torch.Tensor:
    kv = draw_kv()
    async with open_store(url, profile) as store:
        saved = await store.save(TOKENS[:tokens], kv[:, :, :tokens])
    assert (saved.chunks_new, saved.chunks_present, saved.quality) == (tokens // CHUNK, 0, profile)
    return kv


@pytest.fixture(scope="module")
def artefact() -> bytes:
    calibration = make_calibration(
        LAYOUT, "head", lambda seed: draw_kv(seed + 10, 256), layer_group=3, namespace=NAMESPACE.digest
    )
    return calibration.to_bytes()


async def publish(url: str, data: bytes) -> bytes:
    async with open_store(url, "balanced") as store:
        return await store.calibrations.publish(data)


def count_reads(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    read: list[tuple[str, int]] = []
    real = store.objects.get_range

    async def counted(key: str, start: int, into: memoryview) -> None:
        read.append((key, len(into)))
        await real(key, start, into)

    monkeypatch.setattr(store.objects, "get_range", counted)
    return read


# Qualities


def test_the_settings_know_every_quality() -> None:
    for name in QUALITIES:
        assert Settings(profile=name).profile == name


def test_a_reader_of_a_lossless_store_accepts_nothing_lossy() -> None:
    assert {name: sorted(quality.accepts) for name, quality in QUALITIES.items()} == {
        "lossless": ["lossless"],
        "near-lossless": ["lossless", "scalable"],
        "balanced": ["lossless", "scalable"],
        "small": ["lossless", "scalable"],
        "cachegen": ["cachegen", "lossless"],
    }


def test_an_unknown_profile_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'tiny'.* lossless, near-lossless, balanced, small, cachegen"):
        find_quality("tiny")


def test_qualities_are_told_by_levels_and_the_worst_counts() -> None:
    assert [quality_of(2, levels) for levels in (3, 2, 1)] == list(SCALABLE)
    assert (quality_of(1, 1), quality_of(3, 1)) == ("lossless", "cachegen")
    assert worst_quality(["lossless", "small", "balanced"]) == "small"
    assert worst_quality([]) == "lossless"
    assert describe_quality("balanced", False) == "balanced (uncalibrated)"
    assert describe_quality("balanced", True) == describe_quality("balanced", None) == "balanced"


@pytest.mark.parametrize("profile", [*SCALABLE, "cachegen"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_values_are_refused_by_name_when_a_lossy_store_is_opened(profile: str, dtype: str) -> None:
    namespace = replace(NAMESPACE, layout=replace(LAYOUT, dtype=dtype))
    with pytest.raises(InvalidArgumentError, match=f"{dtype}.*lossless") as refused:
        KVStore.open("memory://", namespace, Settings(profile=profile))
    assert "lossy profiles are for bfloat16, float16, float32" in str(refused.value)


# What comes back


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
async def test_each_level_that_is_read_makes_the_values_better(url: str, dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    namespace = replace(NAMESPACE, layout=layout)
    kv = draw_kv(layout=layout)
    errors = []
    for profile in SCALABLE:
        async with KVStore.open(url, namespace, Settings(profile=profile)) as store:
            saved = await store.save(TOKENS, kv)
            loaded = await store.load(await store.lookup(TOKENS))
            errors.append(error_of(loaded, kv))
        assert loaded.shape == (6, 2, WHOLE, 2, 16)
        assert saved.chunks_new == (4 if profile == SCALABLE[0] else 0), "all scalable qualities share their objects"
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.05 < errors[-1] < 0.6


@pytest.mark.parametrize("first_token", [0, 2 * CHUNK])
async def test_keys_are_turned_by_their_position_in_the_prompt_wherever_a_save_or_a_read_begins(
    url: str, first_token: int
) -> None:
    kv = draw_kv()
    async with open_store(url, "near-lossless") as store:
        await store.save(TOKENS[:first_token], kv[:, :, :first_token])
        saved = await store.save(TOKENS, kv[:, :, first_token:], first_token=first_token)
        assert saved.chunks_new == 4 - first_token // CHUNK
        hit = await store.lookup(TOKENS)
        assert [chunk.first_token for chunk in hit.chunks] == [0, CHUNK, 2 * CHUNK, 3 * CHUNK]
        whole = await store.load(hit)
        assert error_of(whole, kv) < 0.05
        groups = [group async for group in store.stream(hit, first_token=first_token)]
    assert torch.equal(torch.cat([group.kv for group in groups]), whole[:, :, first_token:])


async def test_an_object_that_claims_another_position_is_not_used(url: str) -> None:
    await fill(url, "balanced")
    async with open_store(url, "balanced") as store:
        hit = await store.lookup(TOKENS)
        moved = store.make_hit([replace(chunk, first_token=chunk.first_token + 1) for chunk in hit.chunks])
        assert (await store.load(moved)).shape[2] == 0


async def test_values_that_are_not_finite_come_back_as_they_were(url: str) -> None:
    kv = draw_kv()
    kv[2, 0, 70, 1, 3] = float("nan")
    kv[4, 1, 130, 0, 5] = float("-inf")
    async with open_store(url, "small") as store:
        await store.save(TOKENS, kv)
        loaded = await store.load(await store.lookup(TOKENS))
    assert loaded[2, 0, 70, 1, 3].isnan()
    assert loaded[4, 1, 130, 0, 5] == float("-inf")
    assert int((~loaded.isfinite()).sum()) == 2


# Levels


@pytest.mark.parametrize(("profile", "levels"), [("small", 1), ("balanced", 2), ("near-lossless", 3)])
@pytest.mark.parametrize("range_bytes", [64 * 1024, 8 * 1024 * 1024], ids=["bands", "one range"])
async def test_only_the_bytes_of_the_wanted_levels_are_transferred(
    url: str, profile: str, levels: int, range_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = KVLayout(6, 4, 64, "bfloat16")
    namespace = Namespace(model="wide", revision="1", layout=layout, chunk_tokens=CHUNK)
    settings = Settings(layer_group=2, profile=profile, range_bytes=range_bytes, gap_bytes=0)
    kv = draw_kv(tokens=2 * CHUNK, layout=layout)
    async with KVStore.open(url, namespace, settings) as store:
        await store.save(TOKENS[: 2 * CHUNK], kv)
        read = count_reads(store, monkeypatch)
        hit = await store.lookup(TOKENS)
        groups = [group async for group in store.stream(hit)]
    assert torch.cat([group.kv for group in groups]).shape[2] == 2 * CHUNK
    for chunk in hit.chunks:
        table = chunk.table
        assert [section.level for section in table.sections] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        wanted = sum(section.stored_length for section in table.sections if section.level < levels)
        sizes = [size for key, size in read if key == chunk.object_key]
        assert sum(sizes) == table.header_length + wanted
        if len(groups) == 1:
            assert len(sizes) == 1, "all layers of the first levels are one range"
        else:
            assert len(sizes) == levels * len(groups)


# What a reader accepts


async def test_a_lossless_reader_misses_scalable_objects_and_its_save_replaces_them(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    kv = await fill(url, "balanced")
    with caplog.at_level(logging.INFO, "kvstore_s3"):
        async with open_store(url, "lossless") as store:
            assert not await store.lookup(TOKENS)
            saved = await store.save(TOKENS, kv)
            assert (saved.chunks_new, saved.chunks_present) == (4, 0)
            hit = await store.lookup(TOKENS)
            assert torch.equal(await store.load(hit), kv[:, :, :WHOLE])
            assert (hit.quality, hit.calibrated) == ("lossless", (None,) * 4)
    said = [record.message for record in caplog.records if "scalable objects" in record.message]
    assert len(said) == 1, "said once, not for each object"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_save_without_a_lookup_replaces_them_too(url: str) -> None:
    kv = await fill(url, "small")
    async with open_store(url, "lossless") as store:
        assert (await store.save(TOKENS, kv)).chunks_new == 4


async def test_a_lossy_reader_takes_lossless_objects_and_replaces_none(url: str) -> None:
    kv = await fill(url, "lossless", tokens=2 * CHUNK)
    async with open_store(url, "small") as store:
        saved = await store.save(TOKENS, kv)
        assert (saved.chunks_new, saved.chunks_present) == (2, 2)
        hit = await store.lookup(TOKENS)
        loaded = await store.load(hit)
    assert hit.qualities == ("lossless", "lossless", "small", "small")
    assert hit.quality == "small"
    assert hit.cut(2 * CHUNK).quality == "lossless"
    assert torch.equal(loaded[:, :, : 2 * CHUNK], kv[:, :, : 2 * CHUNK])
    assert error_of(loaded, kv) > 0


async def test_a_hit_of_a_reader_who_asked_for_less_gives_nothing_lossy(url: str) -> None:
    await fill(url, "small")
    async with open_store(url, "small") as less, open_store(url, "lossless") as more:
        for thorough in (False, True):  # without the headers, and with them
            hit = await less.lookup(TOKENS, thorough=thorough)
            assert hit.tokens == WHOLE
            assert (await more.load(hit)).shape[2] == 0


@pytest.mark.parametrize(("before", "after"), [("lossless", "balanced"), ("balanced", "lossless")])
async def test_a_hit_tells_the_quality_of_what_was_read_and_not_of_what_was_found(
    url: str, before: str, after: str
) -> None:
    kv = torch.zeros_like(draw_kv())
    noise = torch.randint(-(2**15), 2**15, kv.shape, dtype=torch.int16).view(kv.dtype)
    async with open_store(url, before) as store:
        await store.save(TOKENS, kv)
    async with open_store(url, "balanced") as store:
        hit = await store.lookup(TOKENS)
        assert hit.quality == before
        for chunk in hit.chunks[:2]:
            await store.objects.delete(chunk.object_key)
        async with open_store(url, after) as other:  # longer objects: a shorter one in their place ends the hit
            await other.save(TOKENS[: 2 * CHUNK], noise[:, :, : 2 * CHUNK])
        assert (await store.load(hit)).shape[2] == WHOLE
        assert hit.qualities == (after, after, before, before)
        assert hit.calibrated == tuple(None if name == "lossless" else False for name in hit.qualities)


async def test_the_header_decides_what_is_accepted_where_there_is_no_hint(url: str) -> None:
    await fill(url, "balanced")
    async with open_store(url, "lossless") as store:
        objects = store.objects
        async for info in objects.list(f"{NAMESPACE.hex}/"):
            data = bytearray(info.size)
            await objects.get_range(info.key, 0, memoryview(data))
            await objects.put(info.key, data, replace=True)
        assert not await store.lookup(TOKENS)
    async with open_store(url, "balanced") as store:
        hit = await store.lookup(TOKENS)
        assert (hit.tokens, hit.calibrated) == (WHOLE, (False,) * 4), "the header tells all before anything is read"


# What a reader learns


async def test_an_uncalibrated_hit_says_so_once_it_was_read(url: str, caplog: pytest.LogCaptureFixture) -> None:
    await fill(url, "balanced")
    with caplog.at_level(logging.INFO, "kvstore_s3"):
        async with open_store(url, "balanced") as store:
            hit = await store.lookup(TOKENS)
            assert (hit.qualities, hit.calibrated) == (("balanced",) * 4, (None,) * 4)
            assert hit.describe_quality() == "balanced"
            part = hit.cut(CHUNK)
            await store.load(hit)
            assert hit.calibrated == (False,) * 4
            assert part.calibrated == (False,)
            assert hit.describe_quality() == "balanced (uncalibrated)"
            groups = [group async for group in store.stream(hit)]
            assert {group.quality for group in groups} == {"balanced"}
            assert {group.calibrated for group in groups} == {(False,) * 4}
    said = [record.message for record in caplog.records if "lossy" in record.message]
    assert len(said) == 1
    assert "balanced (uncalibrated)" in said[0]


async def test_a_lossless_store_says_nothing_of_lossy_values(url: str, caplog: pytest.LogCaptureFixture) -> None:
    await fill(url, "lossless")
    with caplog.at_level(logging.INFO, "kvstore_s3"):
        async with open_store(url, "small") as store:
            await store.load(await store.lookup(TOKENS))
    assert not caplog.records


# Calibrations


async def test_a_published_calibration_is_used_and_named_by_what_is_saved(
    url: str, artefact: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await publish(url, artefact)
    kv = draw_kv()
    async with open_store(url, "near-lossless") as store:
        saved = await store.save(TOKENS, kv)
        assert (saved.chunks_new, saved.calibrated) == (4, True)
    async with open_store(url, "near-lossless") as store:
        read = count_reads(store, monkeypatch)
        hit = await store.lookup(TOKENS)
        assert {section.layers for section in hit.chunks[0].table.sections} == {3}, "its layer group"
        for _ in range(2):
            assert error_of(await store.load(hit), kv) < 0.2
        assert hit.calibrated == (True,) * 4
        assert hit.describe_quality() == "near-lossless"
    fetched = [size for key, size in read if key == artefact_key(NAMESPACE.hex, digest)]
    assert fetched == [len(artefact)], "fetched once, whole"


async def test_objects_with_and_without_calibration_load_together(url: str, artefact: bytes) -> None:
    kv = await fill(url, "balanced", tokens=2 * CHUNK)
    await publish(url, artefact)
    async with open_store(url, "balanced") as store:
        saved = await store.save(TOKENS, kv)
        assert (saved.chunks_new, saved.calibrated) == (2, True)
        hit = await store.lookup(TOKENS)
        loaded = await store.load(hit)
    assert loaded.shape[2] == WHOLE
    assert hit.calibrated == (False, False, True, True)
    assert hit.describe_quality() == "balanced (uncalibrated)"
    assert hit.cut(0).describe_quality() == "lossless"


async def _flip(objects: MemoryStore, key: str, data: bytes) -> None:
    await objects.put(key, data[:-1] + bytes([data[-1] ^ 1]), replace=True)


LOSSES: dict[str, Callable[..., object]] = {
    "gone": lambda objects, key, data: objects.delete(key),
    "a flipped bit": _flip,
    "cut short": lambda objects, key, data: objects.put(key, data[:-8], replace=True),
    "emptied": lambda objects, key, data: objects.put(key, b"", replace=True),
    "another file": lambda objects, key, data: objects.put(key, b"\x08" + bytes(7) + b"{}      ", replace=True),
}


@pytest.mark.parametrize("how", LOSSES)
async def test_without_its_calibration_an_object_is_a_miss_said_once_and_stored_again(
    url: str, artefact: bytes, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    digest = await publish(url, artefact)
    kv = draw_kv()
    async with open_store(url, "balanced") as store:
        await store.save(TOKENS, kv)
        await LOSSES[how](store.objects, artefact_key(NAMESPACE.hex, digest), artefact)
    async with open_store(url, "balanced") as store:
        hit = await store.lookup(TOKENS)
        assert (await store.load(hit)).shape[2] == 0
        assert not await store.lookup(TOKENS)
        saved = await store.save(TOKENS, kv)
        assert (saved.chunks_new, saved.calibrated) == (4, False)
        assert error_of(await store.load(await store.lookup(TOKENS)), kv) < 0.5
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert digest.hex()[:16] in said[0]


async def test_who_will_not_load_learns_that_a_calibration_is_missing_too(url: str, artefact: bytes) -> None:
    digest = await publish(url, artefact)
    kv = await fill(url, "balanced")
    async with open_store(url, "balanced") as store:
        assert await store.lookup(TOKENS, thorough=True)
        await store.objects.delete(artefact_key(NAMESPACE.hex, digest))
    async with open_store(url, "balanced") as store:
        assert not await store.lookup(TOKENS, thorough=True)
    async with open_store(url, "small") as store:
        saved = await store.save(TOKENS, kv)
        assert (saved.chunks_new, saved.calibrated) == (4, False), "a save needs no load before it to mend"


async def test_the_hit_ends_before_the_object_that_lacks_its_calibration(url: str, artefact: bytes) -> None:
    kv = await fill(url, "balanced", tokens=2 * CHUNK)
    digest = await publish(url, artefact)
    async with open_store(url, "balanced") as store:
        await store.save(TOKENS, kv)
        await store.objects.delete(artefact_key(NAMESPACE.hex, digest))
    async with open_store(url, "balanced") as store:
        assert (await store.load(await store.lookup(TOKENS))).shape[2] == 2 * CHUNK


async def test_a_damaged_artefact_is_mended_by_publishing_it_again(url: str, artefact: bytes) -> None:
    digest = await publish(url, artefact)
    async with open_store(url, "balanced") as store:
        await _flip(store.objects, artefact_key(NAMESPACE.hex, digest), artefact)
        assert await store.calibrations.publish(artefact) == digest
    async with open_store(url, "balanced") as store:
        assert await store.calibrations.find(digest) is not None


async def test_a_calibration_of_another_namespace_is_refused(url: str, artefact: bytes) -> None:
    other = replace(NAMESPACE, revision="2")
    async with KVStore.open(url, other, Settings(profile="balanced")) as store:
        with pytest.raises(InvalidArgumentError, match="namespace"):
            await store.calibrations.publish(artefact)
        digest = calibration_digest(artefact)
        await store.objects.put(artefact_key(other.hex, digest), artefact)
        await store.objects.put(current_key(other.hex), json.dumps({"digest": digest.hex()}).encode())
        assert await store.calibrations.current() is None
        assert (await store.save(TOKENS, draw_kv())).calibrated is False


@pytest.mark.parametrize(
    "document",
    [b"", b"{", b"[]", b'{"digest": 7}', b'{"digest": "AB"}', b'{"digest": "' + b"f" * 63 + b'"}', b" " * 5000],
)
async def test_a_damaged_calibration_json_is_ignored_and_said_once(
    url: str, document: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(url, "balanced", verdict_lifetime_s=0.001) as store:
        await store.objects.put(current_key(NAMESPACE.hex), document)
        for seed in range(2):
            saved = await store.save([seed, *TOKENS[1:]], draw_kv(seed))
            assert (saved.chunks_new, saved.calibrated) == (4, False)
    assert len(caplog.records) == 1
    assert "calibration.json" in caplog.records[0].message


async def test_a_calibration_that_comes_later_is_found_by_a_store_that_is_open(url: str, artefact: bytes) -> None:
    objects = MemoryStore(url.removeprefix("memory://"))
    calibrations = Calibrations(objects, NAMESPACE, lifetime_s=0.0)
    assert await calibrations.current() is None
    digest = await publish(url, artefact)
    found = await calibrations.current()
    assert found is not None
    assert found[0] == digest
    assert isinstance(found[1], Calibration)
    assert np.array_equal(found[1].mean, Calibration.from_bytes(artefact, LAYOUT, NAMESPACE.digest).mean)


async def test_two_calibrations_serve_the_objects_that_name_them(url: str, artefact: bytes) -> None:
    other = make_calibration(LAYOUT, "channel", lambda seed: draw_kv(seed, 256), namespace=NAMESPACE.digest).to_bytes()
    kv = draw_kv()
    for data, tokens in ((artefact, 2 * CHUNK), (other, 4 * CHUNK)):
        await publish(url, data)
        async with open_store(url, "near-lossless") as store:
            await store.save(TOKENS[:tokens], kv[:, :, :tokens])
    async with open_store(url, "near-lossless") as store:
        hit = await store.lookup(TOKENS)
        assert error_of(await store.load(hit), kv) < 0.2
        assert {digest_of(chunk) for chunk in hit.chunks} == {None}, "metadata does not tell"
        assert hit.calibrated == (True,) * 4


def digest_of(chunk: StoredChunk) -> bytes | None:
    return chunk.header.calibration if chunk.header else None


# CacheGen


async def test_cachegen_objects_are_for_readers_of_cachegen_alone(url: str) -> None:
    pytest.importorskip("torchac")
    kv = draw_kv()
    async with open_store(url, "cachegen") as store:
        assert (await store.save(TOKENS, kv)).chunks_new == 4
        hit = await store.lookup(TOKENS)
        loaded = await store.load(hit)
        assert (hit.quality, hit.calibrated) == ("cachegen", (None,) * 4)
    assert 0 < error_of(loaded, kv) < 0.3
    for profile in ("lossless", "balanced"):
        async with open_store(url, profile) as store:
            assert not await store.lookup(TOKENS)
    async with open_store(url, "balanced") as store:
        assert (await store.save(TOKENS, kv)).chunks_new == 4
    async with open_store(url, "cachegen") as store:
        assert not await store.lookup(TOKENS)


@pytest.mark.parametrize("hint", [True, False])
async def test_an_object_with_fewer_levels_than_asked_for_is_a_miss_and_is_replaced(
    url: str, hint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = draw_kv()
    async with open_store(url, "balanced") as store:
        with monkeypatch.context() as writer:
            if not hint:
                writer.setattr("kvstore_s3.saving.encode_hint", lambda table: None)
            saved = await store.save(TOKENS, kv, prefix_quality="small")
    assert saved.chunks_new == WHOLE // CHUNK
    async with open_store(url, "small") as store:
        assert (await store.lookup(TOKENS)).quality == "small"
    async with open_store(url, "balanced") as store:
        assert not await store.lookup(TOKENS)
        assert (await store.save(TOKENS, kv)).chunks_new == WHOLE // CHUNK
        assert (await store.lookup(TOKENS)).tokens == WHOLE
