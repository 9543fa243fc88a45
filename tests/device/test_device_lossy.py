"""Saves of lossy profiles out of a device's memory, against the objects that the CPU writes of the same KV."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from codec.calibrations import make_calibration
from device.counting import CountingLibrary, opened
from device.device_kv import MEMORY, PLACES, objects_in, of_blocks, of_tensor
from device.emulated import Device
from partitions import CHUNK, LAYOUT, TOKENS, WHOLE, draw_kv, part_of

from kvstore_s3 import KVLayout, KVStore, Namespace
from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.device.encoder import SLOTS, SMALLEST_BUDGET, DeviceEncoder
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.scalable import SCALABLE
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import Shard

BUDGET = SLOTS << 20
STEP = 0.02
"""Of the calibrations, beside the deviation of all values."""


@pytest.fixture
def library(device: Device) -> CountingLibrary:
    return CountingLibrary(device.library.path, emulated=device.library.emulated)


@pytest.fixture
def encoder(library: CountingLibrary) -> Iterator[DeviceEncoder]:
    with DeviceEncoder(library, MEMORY, BUDGET) as encoder:
        yield encoder


def calibrate(span: str, layout: KVLayout = LAYOUT, layer_group: int = 2) -> Calibration:
    namespace = Namespace(model="parted", revision="1", layout=layout, chunk_tokens=CHUNK)
    return make_calibration(
        layout,
        span,
        lambda seed: draw_kv(layout, 96, seed),
        layer_group=layer_group,
        relative_step=STEP,
        namespace=namespace.digest,
    )


CALIBRATIONS = {span: calibrate(span) for span in SPANS}


async def publish(store: KVStore, calibration: Calibration | None) -> None:
    if calibration is not None:
        await store.calibrations.publish(calibration.to_bytes())


async def save_both(
    path: Path,
    kv: torch.Tensor,
    on_device: DeviceKV,
    calibration: Calibration | None = None,
    *,
    layout: KVLayout = LAYOUT,
    shard: Shard | None = None,
    profile: str = "near-lossless",
    **options: object,
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What a store holds of KV that was saved from the device, and from the host."""
    found = {}
    for name, values in (("device", on_device), ("host", kv)):
        async with opened(path / name, layout, shard, profile=profile) as store:
            await publish(store, calibration)
            saved = await store.save(TOKENS, values, **options)  # type: ignore[arg-type]
            assert saved.chunks_new == kv.shape[2] // CHUNK
        found[name] = objects_in(path / name)
    return found["device"], found["host"]


async def codecs_in(path: Path, **options: object) -> list[int]:
    async with opened(path, profile="small", **options) as store:
        hit = await store.lookup(TOKENS)
        return [section.codec for section in hit.chunks[0].table.sections]


@pytest.mark.parametrize(
    "place", ["tensor", "layers", "blocks BLHNC", "blocks LHBNC", "chunks that begin within a block"]
)
async def test_lossy_objects_are_those_of_kv_on_the_host(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, place: str
) -> None:
    kv = draw_kv(tokens=66)
    found, expected = await save_both(tmp_path, kv, PLACES[place](kv, encoder))
    assert found == expected
    assert library.lossy_calls == 4
    assert await codecs_in(tmp_path / "device") == [SCALABLE] * 6


@pytest.mark.parametrize(("place", "mode"), [("tensor", "uncalibrated"), ("blocks BLHNC", "channel")])
async def test_what_is_taken_before_it_is_saved_is_encoded_then(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, place: str, mode: str
) -> None:
    kv = draw_kv(tokens=66)
    for name in ("device", "host"):
        async with opened(tmp_path / name, profile="near-lossless") as store:
            await publish(store, CALIBRATIONS.get(mode))
            await store.calibrations.current()
            values: torch.Tensor | DeviceKV = kv
            if name == "device":
                values = PLACES[place](kv, encoder)
                await store.take(values)
                assert library.lossy_calls == 4
            await store.save(TOKENS, values)
    assert library.lossy_calls == 4
    assert objects_in(tmp_path / "device") == objects_in(tmp_path / "host")


@pytest.mark.parametrize("profile", ["near-lossless", "balanced", "small"])
async def test_every_lossy_profile_is_encoded_on_the_device(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, profile: str
) -> None:
    kv = draw_kv()
    found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder), profile=profile)
    assert found == expected
    assert library.lossy_calls == 4


@pytest.mark.parametrize("quality", ["balanced", "small"])
async def test_values_of_a_lower_quality_get_as_many_levels(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, quality: str
) -> None:
    kv = draw_kv()[:, :, 32:64]
    options = {"first_token": 32, "prefix_quality": quality}
    found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder), profile=quality, **options)
    assert found == expected
    assert library.lossy_calls == 2


async def test_cachegen_is_encoded_by_the_cpu(tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary) -> None:
    pytest.importorskip("torchac")
    kv = draw_kv()
    found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder), profile="cachegen")
    assert found == expected
    assert not library.lossy_calls


