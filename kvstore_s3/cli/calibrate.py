"""calibrate: learn how a model's KV is best coded, from some of its documents, and put the result into the store."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore_s3.cli import exits
from kvstore_s3.cli.documents import Document, Rejected, find_sources, read_documents
from kvstore_s3.cli.options import require_store
from kvstore_s3.cli.output import Report, align_table, count_noun, format_bytes, format_seconds, say
from kvstore_s3.cli.progress import WorkProgress
from kvstore_s3.cli.prompts import PromptStyle, check_template, render_request
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hub import find_model_directory
from kvstore_s3.layout import DTYPES
from kvstore_s3.namespace import Namespace

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration
    from kvstore_s3.config import Settings
    from kvstore_s3.connectors.transformers.calibrating import CalibrateOptions
    from kvstore_s3.runtime import SyncKVStore

MAX_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class CalibrateRequest:
    """What to learn from, and how. `style` and `jsonl_field` are those of warm."""

    documents: tuple[str, ...]
    model: str
    span: str = "group"
    layer_group: int | None = None
    metric: str = "fisher"
    kl_ratio: float = 0.25
    max_tokens: int = MAX_TOKENS
    style: PromptStyle = field(default_factory=PromptStyle)
    jsonl_field: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """What was learned and stored. `size` is the artefact's, in bytes."""

    calibration: Calibration
    digest: bytes
    size: int
    documents: int
    failed: tuple[Rejected, ...]
    seconds: float


def calibrate_documents(request: CalibrateRequest, settings: Settings) -> Report:
    """Calibrate a namespace. Cheap checks come first, so that a wrong flag costs no minutes."""
    if request.dtype is not None and request.dtype not in DTYPES:
        raise InvalidArgumentError(f"unknown dtype {request.dtype!r}; use one of {', '.join(DTYPES)}")
    if request.style.template_arguments and not request.style.chat:
        raise InvalidArgumentError("--chat-argument is for the chat template; add --chat")
    if not request.documents:
        raise InvalidArgumentError("no documents given; name files, directories or globs of text")
    url = require_store(settings)
    sources = find_sources(request.documents)

    from kvstore_s3.connectors import pretrained
    from kvstore_s3.connectors.transformers.calibrating import check_options
    from kvstore_s3.runtime import connect

    directory = find_model_directory(request.model)
    namespace = Namespace.from_model(
        directory, dtype=request.dtype, chunk_tokens=settings.chunk_tokens, cache_dir=settings.cache_dir
    )
    check_options(_options_of(request), namespace)
    pretrained.check_computable(namespace.layout.dtype)
    with connect(url, namespace, settings) as store:
        result = calibrate_store(store, request, sources)
        return _report(result, namespace, store.kv.objects.url)


def calibrate_store(store: SyncKVStore, request: CalibrateRequest, sources: Sequence[Path]) -> CalibrateResult:
    """Learn a calibration for the store's namespace from `sources`, and make it the one that writers use.

    The weights are loaded here, and given back. Raises `InvalidArgumentError` for documents that are too short or
    cannot be used, `StoreError` where the store fails, which is tried before anything is computed.
    """
    start = time.monotonic()
    from kvstore_s3.connectors import pretrained
    from kvstore_s3.connectors.transformers.calibrating import calibrate, count_work
    from kvstore_s3.connectors.transformers.exact_model import load_exact
    from kvstore_s3.connectors.transformers.windows import plan_windows

    namespace, options = store.namespace, _options_of(request)
    tokenizer = pretrained.load_tokenizer(request.model)
    check_template(tokenizer, request.style, request.model)
    tokens, failed = _read_tokens(sources, tokenizer, request)
    if not tokens:
        raise InvalidArgumentError(f"{failed[0].name}: {failed[0].reason}")
    sample = plan_windows(
        tokens,
        prefix=_special_prefix(tokenizer),
        chunk_tokens=namespace.chunk_tokens,
        max_tokens=request.max_tokens,
        context_tokens=pretrained.read_context_tokens(request.model),
    )
    _describe_namespace(store)
    say(f"{count_noun(sample.tokens, 'token')} to learn from; loading {request.model}")
    model = load_exact(find_model_directory(request.model), namespace)
    with WorkProgress("calibrate", count_work(sample, options, namespace.layout.layers), "token") as progress:
        calibration = calibrate(model, namespace, sample, options, progress.advance)
    if calibration.report["rows"] < calibration.report["enough_rows"]:
        say(_too_few(calibration))
    data = calibration.to_bytes()
    digest = store.runtime.run(store.kv.calibrations.publish(data))
    return CalibrateResult(calibration, digest, len(data), len(tokens), tuple(failed), time.monotonic() - start)


