"""Learn a calibration from a model and some text: statistics and metric, then the step that a KL target asks for.

The target is a share of what fp8 KV costs on windows that nothing was learned from: the mean KL divergence of the
predictions behind a stored context from those behind the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.codec.fitting import LEVELS, Quantiser, fit_quantiser
from kvstore_s3.codec.learning import (
    ENOUGH_ROWS,
    Basis,
    Moments,
    find_step,
    fisher_metrics,
    gain_metrics,
    learn_basis,
)
from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.codec.scalable import encode_scalable
from kvstore_s3.codec.spans import Spread
from kvstore_s3.connectors.transformers.admission import check_weights
from kvstore_s3.connectors.transformers.replay import Replay, measure_style
from kvstore_s3.connectors.transformers.windows import CONTINUATION, Sample, Window, batch_windows
from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError
from kvstore_s3.namespace import Namespace
from kvstore_s3.quality import LOSSY_DTYPES

METRICS = ("fisher", "gains")
QUALITIES = ("small", "balanced", "near-lossless")
"""By the last level that is read."""

BATCH_TOKENS = 3072
"""Tokens of a pass through the model: bounds the memory that activations and logits take."""

HELD_OUT_BYTES = 2 << 30
"""Most memory for what is kept of held-out windows; fewer are measured where it is not enough."""

NOISE = 0.1
"""Deviation of the noise that measures a gain, relative to that of the values."""

GAIN_WINDOWS = 8

STEPS_TRIED = 5
CLOSE = 0.06
"""A KL whose logarithm is this near to that of the target will do."""

_FP8_LARGEST = 448.0

Progress = Callable[[int, str], None]
"""Called with tokens that were just run through the model, and what for."""


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How to calibrate. `layer_group` None: as many layers as keep a head's transform at `spans.GROUP_DIMENSION`.

    `kl_ratio` is the KL of near-lossless relative to that of fp8 KV.
    """

    span: str = "group"
    layer_group: int | None = None
    metric: str = "fisher"
    kl_ratio: float = 0.25


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """One batch of held-out windows: KV of the contexts, the continuations, and their exact predictions."""

    kv: torch.Tensor
    continuation: torch.Tensor
    exact: torch.Tensor


def check_options(options: CalibrateOptions, namespace: Namespace) -> Spread:
    """Raise `InvalidArgumentError` for what can be seen to be wrong before anything is loaded."""
    if options.metric not in METRICS:
        raise InvalidArgumentError(f"unknown metric {options.metric!r}; use one of {', '.join(METRICS)}")
    if not 0 < options.kl_ratio <= 100:
        raise InvalidArgumentError(f"the KL ratio must be above 0, at most 100, not {options.kl_ratio}")
    if namespace.layout.dtype not in LOSSY_DTYPES:
        raise InvalidArgumentError(
            f"KV of dtype {namespace.layout.dtype} is not coded lossily; calibrate one of {', '.join(LOSSY_DTYPES)}"
        )
    return Spread.plan(namespace.layout, options.span, options.layer_group)


def count_work(sample: Sample, options: CalibrateOptions, layers: int) -> int:
    """Tokens that will go through the model, about: what progress counts up to."""
    held_out = sum(len(window.tokens) for window in sample.held_out)
    continuations = len(sample.held_out) * CONTINUATION
    metric = len(sample.training) * CONTINUATION
    if options.metric == "gains":
        metric = 2 * layers * min(GAIN_WINDOWS, len(sample.training)) * CONTINUATION
    training = sample.tokens - held_out
    return training + metric + held_out + (2 + 4 + LEVELS) * continuations


def calibrate(
    model: PreTrainedModel,
    namespace: Namespace,
    sample: Sample,
    options: CalibrateOptions = CalibrateOptions(),
    progress: Progress | None = None,
) -> Calibration:
    """Learn the calibration of `namespace` from windows of text.

    The model's own dtype is what is computed in; KV is rounded to that of the namespace's layout. Its parameters and
    their `requires_grad` are left as they were. Raises `InvalidArgumentError` for impossible options and where no
    gradient flows, `UnsupportedModelError` for a model whose predictions do not depend on its KV.
    """
    spread = check_options(options, namespace)
    check_weights(model, namespace)
    kv_dtype = getattr(torch, namespace.layout.dtype)
    with _frozen(model):
        run = _Run(Replay(model, kv_dtype, Rotation.from_layout(namespace.layout)), spread, options, progress)
        return run.calibrate(namespace, sample)