@pytest.mark.parametrize("span", ["head", "group", "all"])
async def test_what_a_matrix_gives_is_within_a_step_of_the_hosts(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, span: str
) -> None:
    kv = draw_kv()
    calibration = CALIBRATIONS[span]
    found, expected = await save_both(tmp_path, kv, of_blocks("BLHNC", 5)(kv[:, :, :WHOLE], encoder), calibration)
    assert found.keys() == expected.keys()
    assert library.lossy_calls == 4
    assert await codecs_in(tmp_path / "device") == [SCALABLE] * 6
    loaded = []
    for name in ("device", "host"):
        async with opened(tmp_path / name, profile="near-lossless") as store:
            hit = await store.lookup(TOKENS)
            loaded.append((await store.load(hit)).double())
            assert (hit.tokens, hit.quality) == (WHOLE, "near-lossless")
    step = STEP * float(kv.double().std())
    away = (loaded[0] - loaded[1]).abs()
    assert (away <= 2 * step + 2**-7 * loaded[1].abs()).all()
    assert (away > 0).double().mean() < 0.01


@pytest.mark.parametrize("dtype", ["float16", "float32"])
async def test_lossy_profiles_of_other_dtypes_are_encoded_on_the_device(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, dtype: str
) -> None:
    layout = KVLayout(4, 4, 8, dtype, rope=LAYOUT.rope)
    kv = draw_kv(layout)
    for mode in (None, calibrate("channel", layout)):
        name = "calibrated" if mode else "uncalibrated"
        found, expected = await save_both(tmp_path / name, kv, of_tensor(kv, encoder), mode, layout=layout)
        assert found == expected
    assert library.lossy_calls == 8


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout(5, 3, 10, "bfloat16", rope=LAYOUT.rope),
        KVLayout(1, 1, 1, "bfloat16"),
        KVLayout(3, 2, 36, "bfloat16", rope={**LAYOUT.rope, "partial_rotary_factor": 0.5}),
        KVLayout(4, 1, 6, "bfloat16", rope={**LAYOUT.rope, "no_rope_layers": (1, 1, 0, 1)}),
    ],
    ids=lambda layout: f"{layout.layers}x{layout.kv_heads}x{layout.head_dim}",
)
@pytest.mark.parametrize("calibrated", [False, True])
async def test_models_of_odd_shapes_give_the_objects_of_the_host(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, layout: KVLayout, calibrated: bool
) -> None:
    kv = draw_kv(layout)
    calibration = calibrate("channel", layout, 1 if layout.layers == 1 else 2) if calibrated else None
    found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder), calibration, layout=layout)
    assert found == expected
    assert library.lossy_calls


@pytest.mark.parametrize("mode", ["uncalibrated", "channel"])
async def test_a_chunk_in_the_middle_of_a_prompt_is_encoded_at_its_position(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, mode: str
) -> None:
    kv = draw_kv()[:, :, 16:48]
    found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder), CALIBRATIONS.get(mode), first_token=16)
    assert found == expected
    assert library.lossy_calls == 2


@pytest.mark.parametrize(
    ("mode", "shard"),
    [
        ("uncalibrated", Shard(2, 4, 2, 4)),
        ("channel", Shard(0, 2, 1, 2)),
        ("uncalibrated", Shard(1, 4, 0, 3)),
        ("channel", Shard(1, 4, 0, 3)),
    ],
    ids=str,
)
async def test_a_rank_encodes_its_rectangle_of_a_lossy_profile(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, shard: Shard, mode: str
) -> None:
    kv = part_of(draw_kv(), shard)
    on_device = of_blocks("BLNHC")(kv, encoder)
    found, expected = await save_both(tmp_path, kv, on_device, CALIBRATIONS.get(mode), shard=shard)
    assert found == expected
    assert library.lossy_calls == 4


def not_finite(kv: torch.Tensor) -> None:
    kv[1, 0, 3, 0, 5] = float("nan")
    kv[0, 1, 7, 1, 2] = float("-inf")
    kv[3, 1, 20, 3, 7] = torch.finfo(kv.dtype).max


def zeros(kv: torch.Tensor) -> None:
    kv[:2] = 0


def subnormals(kv: torch.Tensor) -> None:
    kv[0] *= 1e-39


def huge(kv: torch.Tensor) -> None:
    kv[:, 0] *= 2.0**120


def loud(kv: torch.Tensor) -> None:
    kv[:, :, 5] *= 40
    kv[1, 1, 11] *= 900


@pytest.mark.parametrize("change", [not_finite, zeros, subnormals, huge, loud], ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", ["uncalibrated", "channel"])
async def test_adversarial_values_give_the_objects_of_the_host(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, mode: str, change: Callable[[torch.Tensor], None]
) -> None:
    kv = draw_kv()
    change(kv)
    found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder), CALIBRATIONS.get(mode))
    assert found == expected
    assert library.lossy_calls


async def test_sections_whose_exact_coding_is_shorter_are_encoded_by_the_cpu(
    tmp_path: Path, encoder: DeviceEncoder
) -> None:
    kv = draw_kv()
    noise = np.random.default_rng(1).integers(0, 2**16, kv[2:].shape, dtype=np.uint16).view(np.int16)
    kv[2:] = torch.from_numpy(noise).view(torch.bfloat16)
    kv[:2, :, 16:] = 1.0
    found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder))
    assert found == expected
    assert await codecs_in(tmp_path / "device") == [SCALABLE, 0, SCALABLE, 4, SCALABLE, 4]


