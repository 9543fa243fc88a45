"""Bits and KL of the three lossy qualities on trained models, through save and load, after a small calibration.

Bounds have slack over what was measured: `make bench-codec` measures for real, with more text.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_s3 import KVLayout, KVStore, Namespace, Settings
from kvstore_s3.objectstore.memory import MemoryStore

ASSETS = Path(os.environ.get("KVSTORE_S3_TEST_ASSETS", Path(__file__).resolve().parents[3] / "shared"))
CONTEXT, LENGTH = 256, 383
LAYER_GROUP = 4
"""Half of what `calibrate` would take for books8M: its eigenvectors then take seconds and not half a minute."""
pytestmark = pytest.mark.timeout(300)  # half a minute of work, which a busy machine stretches

LEVELS = {"small": 1, "balanced": 2, "near-lossless": 3}


class Measured:
    """KL x 1000 and bits a value of each quality, and the KL of fp8, over contexts of one chunk."""

    def __init__(self, model: Any, calibration_ids: torch.Tensor, ids: torch.Tensor) -> None:
        self.model = model
        self.ids = ids
        layout = KVLayout.from_config(model.config, dtype="bfloat16")
        self.namespace = Namespace(model="measured", revision="1", layout=layout)
        with torch.inference_mode():
            cache = model(ids[:, :CONTEXT], use_cache=True).past_key_values
            layers = [torch.stack([layer.keys, layer.values], 1) for layer in cache.layers]
        self.kv = torch.stack(layers, 1).transpose(3, 4).bfloat16().contiguous()
        self.exact = self.predict(self.kv)
        self.fp8 = self.divergence(self.kv.to(torch.float8_e4m3fn).bfloat16())
        self.kl: dict[str, float] = {}
        self.bits: dict[str, float] = {}
        asyncio.run(self.save_and_load(calibrate_on(model, self.namespace, calibration_ids)))

    def predict(self, kv: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, part in enumerate(kv.float().unbind(1)):
            keys, values = part.transpose(2, 3).unbind(1)
            cache.update(keys, values, layer)
        with torch.inference_mode():
            logits = self.model(self.ids[:, CONTEXT:], past_key_values=cache, use_cache=True).logits
        return logits.float().log_softmax(-1)

    def divergence(self, kv: torch.Tensor) -> float:
        return 1e3 * float((self.exact.exp() * (self.exact - self.predict(kv))).sum(-1).mean())

    async def save_and_load(self, artefact: bytes) -> None:
        objects = MemoryStore()
        writer = KVStore(objects, self.namespace, Settings(profile="small"), probe=False)
        await writer.calibrations.publish(artefact)
        for ids, kv in zip(self.ids, self.kv, strict=True):
            saved = await writer.save(ids[:CONTEXT], kv)
            assert saved.calibrated
        for quality, levels in LEVELS.items():
            store = KVStore(objects, self.namespace, Settings(profile=quality), probe=False)
            hits = [await store.lookup(ids) for ids in self.ids]
            assert {hit.quality for hit in hits} == {quality}
            self.kl[quality] = self.divergence(torch.stack([await store.load(hit) for hit in hits]))
            tables = [chunk.table for hit in hits for chunk in hit.chunks]
            read = sum(table.header_length for table in tables) + sum(
                section.stored_length for table in tables for section in table.sections if section.level < levels
            )
            self.bits[quality] = 8 * read / self.kv.numel()
        await store.close()


def calibrate_on(model: Any, namespace: Namespace, ids: torch.Tensor) -> bytes:
    from kvstore_s3.connectors.transformers.calibrating import CalibrateOptions, calibrate
    from kvstore_s3.connectors.transformers.windows import plan_windows

    sample = plan_windows(ids.tolist(), chunk_tokens=CONTEXT, max_tokens=ids.numel(), context_tokens=LENGTH)
    return calibrate(model, namespace, sample, CalibrateOptions(layer_group=LAYER_GROUP)).to_bytes()


def load_model(name: str) -> Any:
    directory = ASSETS / "models" / name
    if not directory.is_dir():
        pytest.skip(f"model {name} is not in {directory.parent} (KVSTORE_S3_TEST_ASSETS)")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stories() -> Measured:
    """Text that the model wrote itself: 40 sequences to learn from, 8 to measure on."""
    model = load_model("stories260K")
    torch.manual_seed(0)
    with torch.inference_mode():
        start = torch.ones((48, 1), dtype=torch.long)
        written = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            max_new_tokens=LENGTH - 1,
            min_new_tokens=LENGTH - 1,
            pad_token_id=1,
        )
    return Measured(model, written[:40], written[40:])


@pytest.fixture(scope="module")
def books() -> Measured:
    """Learned from the beginnings of two texts, measured on a third."""
    model = load_model("books8M")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / "models" / "books8M" / "tokenizer.json"))
    cut = [
        torch.tensor(tokenizer.encode((ASSETS / "text" / f"{text}.txt").read_text()[:30_000]).ids)
        for text in ("union", "kjb", "shakes")
    ]
    windows = [ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH) for ids in cut]
    return Measured(model, torch.cat([windows[0][:12], windows[1][:12]]), windows[2][:6])


@pytest.mark.parametrize("name", ["stories", "books"])
def test_fewer_levels_take_fewer_bits_and_cost_more(name: str, request: pytest.FixtureRequest) -> None:
    measured: Measured = request.getfixturevalue(name)
    assert measured.bits["small"] < measured.bits["balanced"] < measured.bits["near-lossless"]
    assert measured.kl["small"] > measured.kl["balanced"] > measured.kl["near-lossless"] > 0


@pytest.mark.parametrize(("name", "bits"), [("stories", 3.5), ("books", 2.4)])
def test_near_lossless_costs_less_than_fp8_at_a_fraction_of_its_bits(
    name: str, bits: float, request: pytest.FixtureRequest
) -> None:
    measured: Measured = request.getfixturevalue(name)
    assert measured.kl["near-lossless"] < measured.fp8
    assert measured.bits["near-lossless"] < bits


@pytest.mark.parametrize(("name", "bits"), [("stories", 2.1), ("books", 1.3)])
def test_balanced_is_within_ten_times_fp8(name: str, bits: float, request: pytest.FixtureRequest) -> None:
    measured: Measured = request.getfixturevalue(name)
    assert measured.kl["balanced"] < 10 * measured.fp8
    assert measured.bits["balanced"] < bits


@pytest.mark.parametrize(("name", "bits"), [("stories", 1.0), ("books", 0.8)])
def test_small_takes_less_than_a_bit_and_is_still_the_same_model(
    name: str, bits: float, request: pytest.FixtureRequest
) -> None:
    measured: Measured = request.getfixturevalue(name)
    assert measured.kl["small"] < 60
    assert measured.bits["small"] < bits
