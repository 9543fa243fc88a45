"""warm: plan (read, tokenise, look up), then compute and store what is missing, loading weights at the first miss."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore_s3.cli.documents import find_sources, read_text
from kvstore_s3.cli.inventory import NAMESPACE_JSON
from kvstore_s3.cli.options import require_store
from kvstore_s3.cli.output import Report, count_noun, say
from kvstore_s3.cli.progress import WorkProgress
from kvstore_s3.cli.prompts import PromptStyle, check_template, writes_date
from kvstore_s3.cli.warm_calibration import calibrate_first, check_calibrate_flag, wants_calibration
from kvstore_s3.cli.warm_plan import Plan, PlannedDocument, Planner
from kvstore_s3.cli.warm_report import WarmResult, report_warm
from kvstore_s3.errors import InvalidArgumentError, StoreError
from kvstore_s3.layout import DTYPES
from kvstore_s3.namespace import Namespace
from kvstore_s3.quality import find_quality

if TYPE_CHECKING:
    from kvstore_s3.config import Settings
    from kvstore_s3.connectors.transformers import PrefixCache
    from kvstore_s3.runtime import SyncKVStore


@dataclass(frozen=True, slots=True)
class WarmOptions:
    """The command line of warm, as it was given; the profile is a setting."""

    documents: tuple[str, ...]
    model: str
    calibrate: bool | None = None
    """Learn a calibration first where one is lacking: yes, no, or ask."""
    prefix_file: Path | None = None
    chat: bool = False
    chat_arguments: tuple[str, ...] = ()
    jsonl_field: str | None = None
    dtype: str | None = None
    salt: str | None = None
    dry_run: bool = False


def warm_documents(options: WarmOptions, settings: Settings) -> Report:
    """Store the KV of all documents. Cheap checks come first, so that a wrong flag costs no minutes."""
    start = time.monotonic()
    _check_names(options)
    check_calibrate_flag(settings.profile, options)
    url = require_store(settings)
    style = read_style(options)
    sources = find_sources(options.documents)

    from kvstore_s3.connectors import pretrained
    from kvstore_s3.runtime import connect

    namespace = Namespace.from_model(
        options.model, dtype=options.dtype, chunk_tokens=settings.chunk_tokens, cache_dir=settings.cache_dir
    )
    pretrained.check_computable(namespace.layout.dtype)
    with connect(url, namespace, _read_the_best(settings)) as store:
        tokenizer = pretrained.load_tokenizer(options.model)
        check_template(tokenizer, style, options.model)
        if writes_date(tokenizer, style):
            say("warning: the chat template writes today's date; fix it with --chat-argument date_string='26 Jul 2024'")
        planner = Planner(store, tokenizer, style, pretrained.read_context_tokens(options.model), options.salt)
        plan = planner.plan(sources, options.jsonl_field)
        if not plan.documents:
            raise InvalidArgumentError(_nothing_usable(plan))
        result = WarmResult(plan, namespace, store.kv.objects.url, settings.profile, options.dry_run)
        calibrate = bool(plan.missing_tokens) and wants_calibration(store, options, settings)
        if calibrate:
            calibrate_first(store, options, style, sources, settings.profile)
        if not options.dry_run:
            _store_plan(plan, store, options, result)
        result.seconds = time.monotonic() - start
        return report_warm(result)


def _read_the_best(settings: Settings) -> Settings:
    """A scalable object holds every quality: what a warm builds on is read at the best, lest it ends in others' KV."""
    scalable = find_quality(settings.profile).object_profile == "scalable"
    return settings.model_copy(update={"profile": "near-lossless"}) if scalable else settings


def _store_plan(plan: Plan, store: SyncKVStore, options: WarmOptions, result: WarmResult) -> None:
    if any(document.stored for document in plan.documents):
        _describe_namespace(store)
    if not plan.missing_tokens:
        return
    from kvstore_s3.connectors.pretrained import load_model
    from kvstore_s3.connectors.transformers import PrefixCache

    say(f"{count_noun(plan.missing_tokens, 'token')} to compute; loading {options.model}")
    cache = PrefixCache(load_model(options.model, store.namespace.layout.dtype), store)
    started = time.monotonic()
    try:
        _compute(plan, cache, options.salt, result)
    except StoreError as error:
        kept = " (what was stored by then is whole; a second run goes on from there)" if result.chunks_new else ""
        raise type(error)(f"{error}{kept}") from error
    finally:
        result.compute_seconds = time.monotonic() - started


def _compute(plan: Plan, cache: PrefixCache, salt: str | None, result: WarmResult) -> None:
    missing = [document for document in plan.documents if document.missing]
    with WorkProgress("warm", plan.missing_tokens, "token") as progress:
        for number, document in enumerate(missing, 1):
            counter = _Counter(progress, document, f"{number}/{len(missing)} {document.name}", result)
            saved = cache.warm(document.tokens[: document.whole], salt=salt, progress=counter.advance)
            result.chunks_new += saved.chunks_new
            result.bytes_new += saved.bytes
            if saved.calibrated is not None:
                result.calibrated = saved.calibrated and result.calibrated is not False


class _Counter:
    """Turns the tokens done of one document into progress of the whole."""

    def __init__(self, progress: WorkProgress, document: PlannedDocument, label: str, result: WarmResult) -> None:
        self._progress, self._label, self._result = progress, label, result
        self._planned = document.stored
        self._done: int | None = None
        progress.advance(0, label)

    def advance(self, tokens: int) -> None:
        """The first call tells what was stored: more than planned where an earlier document shares a prefix."""
        if self._done is None:
            self._progress.skip(tokens - self._planned)
        else:
            self._progress.advance(tokens - self._done, self._label)
            self._result.tokens_computed += tokens - self._done
        self._done = tokens


def _describe_namespace(store: SyncKVStore) -> None:
    """Put the namespace's description back, should it have been lost; a save writes it only with something new."""
    data = store.namespace.to_json().encode("ascii")
    store.runtime.run(store.kv.objects.put(f"{store.namespace.hex}/{NAMESPACE_JSON}", data))


def _check_names(options: WarmOptions) -> None:
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InvalidArgumentError(f"unknown dtype {options.dtype!r}; use one of {', '.join(DTYPES)}")
    if options.chat_arguments and not options.chat:
        raise InvalidArgumentError("--chat-argument is for the chat template; add --chat")


def read_style(options: WarmOptions) -> PromptStyle:
    prefix = read_text(options.prefix_file, "--prefix-file") if options.prefix_file else ""
    if options.prefix_file and not prefix.strip():
        raise InvalidArgumentError(f"--prefix-file {str(options.prefix_file)!r} is empty; give it text or leave it out")
    return PromptStyle(prefix, options.chat, dict(map(_parse_argument, options.chat_arguments)))


def _parse_argument(argument: str) -> tuple[str, Any]:
    name, equals, value = argument.partition("=")
    if not equals or not name.isidentifier():
        raise InvalidArgumentError(f"--chat-argument {argument!r}: expected NAME=VALUE, such as enable_thinking=false")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _nothing_usable(plan: Plan) -> str:
    first = plan.failed[0]
    rest = len(plan.failed) - 1
    return f"{first.name}: {first.reason}" + (f" (and {rest} more that cannot be used either)" if rest else "")