async def test_a_section_larger_than_a_slot_is_encoded_by_the_cpu(tmp_path: Path, library: CountingLibrary) -> None:
    layout = KVLayout(5, 4, 64, "bfloat16", rope=LAYOUT.rope)
    kv = draw_kv(layout)
    with DeviceEncoder(library, MEMORY, SMALLEST_BUDGET) as encoder:  # holds the last layer alone
        found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder), layout=layout)
    assert found == expected
    assert library.lossy_calls == 4


async def test_what_was_taken_lossily_may_be_overwritten(tmp_path: Path, encoder: DeviceEncoder) -> None:
    kv = draw_kv()
    kv[2:] = torch.randint(-(2**15), 2**15, kv[2:].shape, dtype=torch.int16).view(torch.bfloat16)
    given = kv.clone().to(MEMORY)
    on_device = DeviceKV.of(given, encoder)
    async with opened(tmp_path / "host", profile="small") as store:
        await store.save(TOKENS, kv)
    async with opened(tmp_path / "device", profile="small") as store:
        await store.calibrations.current()
        await store.take(on_device)
        given.zero_()
        await store.save(TOKENS, on_device)
    assert objects_in(tmp_path / "device") == objects_in(tmp_path / "host")


async def test_a_take_asks_the_store_for_no_calibration(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary
) -> None:
    kv, calibration = draw_kv(), CALIBRATIONS["channel"]
    async with opened(tmp_path, profile="small") as store:
        await publish(store, calibration)
    async with opened(tmp_path, profile="small") as store:
        on_device = of_tensor(kv, encoder)
        await store.take(on_device)
        assert not library.lossy_calls  # what to encode it with is not known yet
        assert (await store.save(TOKENS, on_device)).calibrated
        other = of_tensor(kv, encoder)
        await store.take(other)
        assert library.lossy_calls == 4
        assert (await store.save([1, *TOKENS], other)).calibrated


async def test_what_was_taken_with_a_calibration_is_stored_with_it(tmp_path: Path, encoder: DeviceEncoder) -> None:
    kv = draw_kv()
    async with opened(tmp_path, profile="small") as store:
        await publish(store, CALIBRATIONS["channel"])
        on_device = of_tensor(kv, encoder)
        await store.take(on_device)
        await publish(store, CALIBRATIONS["head"])
        await store.save(TOKENS, on_device)
        hit = await store.lookup(TOKENS, thorough=True)
        found = await store.load(hit)
    assert found.shape[2] == WHOLE
    assert torch.allclose(found.float(), kv[:, :, :WHOLE].float(), atol=1.0, rtol=0.1)


async def test_kv_taken_at_another_position_is_refused(tmp_path: Path, encoder: DeviceEncoder) -> None:
    async with opened(tmp_path, profile="small") as store:
        await store.calibrations.current()
        on_device = of_tensor(draw_kv()[:, :, :32], encoder)
        await store.take(on_device, first_token=16)
        with pytest.raises(InvalidArgumentError, match="taken as of position 16, and is saved as of 0"):
            await store.save(TOKENS, on_device)


async def test_a_device_that_fails_leaves_lossy_encoding_to_the_cpu(
    tmp_path: Path, encoder: DeviceEncoder, library: CountingLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    kv = draw_kv()
    library.broken = True
    with caplog.at_level(logging.WARNING, "kvstore_s3"):
        found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder))
    assert found == expected
    assert "KV is coded by the CPU: kvs_scalable_encode failed with CUDA error 700" in caplog.messages


class CountingEncoder(DeviceEncoder):
    """Counts the arrays that it puts on the device to stay."""

    puts = 0

    def _put(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        self.puts += 1
        return super()._put(values)


@pytest.mark.parametrize("span", ["uncalibrated", "channel", "all"])
async def test_a_calibration_is_put_on_the_device_once(tmp_path: Path, library: CountingLibrary, span: str) -> None:
    kv = draw_kv()
    with CountingEncoder(library, MEMORY, BUDGET) as encoder:
        async with opened(tmp_path, profile="small") as store:
            await publish(store, CALIBRATIONS.get(span))
            await store.save(TOKENS, of_tensor(kv, encoder))
            first = encoder.puts
            await store.save([1, *TOKENS], of_tensor(kv, encoder))
    assert library.lossy_calls == 8
    assert encoder.puts == first > 0


class OlderLibrary(Library):
    """A library from before codec 3 was encoded on devices."""

    def has(self, name: str) -> bool:
        return "scalable_encode" not in name and super().has(name)


async def test_a_library_that_does_not_encode_codec_3_leaves_it_to_the_cpu(tmp_path: Path, device: Device) -> None:
    kv = draw_kv()
    library = OlderLibrary(device.library.path, emulated=device.library.emulated)
    with DeviceEncoder(library, MEMORY, BUDGET) as encoder:
        found, expected = await save_both(tmp_path, kv, of_tensor(kv, encoder))
    assert found == expected
