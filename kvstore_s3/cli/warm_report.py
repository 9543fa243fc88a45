"""What warm did, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvstore_s3.cli import exits
from kvstore_s3.cli.output import Report, count_noun, format_bytes, format_seconds
from kvstore_s3.cli.warm_plan import Plan
from kvstore_s3.namespace import Namespace
from kvstore_s3.quality import describe_quality, find_quality


@dataclass(slots=True)
class WarmResult:
    """The plan, and what has been done about it. `seconds` is all of it, `compute_seconds` prefill and saving alone."""

    plan: Plan
    namespace: Namespace
    store: str
    profile: str
    dry_run: bool
    tokens_computed: int = 0
    chunks_new: int = 0
    bytes_new: int = 0
    seconds: float = 0.0
    compute_seconds: float = 0.0
    calibrated: bool | None = None
    """Whether what is new was coded with a calibration; None where the profile has none, or nothing is new."""

    @property
    def raw_new(self) -> int:
        """Uncompressed bytes of the new chunks."""
        return self.chunks_new * self._raw_chunk

    @property
    def raw_missing(self) -> int:
        return len(self.plan.chunks - self.plan.present) * self._raw_chunk

    @property
    def _raw_chunk(self) -> int:
        return self.namespace.chunk_tokens * self.namespace.layout.bytes_per_token

    @property
    def bits_per_value(self) -> float | None:
        values = self.raw_new // self.namespace.layout.itemsize
        return self.bytes_new * 8 / values if values else None


def report_warm(result: WarmResult) -> Report:
    exit_code = exits.SOME_FAILED if result.plan.failed else exits.DONE
    return Report(_collect(result), list(_describe(result)), exit_code)


def _collect(result: WarmResult) -> dict[str, Any]:
    plan, namespace = result.plan, result.namespace
    present = len(plan.chunks) - result.chunks_new if not result.dry_run else len(plan.present)
    return {
        "store": result.store,
        "namespace": namespace.hex,
        "model": namespace.model,
        "dtype": namespace.layout.dtype,
        "chunk_tokens": namespace.chunk_tokens,
        "profile": result.profile,
        "calibrated": result.calibrated,
        "dry_run": result.dry_run,
        "documents": [
            {"name": planned.name, "tokens": planned.shared, "whole": planned.whole, "stored_before": planned.stored}
            for planned in plan.documents
        ],
        "failed": [{"name": rejected.name, "reason": rejected.reason} for rejected in plan.failed],
        "tokens": sum(planned.shared for planned in plan.documents),
        "tokens_computed": result.tokens_computed,
        "chunks": len(plan.chunks),
        "chunks_new": result.chunks_new,
        "chunks_present": max(present, 0),
        "chunks_missing": len(plan.chunks - plan.present) if result.dry_run else 0,
        "raw_bytes": result.raw_missing if result.dry_run else result.raw_new,
        "bytes": result.bytes_new,
        "ratio": round(result.raw_new / result.bytes_new, 3) if result.bytes_new else None,
        "bits_per_value": result.bits_per_value and round(result.bits_per_value, 3),
        "seconds": round(result.seconds, 3),
        "compute_seconds": round(result.compute_seconds, 3),
    }


def _describe(result: WarmResult) -> Iterator[str]:
    plan = result.plan
    tokens = sum(planned.shared for planned in plan.documents)
    yield f"namespace  {result.namespace.hex[:16]}  {result.namespace.model}, {result.namespace.layout.dtype}"
    if result.profile != "lossless":
        yield f"profile    {describe_quality(result.profile, result.calibrated)}"
    yield f"documents  {len(plan.documents):,}, {count_noun(tokens, 'token')}"
    if result.dry_run:
        missing = len(plan.chunks - plan.present)
        size = result.namespace.chunk_tokens
        yield f"chunks     {len(plan.chunks):,} of {size} tokens: {len(plan.present):,} present"
        yield f"would add  {count_noun(missing, 'chunk')}, {format_bytes(result.raw_missing)} uncompressed"
    else:
        present = max(len(plan.chunks) - result.chunks_new, 0)
        yield f"chunks     {result.chunks_new:,} new, {present:,} present, of {result.namespace.chunk_tokens} tokens"
        yield f"stored     {_describe_bytes(result)}"
        yield f"time       {_describe_time(result)}"
    short = [planned.name for planned in plan.documents if not planned.whole]
    if short:
        shown = ", ".join(short[:3]) + (", ..." if len(short) > 3 else "")
        yield f"too short  {len(short):,} with less than one chunk of tokens, nothing to store: {shown}"
    for rejected in plan.failed:
        yield f"failed     {rejected.name}: {rejected.reason}"


def _describe_bytes(result: WarmResult) -> str:
    if not result.bytes_new:
        return "nothing new"
    ratio = result.raw_new / result.bytes_new
    size, raw = format_bytes(result.bytes_new), format_bytes(result.raw_new)
    scalable = find_quality(result.profile).object_profile == "scalable"
    what = ", near-lossless, balanced and small together" if scalable else ""
    return f"{size} for {raw} of KV: ratio {ratio:.2f}, {result.bits_per_value:.2f} bits a value{what}"


def _describe_time(result: WarmResult) -> str:
    total = format_seconds(result.seconds)
    if not result.tokens_computed or result.compute_seconds <= 0:
        return total
    rate = result.tokens_computed / result.compute_seconds
    return f"{total}, {result.tokens_computed:,} tokens computed and stored at {rate:,.0f} tokens/s"
