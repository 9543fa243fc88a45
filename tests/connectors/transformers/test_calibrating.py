"""A calibration of tiny models: fewer bits at the same KL, any span, any metric, and what cannot be learned from."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from blake3 import blake3
from transformers import CohereConfig, LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from kvstore_s3 import KVLayout, Namespace
from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import decode_scalable, encode_scalable
from kvstore_s3.connectors.transformers.calibrating import CalibrateOptions, _to_bits, calibrate, count_work
from kvstore_s3.connectors.transformers.replay import Replay, measure_style
from kvstore_s3.connectors.transformers.windows import CONTINUATION, Sample, plan_windows
from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError

CHUNK = 64
VOCABULARY = 48
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
CONFIGS = {"llama": LlamaConfig, "cohere": CohereConfig}


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float32):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**SHAPE)).to(dtype).eval()


def namespace_of(model, **layout) -> Namespace:
    found = KVLayout.from_config(model.config, dtype=model.dtype)
    return Namespace(model="tiny", revision="1", layout=replace(found, **layout), chunk_tokens=CHUNK)


@cache
def draw_sample(seed: int = 0, windows: int = 16, lowest: int = 0) -> Sample:
    """Text in which few tokens are frequent."""
    random = torch.Generator().manual_seed(seed)
    tokens = (VOCABULARY - lowest) * torch.rand(windows * (CHUNK + CONTINUATION), generator=random) ** 3 + lowest
    return plan_windows([tokens.long().tolist()], chunk_tokens=CHUNK, max_tokens=100_000, context_tokens=256)


def learn(model, sample: Sample | None = None, namespace: Namespace | None = None, **options) -> Calibration:
    return calibrate(model, namespace or namespace_of(model), sample or draw_sample(), CalibrateOptions(**options))


@pytest.mark.parametrize("span", SPANS)
def test_near_lossless_costs_the_share_of_fp8s_kl_that_was_asked_for(span: str) -> None:
    report = learn(make_model(), span=span, kl_ratio=0.5).report
    kl, bits = report["kl"], report["bits_per_value"]
    assert kl["near-lossless"] == pytest.approx(0.5 * kl["fp8"], rel=0.3)
    assert kl["near-lossless"] < kl["balanced"] < kl["small"]
    assert 0 < bits["small"] < bits["balanced"] < bits["near-lossless"]
    assert (report["span"], report["metric"], report["rotary"]) == (span, "fisher", "halves")


def measure(model, sample: Sample, calibration: Calibration | None) -> tuple[float, float]:
    """KL and bits a value of near-lossless through the codec itself, over the second half of the sample's windows."""
    namespace = namespace_of(model)
    replay = Replay(model, model.dtype, Rotation.none(2))
    total, size, values = 0.0, 0, 0
    for window in sample.training[len(sample.training) // 2 :]:
        ids = torch.tensor([window.tokens])
        kv = replay.read_kv(ids[:, : window.context])
        bits = _to_bits(kv[0].permute(2, 3, 0, 1, 4))
        arguments = {"layer_begin": 0, "first_position": 0, "calibration": calibration}
        rotation = Rotation.from_layout(namespace.layout)
        payloads = encode_scalable(bits, "float32", rotation=rotation, **arguments)
        out = bits.copy()
        parts = [(codec, memoryview(payload)) for codec, payload in payloads]
        decode_scalable(parts, out, "float32", head_begin=0, section_heads=2, **arguments)
        coded = torch.from_numpy(out.view("float32")).permute(2, 3, 0, 1, 4)[None]
        with torch.no_grad():
            exact, found = (replay.predict(one, ids[:, window.context :]) for one in (kv, coded))
        total += float((exact.exp() * (exact - found)).sum(-1).mean())
        size += sum(map(len, (payload for _, payload in payloads)))
        values += bits.size
    return total, 8 * size / values


def test_a_calibration_takes_fewer_bits_at_a_lower_kl_than_none() -> None:
    model, other = make_model(), draw_sample(seed=1)
    calibrated, uncalibrated = measure(model, other, learn(model, kl_ratio=1.0)), measure(model, other, None)
    assert calibrated[1] < 0.8 * uncalibrated[1]
    assert calibrated[0] < uncalibrated[0]


def test_the_report_is_what_the_codec_does() -> None:
    model = make_model()
    calibration = learn(model, kl_ratio=1.0)
    _, bits = measure(model, draw_sample(seed=2), calibration)
    assert bits == pytest.approx(calibration.report["bits_per_value"]["near-lossless"], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_calibrated(dtype: torch.dtype) -> None:
    report = learn(make_model(dtype=dtype)).report
    assert 0 < report["kl"]["near-lossless"] < report["kl"]["fp8"]


def test_a_float32_model_calibrates_a_bfloat16_namespace() -> None:
    model = make_model()
    calibration = learn(model, namespace=namespace_of(model, dtype="bfloat16"))
    assert calibration.report["bits_per_value"]["near-lossless"] < 16


def test_gains_are_measured_where_no_gradient_flows() -> None:
    model = make_model()
    forward = model.forward

    @torch.no_grad()
    def forward_only(*arguments, logits_to_keep=0, **named):
        return forward(*arguments, logits_to_keep=logits_to_keep, **named)

    model.forward = forward_only
    with pytest.raises(InvalidArgumentError, match="no gradient flows through this model; use --metric gains"):
        learn(model)
    report = learn(model, metric="gains").report
    assert report["metric"] == "gains"
    assert report["kl"]["near-lossless"] < report["kl"]["fp8"]


def test_windows_that_give_no_finite_numbers_are_left_out() -> None:
    """Token 47 makes NaN of all that comes after it: a text in which a few windows hold it is learned from."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[47] = float("nan")
    clean = draw_sample(windows=16)
    clean = Sample(*(tuple(_without_47(window) for window in part) for part in (clean.training, clean.held_out)))
    spoilt = [_with_47(window) if place % 4 == 0 else window for place, window in enumerate(clean.training)]
    held_out = [_with_47(clean.held_out[0]), *clean.held_out[1:]]
    report = learn(model, Sample(tuple(spoilt), tuple(held_out))).report
    assert report["held_out_windows"] == len(held_out) - 1
    assert report["kl"]["near-lossless"] < report["kl"]["fp8"]
    everywhere = Sample(tuple(map(_with_47, clean.training)), tuple(map(_with_47, clean.held_out)))
    with pytest.raises(InvalidArgumentError, match="not finite"):
        learn(model, everywhere)


def _without_47(window):
    return replace(window, tokens=tuple(min(token, 46) for token in window.tokens))


def _with_47(window):
    return replace(window, tokens=(47, *window.tokens[1:]))


def test_a_model_whose_predictions_do_not_depend_on_its_kv_is_refused() -> None:
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(UnsupportedModelError, match="predicts the same with fp8 KV"):
        learn(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span": "heads"}, "unknown span 'heads'"),
        ({"metric": "l2"}, "unknown metric 'l2'; use one of fisher, gains"),
        ({"layer_group": 3}, "a layer group of 3 layers"),
        ({"kl_ratio": 0.0}, "KL ratio must be above 0"),
        ({"kl_ratio": float("nan")}, "KL ratio must be above 0"),
    ],
)
def test_impossible_options_are_refused(options, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        learn(make_model(), **options)


def test_fp8_kv_is_refused() -> None:
    model = make_model()
    with pytest.raises(InvalidArgumentError, match="float8_e4m3fn is not coded lossily"):
        learn(model, namespace=namespace_of(model, dtype="float8_e4m3fn"))


def test_the_same_text_gives_the_same_artefact() -> None:
    digests = {blake3(learn(make_model()).to_bytes()).digest() for _ in range(2)}
    assert len(digests) == 1


def test_the_model_is_left_as_it_was() -> None:
    model = make_model().train()
    frozen = next(model.parameters()).requires_grad_(False)
    learn(model)
    assert model.training
    assert [parameter is not frozen for parameter in model.parameters()] == [
        parameter.requires_grad for parameter in model.parameters()
    ]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "style"), [("llama", "halves"), ("cohere", "pairs")])
def test_the_style_of_rotation_is_found_by_what_undoing_it_leaves(kind: str, style: str) -> None:
    model = make_model(kind)
    replay = Replay(model, torch.float32, Rotation.from_layout(namespace_of(model).layout))
    assert measure_style(replay, replay.read_kv(torch.zeros(2, 200, dtype=torch.long))) == style
    assert learn(model).rotation.style == style


def test_keys_turned_back_and_forth_are_the_same() -> None:
    model = make_model()
    for style in ("halves", "pairs"):
        rotation = Rotation.from_layout(namespace_of(model).layout)
        replay = Replay(model, torch.float32, replace(rotation, style=style))
        kv = replay.read_kv(torch.arange(40)[None] % VOCABULARY)
        assert torch.allclose(replay.turn(replay.strip(kv)), kv, atol=1e-5)
        assert not torch.allclose(replay.strip(kv), kv, atol=1e-2)


def test_progress_counts_about_as_far_as_was_promised() -> None:
    done: list[int] = []
    for metric in ("fisher", "gains"):
        model, options, done = make_model(), CalibrateOptions(metric=metric), []
        calibrate(
            model, namespace_of(model), draw_sample(), options, lambda tokens, label, done=done: done.append(tokens)
        )
        assert sum(done) == pytest.approx(count_work(draw_sample(), options, 2), rel=0.25)
