"""Quality for bits: this package's profiles beside published KV codecs, on one model, in one run.

    python benchmarks/codec_quality.py [--model DIR] [--texts DIR] [--windows 32]

Works on any transformers causal language model that the package can cache. With a tokenizer beside the model, `--texts`
(a folder of .txt files) is divided into calibration documents and held-out windows, the shortest text unseen in
calibration; without one, the model writes its own text. KV of a context (one chunk, and a second time three chunks
where the model's context allows) is coded and restored, ours by saving to and loading from a store; then the next 127
tokens' predictions are compared with those behind the exact KV. See `quality/measure.py` for the measures.

Results: a table, benchmarks/results/codec-<model>.json, and rate against KL as codec-<model>.svg.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality.baselines import Fp8, Kivi, Zstd
from quality.corpus import CHUNK, NEXT, Corpus, corpus_of_model, corpus_of_texts
from quality.curves import curves_of
from quality.embedding import embedding_cost
from quality.kvtc import MOST_DIMENSIONS, Learned, TransformCoder
from quality.lmcache import LmcacheCacheGen, levels_for, load_torchac
from quality.measure import Judge, Method, Point, Values, kv_of, measure
from quality.ours import SCALABLE, Mode, calibrate_span, measure_mode, namespace_of
from quality.plot import draw_curves
from quality.reading import reader_cost
from quality.report import points_as_json, print_points, print_spans, print_targets, round_numbers
from quality.targets import check_targets
from record import RESULTS, record

from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.connectors.pretrained import load_model, load_tokenizer

ASSETS = Path(os.environ.get("KVSTORE_S3_TEST_ASSETS", Path(__file__).parent.parent.parent / "shared"))
LONG_CONTEXT = 3 * CHUNK
SPANS = ("channel", "head", "all")
"""Besides the default one; the last is the widest."""
MOST_REFERENCE = 2**29
"""Numbers kept of the exact predictions: with a large vocabulary, fewer windows are judged."""
LEARNED_CHUNKS = 192
"""Chunks of the calibration documents that the KVTC-like coder learns from, at most."""
EMBEDDED_CHUNKS = 16
KVTC_STEP = 0.2
"""First step of the KVTC-like coder, relative to the mean deviation of a component."""
MOST_STEPS = 6
NOTES = (
    "bits/value: object headers, indices, tables and all side data included; calibrations are kept once per namespace.",
    "ours: bytes that a reader of the quality reads, of objects written by KVStore.save; values from KVStore.load.",
    "GB/s: bfloat16 a second and core, thread's CPU time; ours with checksums; KIVI-like and fp8 are plain torch.",
    "KVTC-like: ideal code length of static tables learned beside the basis, first token exact: a bound, so no speed.",
    "embedding: ideal lengths of the same integers, embedded beside coded alone with a table of each class.",
)


class Clock:
    """Says what is done and when."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def note(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "models" / "books8M", help="directory of a model")
    parser.add_argument("--texts", type=Path, default=ASSETS / "text", help="folder of .txt files, or one such file")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows to judge (default: 32)")
    parser.add_argument("--spans", default=",".join(SPANS), help="spans besides the default one (default: %(default)s)")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"expected a model directory, found no {arguments.model / 'config.json'}; give MODEL=dir")
    Run(arguments.model, arguments.texts, arguments.windows, arguments.spans.split(",")).measure_all()