def _options_of(request: CalibrateRequest) -> CalibrateOptions:
    from kvstore_s3.connectors.transformers.calibrating import CalibrateOptions

    return CalibrateOptions(request.span, request.layer_group, request.metric, request.kl_ratio)


def _read_tokens(
    sources: Sequence[Path], tokenizer: Any, request: CalibrateRequest
) -> tuple[list[list[int]], list[Rejected]]:
    """The tokens of all documents, without the special ones in front, and what cannot be used."""
    tokens: list[list[int]] = []
    failed: list[Rejected] = []
    for source in sources:
        for document in read_documents(source, sys.stdin.buffer, jsonl_field=request.jsonl_field):
            if isinstance(document, Rejected):
                failed.append(document)
                continue
            try:
                tokens.append(_tokenise(tokenizer, document, request.style))
            except InvalidArgumentError as error:
                failed.append(Rejected(document.name, str(error)))
    return tokens, failed


def _tokenise(tokenizer: Any, document: Document, style: PromptStyle) -> list[int]:
    ids: list[int] = tokenizer(render_request(tokenizer, document, "", style), add_special_tokens=False)["input_ids"]
    return ids


def _special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: models lose their bearings where it is missing."""
    plain = tokenizer("probe", add_special_tokens=False)["input_ids"]
    full = tokenizer("probe")["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(plain)] == plain)
    return list(full[: next(starts, 0)])


def _describe_namespace(store: SyncKVStore) -> None:
    """A store that cannot be written is found out here, and not after minutes of work."""
    data = store.namespace.to_json().encode("ascii")
    store.runtime.run(store.kv.objects.put(f"{store.namespace.hex}/namespace.json", data))


def _too_few(calibration: Calibration) -> str:
    report = calibration.report
    wanted = -(-report["tokens"] * report["enough_rows"] // report["rows"])
    return (
        f"warning: {report['tokens']:,} tokens are few for a transform of dimension {report['dimension']:,}; give "
        f"{wanted:,} or more, or a smaller --layer-group, or --span head"
    )


def _report(result: CalibrateResult, namespace: Namespace, store: str) -> Report:
    report = result.calibration.report
    data = {
        "store": store,
        "namespace": namespace.hex,
        "model": namespace.model,
        "dtype": namespace.layout.dtype,
        "digest": result.digest.hex(),
        "bytes": result.size,
        "documents": result.documents,
        "failed": [{"name": rejected.name, "reason": rejected.reason} for rejected in result.failed],
        **report,
        "seconds": round(result.seconds, 3),
    }
    return Report(data, _describe(result, namespace), exits.SOME_FAILED if result.failed else exits.DONE)


def _describe(result: CalibrateResult, namespace: Namespace) -> list[str]:
    report, layout = result.calibration.report, namespace.layout
    kl, bits = report["kl"], report["bits_per_value"]
    names = ("near-lossless", "balanced", "small")
    rows = [[name, f"{bits[name]:.2f}", f"{1000 * kl[name]:.3f}"] for name in names]
    rows.append(["fp8 KV", "8.00", f"{1000 * kl['fp8']:.3f}"])
    span = f"span {report['span']} over {count_noun(report['layer_group'], 'layer')} of {layout.layers}"
    return [
        f"namespace   {namespace.hex[:16]}  {namespace.model}, {layout.dtype}",
        f"calibration {result.digest.hex()[:16]}  {format_bytes(result.size)}, {span}, metric {report['metric']}",
        f"learned     from {count_noun(report['tokens'], 'token')} of {count_noun(result.documents, 'document')} "
        f"in {format_seconds(result.seconds)}",
        *align_table(["quality", "bits/value", "KL x 1000"], rows),
        *(f"failed      {rejected.name}: {rejected.reason}" for rejected in result.failed),
    ]