class _Run:
    """One calibration on its way."""

    def __init__(self, replay: Replay, spread: Spread, options: CalibrateOptions, progress: Progress | None) -> None:
        self.replay = replay
        self.spread = spread
        self.options = options
        self._progress = progress or (lambda tokens, label: None)
        self._random = torch.Generator().manual_seed(0)

    def calibrate(self, namespace: Namespace, sample: Sample) -> Calibration:
        training = batch_windows(sample.training, BATCH_TOKENS)
        self._choose_style(training)
        basis = self._learn(training)
        held_out = self._hold_out(sample.held_out)
        fp8 = self._measure(held_out, _to_fp8)
        if not fp8 > 0:
            raise UnsupportedModelError(
                "the model predicts the same with fp8 KV as with its own, so no step can be chosen by what it costs"
            )
        samples = self._analyse(basis, held_out)
        quantiser = self._search(basis, samples, held_out, fp8)
        kl = {
            quality: self._measure(held_out, self._coder(quantiser, level)) for level, quality in enumerate(QUALITIES)
        }
        report = {
            "tokens": sample.tokens,
            "windows": len(sample.training) + len(sample.held_out),
            "held_out_windows": sum(len(batch.kv) for batch in held_out),
            "metric": self.options.metric,
            "span": self.spread.span,
            "layer_group": self.spread.layer_group,
            "dimension": self.spread.largest_block,
            "rows": basis.rows,
            "enough_rows": ENOUGH_ROWS * self.spread.largest_block,
            "rotary": self.replay.rotation.style,
            "kl_ratio": self.options.kl_ratio,
            "step": quantiser.step,
            "kl": {"fp8": fp8, **kl},
        }
        bits = self._count_bits(quantiser.build(namespace.digest, self.replay.rotation, report), held_out)
        report["bits_per_value"] = dict(zip(QUALITIES, bits, strict=True))
        return quantiser.build(namespace.digest, self.replay.rotation, report)

    def _choose_style(self, training: Sequence[tuple[torch.Tensor, int]]) -> None:
        rotation = self.replay.rotation
        style = measure_style(self.replay, self.replay.read_kv(training[0][0]))
        layers = self.spread.layers
        chosen = (
            Rotation.none(layers)
            if style == "none"
            else Rotation(style, rotation.inverse_frequencies, rotation.rotated)
        )
        self.replay = Replay(self.replay.model, self.replay.kv_dtype, chosen)

    def _learn(self, training: Sequence[tuple[torch.Tensor, int]]) -> Basis:
        device = self.replay.device
        values = Moments(self.spread, centred=True, device=device)
        gradients = Moments(self.spread, centred=False, device=device)
        by_gradient = self.options.metric == "fisher"
        for ids, context in training:
            kv = self.replay.read_kv(ids)
            values.add(_finite_rows(self.replay.strip(kv)))
            self._progress(ids.numel(), "statistics")
            if by_gradient:
                gradients.add(self._read_gradients(kv[:, :context], ids[:, context:]))
                self._progress(ids[:, context:].numel(), "sensitivity")
        if not values.rows:
            raise InvalidArgumentError("the model's KV is not finite anywhere in this text; nothing can be learned")
        if not by_gradient:
            return learn_basis(values, gain_metrics(self.spread, self._measure_gains(training, values)))
        if not gradients.rows:
            raise InvalidArgumentError("the gradients are not finite anywhere in this text; try --metric gains")
        return learn_basis(values, fisher_metrics(gradients))

    def _read_gradients(self, kv: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
        """Of the log-likelihood of a continuation that the model itself might write: finite rows, rotation undone."""
        leaf = kv.clone().requires_grad_(True)
        with torch.enable_grad():
            log_probabilities = self.replay.predict(leaf, continuation)
            labels = self._draw(log_probabilities.detach())
            chosen = log_probabilities.gather(-1, labels[..., None]).squeeze(-1)
            usable = torch.isfinite(chosen.detach()).all(-1)
            if not chosen.requires_grad:
                raise InvalidArgumentError("no gradient flows through this model; use --metric gains")
            gradient = torch.autograd.grad(chosen[usable].sum(), leaf)[0]
        return _finite_rows(self.replay.strip(gradient[usable]))

    def _draw(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """One label for each position, by inverting the cumulative distribution."""
        uniform = torch.rand(log_probabilities.shape[:-1], generator=self._random)
        cumulative = log_probabilities.exp().nan_to_num(0.0).cumsum(-1)
        wanted = uniform.to(cumulative.device)[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, wanted).squeeze(-1).clamp_max(cumulative.shape[-1] - 1)

    def _measure_gains(self, training: Sequence[tuple[torch.Tensor, int]], values: Moments) -> torch.Tensor:
        """Sensitivity of each layer's K and V, [layers, 2], from noise in it alone, in the scale of a Fisher matrix."""
        ids, context = training[0]
        batches = self._prepare([(ids[:GAIN_WINDOWS], context)])
        deviations = torch.cat(
            [_mean_deviation(values, group) for group in range(len(self.spread.groups))]
        )  # [layers, 2]
        gains = torch.zeros(self.spread.layers, 2, dtype=torch.float64)
        numbers = context * self.spread.kv_heads * self.spread.head_dim
        for layer in range(self.spread.layers):
            for kind in (0, 1):
                deviation = NOISE * max(float(deviations[layer, kind]), 1e-6)
                divergence = self._measure(batches, self._noise(layer, kind, deviation), "sensitivity")
                gains[layer, kind] = 2 * CONTINUATION * divergence / (numbers * deviation**2)
        return gains

    def _noise(self, layer: int, kind: int, deviation: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(kv: torch.Tensor) -> torch.Tensor:
            noisy = kv.clone()
            part = noisy[:, 1:, :, layer, kind]
            part += (torch.randn(part.shape, generator=self._random) * deviation).to(part)
            return noisy

        return add

    def _hold_out(self, windows: Sequence[Window]) -> list[_HeldOut]:
        layout, vocabulary = self.spread, self.replay.model.config.get_text_config(decoder=True).vocab_size
        values = windows[0].context * layout.kv_heads * layout.layers * 2 * layout.head_dim
        most = max(2, HELD_OUT_BYTES // (4 * (3 * values + CONTINUATION * vocabulary)))
        batches = self._prepare(batch_windows(windows[:most], BATCH_TOKENS))
        if not batches:
            raise InvalidArgumentError("the model's KV or predictions are not finite in the held-out text")
        return batches

    def _prepare(self, windows: Iterable[tuple[torch.Tensor, int]]) -> list[_HeldOut]:
        """KV and exact predictions; windows with anything that is not finite are left out."""
        batches = []
        for ids, context in windows:
            kv = self.replay.read_kv(ids[:, :context])
            with torch.no_grad():
                exact = self.replay.predict(kv, ids[:, context:])
            finite = torch.isfinite(kv).flatten(1).all(1) & torch.isfinite(exact).flatten(1).all(1)
            if finite.any():
                batches.append(_HeldOut(kv[finite], ids[:, context:][finite.cpu()], exact[finite]))
            self._progress(ids.numel(), "held-out text")
        return batches

    @torch.no_grad()
    def _measure(
        self, batches: Sequence[_HeldOut], change: Callable[[torch.Tensor], torch.Tensor], label: str = "step"
    ) -> float:
        """Mean KL divergence, nats a token, of predictions behind changed KV."""
        total, count = 0.0, 0
        for batch in batches:
            found = self.replay.predict(change(batch.kv), batch.continuation)
            divergence = (batch.exact.exp() * (batch.exact - found)).sum(-1).double()
            total += float(divergence.sum())
            count += divergence.numel()
            self._progress(batch.continuation.numel(), label)
        return total / count

    def _analyse(self, basis: Basis, batches: Sequence[_HeldOut]) -> list[list[torch.Tensor]]:
        return [basis.analyse(_finite_rows(self.replay.strip(batch.kv))) for batch in batches]

    def _coder(self, quantiser: Quantiser, level: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What a reader of `level` gets; the first token is kept."""

        def code(kv: torch.Tensor) -> torch.Tensor:
            samples = self.replay.strip(kv).flatten(0, 1)
            components = quantiser.quantise(quantiser.basis.analyse(samples), level)
            coded = self.replay.turn(quantiser.basis.synthesise(components).view(kv.shape))
            coded[:, 0] = kv[:, 0]
            return coded

        return code

    def _search(
        self, basis: Basis, samples: list[list[torch.Tensor]], held_out: Sequence[_HeldOut], fp8: float
    ) -> Quantiser:
        """The step whose near-lossless KL is the target: a guess from the metric, then the secant of the logarithms."""
        target = fp8 * self.options.kl_ratio
        context = held_out[0].kv.shape[1]
        step = find_step(basis, 2 * CONTINUATION * target / context)
        tried: list[tuple[float, float, Quantiser]] = []
        for _ in range(STEPS_TRIED):
            quantiser = fit_quantiser(basis, samples, step)
            divergence = max(self._measure(held_out, self._coder(quantiser, LEVELS - 1)), 1e-12)
            tried.append((math.log(step), math.log(divergence / target), quantiser))
            if abs(tried[-1][1]) < CLOSE:
                break
            step = math.exp(_next_step(tried))
        return min(tried, key=lambda one: abs(one[1]))[2]

    def _count_bits(self, calibration: Calibration, held_out: Sequence[_HeldOut]) -> list[float]:
        """Bits a value of the held-out contexts by the last level that is read, all of the payloads included."""
        sizes, values = [0] * LEVELS, 0
        for batch in held_out:
            for kv in batch.kv:
                bits = _to_bits(kv.permute(2, 3, 0, 1, 4).to(self.replay.kv_dtype))
                for group in range(calibration.groups):
                    begin, end = calibration.group_layers(group)
                    payloads = encode_scalable(
                        bits[begin:end],
                        str(self.replay.kv_dtype).removeprefix("torch."),
                        layer_begin=begin,
                        first_position=0,
                        calibration=calibration,
                        rotation=calibration.rotation,
                    )
                    for level in range(LEVELS):
                        sizes[level] += sum(len(payload) for _, payload in payloads[: level + 1])
                values += bits.size
        return [8 * size / values for size in sizes]


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow through the model, not into it."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def _finite_rows(samples: torch.Tensor) -> torch.Tensor:
    """Rows [tokens, heads, layers, 2, dim] of all windows, without the first token of each and what is not finite."""
    rows = samples[:, 1:].flatten(0, 1)
    return rows[torch.isfinite(rows).flatten(1).all(1)]


def _mean_deviation(values: Moments, group: int) -> torch.Tensor:
    """Deviation of each layer's K and V, [layers of the group, 2]."""
    spread = values.spread
    begin, end = spread.groups[group]
    diagonal = values.matrix(group).diagonal(dim1=-2, dim2=-1)
    return diagonal.reshape(spread.kv_heads, end - begin, 2, spread.head_dim).mean((0, 3)).clamp_min(0).sqrt()


def _to_fp8(kv: torch.Tensor) -> torch.Tensor:
    """What engines make of KV at fp8: e4m3, without a scale."""
    return kv.clamp(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn).to(kv.dtype)


def _to_bits(kv: torch.Tensor) -> Any:
    itemsize = kv.dtype.itemsize
    kinds = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    kind, unsigned = kinds[itemsize]
    return kv.cpu().contiguous().view(kind).numpy().view(unsigned)


def _next_step(tried: Sequence[tuple[float, float, Quantiser]]) -> float:
    """Logarithm of the next step: KL grows with about its square, or as the last two tries say."""
    step, excess, _ = tried[-1]
    slope = 2.0
    if len(tried) > 1 and tried[-2][0] != step:
        slope = (excess - tried[-2][1]) / (step - tried[-2][0])
    return step - excess / min(max(slope, 1.0), 3.0)
