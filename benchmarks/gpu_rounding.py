"""What it costs that a GPU rounds components to float16 before it multiplies them by a calibration's matrix.

    python benchmarks/gpu_rounding.py [--model DIR] [--texts DIR] [--windows 16]

A calibration is learned, a model's KV saved and loaded at each lossy quality by the CPU, once as it is and once with
the rounding of the GPU's kernels (csrc/cuda/scalable_tiles.h) in the CPU's product; fp8 beside it. Needs no GPU.
Results: a table, and benchmarks/results/gpu_rounding-<model>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from codec_quality import ASSETS, read_corpus
from quality.baselines import Fp8
from quality.kvtc import MOST_DIMENSIONS
from quality.measure import Judge, measure
from quality.ours import SCALABLE, calibrate_span, measure_mode, namespace_of
from record import record

from kvstore_s3.codec.stream_map import StreamMap
from kvstore_s3.connectors.pretrained import load_model


class Moved:
    """How far values move: sums of squares of the differences, and of the values."""

    def __init__(self) -> None:
        self.differences = self.values = 0.0

    @property
    def share(self) -> float:
        """Root mean square of the differences by that of the values."""
        return float((self.differences / self.values) ** 0.5)


@contextmanager
def rounded_components(moved: Moved) -> Iterator[None]:
    """Products of spans group and all take components as float16, scaled as the kernels scale them."""
    exactly = StreamMap.synthesise

    def synthesise(self: StreamMap, y: np.ndarray, levels: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        exact, scale = exactly(self, y, levels)
        unit = self.unit
        if unit is None or unit.synthesis is None or unit.synthesis.ndim != 2 or unit.synthesis.dtype != np.float16:
            return exact, scale
        shrink = np.exp2(-np.frexp(np.abs(unit.synthesis_scale).max())[1]).astype(np.float32)
        halves = (y * (unit.synthesis_scale * shrink)).astype(np.float16).astype(np.float32)
        found = halves @ unit.synthesis.astype(np.float32) / shrink
        moved.differences += float(np.square(found - exact, dtype=np.float64).sum())
        moved.values += float(np.square(exact, dtype=np.float64).sum())
        return found, None

    with patch.object(StreamMap, "synthesise", synthesise):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "models" / "books8M", help="directory of a model")
    parser.add_argument("--texts", type=Path, default=ASSETS / "text", help="folder of .txt files, or one such file")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows to judge (default: 16)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(str(arguments.model), "float32")
    namespace = namespace_of(model)
    corpus = read_corpus(arguments.model, model, arguments.texts, arguments.windows)
    judge = Judge(model, corpus.windows)
    mode = calibrate_span(model, namespace, corpus, None, MOST_DIMENSIONS)
    assert mode.calibration is not None
    if mode.calibration.span not in ("group", "all"):
        raise SystemExit(f"{mode.calibration.span} has no product that a GPU rounds for; give another model")
    exact = measure_mode(mode, namespace, judge, SCALABLE, timed=False)
    moved = Moved()
    with rounded_components(moved):
        rounded = measure_mode(mode, namespace, judge, SCALABLE, timed=False)
    fp8 = measure(Fp8(), judge)
    rows = [
        {"quality": one.setting, "bits": round(one.bits, 3), "kl": round(one.kl, 5), "kl_rounded": round(two.kl, 5)}
        for one, two in zip(exact, rounded, strict=True)
    ]
    for row in rows:
        print(f"{row['quality']:14} KL x 1000 {row['kl']:9.5f}, rounded {row['kl_rounded']:9.5f}")
    print(f"fp8            KL x 1000 {fp8.kl:9.5f}; values move by 2^{np.log2(moved.share):.1f} of their own")
    name = f"gpu_rounding-{arguments.model.resolve().name}"
    found = {"span": mode.calibration.span, "moved": moved.share, "fp8_kl": round(fp8.kl, 5), "rows": rows}
    record(name, {"windows": len(corpus.windows), **found}, "torch", "numpy", "transformers")


if __name__ == "__main__":
    main()