class Run:
    """One model, measured."""

    def __init__(self, model: Path, texts: Path, windows: int, spans: list[str]) -> None:
        self.clock = Clock()
        self.name = model.resolve().name
        self.spans = spans
        self.model = load_model(str(model), "float32")
        self.namespace = namespace_of(self.model)
        self.corpus = read_corpus(model, self.model, texts, windows)
        self.clock.note(f"{self.name}: {self.corpus.described}")
        self.judge = Judge(self.model, self.corpus.windows)
        long = self.corpus.long_windows
        self.long_judge = Judge(self.model, long) if len(long) else None
        self.long_points: list[Point] = []
        self.clock.note(f"{len(self.corpus.windows)} windows, perplexity {self.judge.perplexity:.2f}")

    def measure_all(self) -> None:
        modes = self.calibrate()
        points = self.measure_ours(modes)
        points += self.measure_plain()
        wanted = [point.kl for point in points if point.curve.startswith("ours, ") and point.kl > 0]
        points += self.measure_kvtc(min(wanted), max(wanted))
        self.report(modes, points)

    def calibrate(self) -> list[Mode]:
        """The default span first."""
        modes: list[Mode] = []
        for span in (None, *self.spans):
            modes.append(calibrate_span(self.model, self.namespace, self.corpus, span, MOST_DIMENSIONS))
            self.clock.note(f"calibrated {modes[-1].name}, {len(modes[-1].artefact or b'') / 1e6:.2f} MB")
        return modes

    def measure_ours(self, modes: Iterable[Mode]) -> list[Point]:
        plans = [(Mode("ours, lossless"), ("lossless",)), (Mode("ours, uncalibrated"), SCALABLE)]
        plans += [(mode, SCALABLE) for mode in modes]
        if load_torchac() is not None:
            plans.append((Mode("CacheGen (published)"), ("cachegen",)))
        points = []
        for mode, qualities in plans:
            points += measure_mode(mode, self.namespace, self.judge, qualities, timed=True)
            if self.long_judge is not None:
                self.long_points += measure_mode(mode, self.namespace, self.long_judge, qualities, timed=False)
        self.clock.note("own profiles measured, through save and load")
        return points

    def measure_plain(self) -> list[Point]:
        points = [self.measure(method) for method in plain_methods(self.namespace.layout.layers)]
        self.clock.note("peers measured")
        return points

    def measure_kvtc(self, low: float, high: float) -> list[Point]:
        """Steps a factor of 2 apart, until their KL reaches from `low` to `high`."""
        rotation = Rotation.from_layout(self.namespace.layout)
        chunks = learned_chunks(self.model, self.corpus, LEARNED_CHUNKS)
        width = self.namespace.layout.bytes_per_token // 2
        points = []
        for joint in (False, True) if width <= MOST_DIMENSIONS else (False,):
            learned = Learned.of(list(chunks.split(16)), rotation, joint=joint)
            self.clock.note(f"learned a {'joint ' if joint else ''}basis for the KVTC-like coder")
            points += self.bracket(learned, low, high)
        self.clock.note("KVTC-like coder measured")
        return points

    def bracket(self, learned: Learned, low: float, high: float) -> list[Point]:
        step = KVTC_STEP * float(learned.bases[0].deviation.square().mean().sqrt())
        found = {step: self.measure(TransformCoder(learned, step))}
        for _ in range(MOST_STEPS):
            if min(point.kl for point in found.values()) > low:
                step = min(found) / 2
            elif max(point.kl for point in found.values()) < high:
                step = max(found) * 2
            else:
                break
            found[step] = self.measure(TransformCoder(learned, step))
        return list(found.values())

    def measure(self, method: Method) -> Point:
        if self.long_judge is not None:
            self.long_points.append(measure(method, self.long_judge))
        return measure(method, self.judge)

    def report(self, modes: list[Mode], points: list[Point]) -> None:
        curves, default, widest = curves_of(points), modes[0].name, modes[-1].name
        chunk = self.judge.kv[0][:, :, :CHUNK].contiguous()
        costs = {mode.name: reader_cost(mode, self.namespace, chunk) for mode in modes}
        learned = learned_chunks(self.model, self.corpus, EMBEDDED_CHUNKS)
        embedding = embedding_cost(modes[0].calibration, learned, self.judge.kv[:EMBEDDED_CHUNKS])
        levels = {point.setting: point.kl for point in curves[default]}
        rows = check_targets(self.name, curves, default, widest, embedding)
        sizes = {mode.name: len(mode.artefact or b"") for mode in modes}
        print_points(f"{self.name}: context of {CHUNK} tokens, {NEXT} judged", points, curves[default])
        long_curves = curves_of(self.long_points)
        if self.long_points:
            print_points(f"{self.name}: context of {LONG_CONTEXT} tokens", self.long_points, long_curves[default])
        print_spans(curves, costs, levels, sizes)
        print_targets(rows)
        for line in NOTES:
            print(line)
        path = RESULTS / f"codec-{self.name}.svg"
        RESULTS.mkdir(exist_ok=True)
        path.write_text(draw_curves(curves, f"{self.name}: rate against KL"), encoding="utf-8")
        result = {
            "model": self.describe(),
            "text": self.corpus.described,
            "seconds": self.clock.seconds,
            "targets": [row.as_json() for row in rows],
            "spans": {name: asdict(cost) for name, cost in costs.items()},
            "embedding": embedding,
            "calibrations": {mode.name: {"bytes": sizes[mode.name], **mode.calibration.report} for mode in modes},
            "points": points_as_json(points),
            "long_points": points_as_json(self.long_points),
            "notes": NOTES,
        }
        record(f"codec-{self.name}", round_numbers(result), "torch", "transformers", "zstandard")

    def describe(self) -> dict[str, Any]:
        layout = self.namespace.layout
        config = self.model.config.get_text_config(decoder=True)
        return {
            "name": self.name,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "hidden": config.hidden_size,
            "layers": layout.layers,
            "kv_heads": layout.kv_heads,
            "head_dim": layout.head_dim,
            "windows": len(self.corpus.windows),
            "long_windows": len(self.corpus.long_windows),
            "perplexity": self.judge.perplexity,
        }


def read_corpus(directory: Path, model: Any, texts: Path, windows: int) -> Corpus:
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or LONG_CONTEXT + NEXT + 1
    if limit < CHUNK + NEXT + 1:
        raise SystemExit(f"expected a model for {CHUNK + NEXT + 1} tokens or more, this one takes {limit}")
    long_context = LONG_CONTEXT if limit >= LONG_CONTEXT + NEXT + 1 else 0
    windows = max(4, min(windows, MOST_REFERENCE // (NEXT * config.vocab_size)))
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = load_tokenizer(str(directory))
        return corpus_of_texts(tokenizer, texts, windows=windows, long_context=long_context)
    return corpus_of_model(model, windows=windows, long_context=long_context)


def learned_chunks(model: Any, corpus: Corpus, most: int) -> Values:
    """KV of chunks of the calibration documents, each as a prompt of its own, evenly spread."""
    cut = [document[: len(document) // CHUNK * CHUNK].view(-1, CHUNK) for document in corpus.documents]
    chunks = torch.cat(cut)
    return kv_of(model, chunks[torch.linspace(0, len(chunks) - 1, min(most, len(chunks))).long()])


def plain_methods(layers: int) -> list[Method]:
    return [
        Fp8(),
        Kivi(4),
        Kivi(3),
        Kivi(2),
        LmcacheCacheGen(*levels_for(layers), "LMCache's bins"),
        LmcacheCacheGen([32] * layers, [16] * layers, "K 32 bins, V 16"),
        LmcacheCacheGen([16] * layers, [16] * layers, "16 bins"),
        Zstd(),
    ]


if __name__ == "__main__":
    main()
