"""Before a warm writes lossy objects: is there a calibration to code them with, and is one to be learned first?"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from kvstore_s3.cli.output import format_seconds, say
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.quality import QUALITIES, find_quality

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore_s3.cli.prompts import PromptStyle
    from kvstore_s3.cli.warm import WarmOptions
    from kvstore_s3.config import Settings
    from kvstore_s3.runtime import SyncKVStore


def check_calibrate_flag(profile: str, options: WarmOptions) -> None:
    """Refuse --calibrate where it cannot be done. Raises `InvalidArgumentError`."""
    if options.calibrate and "-" in options.documents:
        raise InvalidArgumentError("--calibrate reads the documents twice, and standard input can be read once")
    if options.calibrate and find_quality(profile).object_profile != "scalable":
        names = ", ".join(name for name, quality in QUALITIES.items() if quality.object_profile == "scalable")
        raise InvalidArgumentError(f"--calibrate: profile {profile!r} uses no calibration; {names} do")


def wants_calibration(store: SyncKVStore, options: WarmOptions, settings: Settings) -> bool:
    """Whether to calibrate before anything is stored: never where there is a calibration, else as the user says.

    `options.calibrate` decides; without it a terminal is asked, and anybody else told the command to run.
    """
    quality = find_quality(settings.profile)
    if quality.object_profile != "scalable" or store.runtime.run(store.kv.calibrations.current()) is not None:
        return False
    if options.calibrate is None and not options.dry_run and _may_ask(options.documents):
        return _ask()
    if options.calibrate and not options.dry_run:
        return True
    say(
        f"no calibration: profile {quality.name!r} is stored uncalibrated, larger than need be; calibrate first with: "
        f"{calibrate_command(options, settings)}"
    )
    return False


def calibrate_first(
    store: SyncKVStore, options: WarmOptions, style: PromptStyle, sources: Sequence[Path], profile: str
) -> None:
    """Learn a calibration from the documents of this warm, and make it the one that is used from now on."""
    from kvstore_s3.cli.calibrate import CalibrateRequest, calibrate_store

    request = CalibrateRequest(
        documents=options.documents,
        model=options.model,
        style=style,
        jsonl_field=options.jsonl_field,
        dtype=options.dtype,
    )
    result = calibrate_store(store, request, sources)
    bits = result.calibration.report["bits_per_value"][profile]
    say(
        f"calibration {result.digest.hex()[:16]} learned in {format_seconds(result.seconds)}; "
        f"a reader of {profile} fetches {bits:.2f} bits a value with it"
    )


def calibrate_command(options: WarmOptions, settings: Settings) -> str:
    """The command line that calibrates on the documents of this warm."""
    words = ["kvstore-s3", "calibrate", *options.documents, "--model", options.model, "--store", settings.store or ""]
    default = type(settings).model_fields["chunk_tokens"].default
    flags = {
        "--endpoint-url": settings.endpoint_url,
        "--region": settings.region,
        "--prefix-file": options.prefix_file,
        "--jsonl-field": options.jsonl_field,
        "--dtype": options.dtype,
        "--chunk-tokens": None if settings.chunk_tokens == default else settings.chunk_tokens,
    }
    for flag, value in flags.items():
        words += [] if value is None else [flag, str(value)]
    words += ["--chat"] if options.chat else []
    for argument in options.chat_arguments:
        words += ["--chat-argument", argument]
    return shlex.join(words)


def _may_ask(documents: Sequence[str]) -> bool:
    return "-" not in documents and _is_terminal(sys.stdin) and _is_terminal(sys.stderr)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def _ask() -> bool:
    """Yes unless the answer begins with n; a closed input is a no."""
    sys.stderr.write("kvstore-s3: this model has no calibration; calibrate first on these documents? [Y/n] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    return bool(answer) and not answer.strip().lower().startswith("n")
