"""The verbs and their options. Parsing is apart from work: a verb returns what is to be run, and `run` runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvstore_s3.cli import exits, options
from kvstore_s3.cli.output import Report, print_failure, print_report
from kvstore_s3.errors import KVStoreError

Work = Callable[[], Report]

UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
"""Comes from click or from typer's own copy of click, by typer's version; what is caught is the base class."""

app = typer.Typer(
    name="kvstore-s3",
    help="Persistent LLM KV caches on object stores.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 some of it failed, 2 usage, 3 store not reachable or refused, 4 damaged data found. "
    "Settings: flags, then KVSTORE_S3_* in the environment, then kvstore-s3.toml, then defaults.",
)


@app.callback()
def _root() -> None:
    """Persistent LLM KV caches on object stores: warm documents once, hit them from any engine."""


@app.command(short_help="Prefill documents and store their KV cache.")
def warm(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCS...",
            help="Directories (.txt .md .rst .jsonl .ndjson, hidden ones left out), globs, files, JSONL files, "
            "- for standard input.",
        ),
    ],
    model: Annotated[str, typer.Option("--model", metavar="M", help="Model directory or hub id.")],
    store: options.Store = None,
    endpoint_url: options.Endpoint = None,
    region: options.Region = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="lossless (the default), near-lossless, balanced, small, cachegen; see the setting profile.",
        ),
    ] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Learn a calibration from these documents first, where a lossy profile lacks one (default: ask).",
            show_default=False,
        ),
    ] = None,
    prefix_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="System prompt in front of every document.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the model's chat template.")] = False,
    chat_argument: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Variable of the chat template, VALUE as JSON or text; repeatable."),
    ] = None,
    jsonl_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field of a JSONL line; default text, else messages.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="KV dtype, such as bfloat16 (default: the model's own).")
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in a chunk; part of the cache's identity.")
    ] = None,
    salt: Annotated[str | None, typer.Option(help="Cache salt: same tokens, separate cache.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be stored; no weights are loaded.")
    ] = False,
    json: options.Json = False,
) -> Work:
    """Prefill documents and store their KV cache, so that a later request that starts with one of them hits.

    What is stored already is skipped. An interrupted run leaves nothing half-made; the next one goes on.
    """

    def work() -> Report:
        from kvstore_s3.cli.warm import WarmOptions, warm_documents

        options.check_profile(profile)
        settings = options.read_settings(
            store=store, endpoint_url=endpoint_url, region=region, chunk_tokens=chunk_tokens, profile=profile
        )
        return warm_documents(
            WarmOptions(
                documents=tuple(documents),
                model=model,
                calibrate=calibrate,
                prefix_file=prefix_file,
                chat=chat,
                chat_arguments=tuple(chat_argument or ()),
                jsonl_field=jsonl_field,
                dtype=dtype,
                salt=salt,
                dry_run=dry_run,
            ),
            settings,
        )

    return work


@app.command(short_help="Learn how a model's KV is best coded, for lossy profiles.")
def calibrate(
    model: Annotated[str, typer.Option("--model", metavar="M", help="Model directory or hub id.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DOCS]...", help="Text to learn from, as for warm; 32,768 tokens of it are enough."),
    ] = None,
    docs: Annotated[list[str] | None, typer.Option("--docs", metavar="D", help="The same as DOCS; repeatable.")] = None,
    store: options.Store = None,
    endpoint_url: options.Endpoint = None,
    region: options.Region = None,
    span: Annotated[
        str, typer.Option(metavar="S", help="Reach of the transform: channel, head, group (of layers) or all heads.")
    ] = "group",
    layer_group: Annotated[
        int | None,
        typer.Option(metavar="G", help="Layers of a group (default: so many that a transform has dimension 1,024)."),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="What errors cost: fisher (by gradients) or gains (by noise).")
    ] = "fisher",
    kl_ratio: Annotated[
        float, typer.Option(metavar="R", help="KL divergence of near-lossless, relative to that of fp8 KV.")
    ] = 0.25,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to learn from.")] = 32768,
    prefix_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="System prompt in front of every document.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the model's chat template.")] = False,
    chat_argument: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Variable of the chat template; repeatable.")
    ] = None,
    jsonl_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field of a JSONL line; default text, else messages.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="KV dtype, such as bfloat16 (default: the model's own).")
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in a chunk; part of the cache's identity.")
    ] = None,
    json: options.Json = False,
) -> Work:
    """Learn from some documents how a model's KV is best coded, and store that for the lossy profiles.

    Objects that are stored afterwards name this calibration. A new one replaces it; older objects stay readable.
    """

    def work() -> Report:
        from kvstore_s3.cli.calibrate import CalibrateRequest, calibrate_documents
        from kvstore_s3.cli.warm import WarmOptions, read_style

        settings = options.read_settings(
            store=store, endpoint_url=endpoint_url, region=region, chunk_tokens=chunk_tokens
        )
        return calibrate_documents(
            CalibrateRequest(
                documents=(*(documents or ()), *(docs or ())),
                model=model,
                span=span,
                layer_group=layer_group,
                metric=metric,
                kl_ratio=kl_ratio,
                max_tokens=max_tokens,
                style=read_style(
                    WarmOptions(
                        (), model, prefix_file=prefix_file, chat=chat, chat_arguments=tuple(chat_argument or ())
                    )
                ),
                jsonl_field=jsonl_field,
                dtype=dtype,
            ),
            settings,
        )

    return work


Namespace = Annotated[
    str | None, typer.Option("--namespace", metavar="HEX", help="A namespace, by the beginning of its digest.")
]


@app.command(short_help="List namespaces, or one namespace's chunks.")
def ls(
    store: options.Store = None,
    namespace: Namespace = None,
    endpoint_url: options.Endpoint = None,
    region: options.Region = None,
    json: options.Json = False,
) -> Work:
    """List the namespaces of a store (model, dtype, chunks, tokens, bytes), or the chunks of one."""

    def work() -> Report:
        from kvstore_s3.cli.inspect import list_store

        return list_store(options.read_settings(store=store, endpoint_url=endpoint_url, region=region), namespace)

    return work


@app.command(short_help="Totals of a store, or details of a namespace.")
def stat(
    store: options.Store = None,
    namespace: Namespace = None,
    endpoint_url: options.Endpoint = None,
    region: options.Region = None,
    json: options.Json = False,
) -> Work:
    """Totals of a store; with --namespace its identity, codecs, sections and bits a value.

    Details come from the headers of up to 64 objects of the namespace.
    """

    def work() -> Report:
        from kvstore_s3.cli.inspect import stat_store

        return stat_store(options.read_settings(store=store, endpoint_url=endpoint_url, region=region), namespace)

    return work


@app.command(short_help="Verify every stored object.")
def check(
    store: options.Store = None,
    namespace: Namespace = None,
    delete: Annotated[
        bool,
        typer.Option(
            "--delete", help="Remove what is damaged or cannot be decoded, so that the next warm stores it again."
        ),
    ] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every section too.")] = False,
    endpoint_url: options.Endpoint = None,
    region: options.Region = None,
    json: options.Json = False,
) -> Work:
    """Read every object and verify header, name and section checksums. Exit code 4 when damage was found."""

    def work() -> Report:
        from kvstore_s3.cli.check import check_store

        settings = options.read_settings(store=store, endpoint_url=endpoint_url, region=region)
        return check_store(settings, namespace, delete=delete, decode=decode)

    return work


@app.command(short_help="Remove what interrupted writers left behind.")
def gc(
    store: options.Store = None,
    uploads: Annotated[
        bool, typer.Option("--uploads", help="Unfinished multipart uploads; for file://, temporary files.")
    ] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Leave uploads alone that began lately: 90s, 30m, 1h, 2d.")
    ] = "1h",
    lifecycle: Annotated[
        bool, typer.Option("--lifecycle", help="Also have the bucket do so by itself, a day after an upload began.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    endpoint_url: options.Endpoint = None,
    region: options.Region = None,
    json: options.Json = False,
) -> Work:
    """Remove what writers left behind that were killed: multipart uploads below the store's prefix, temporary files.

    Finds what the server lists, and what this machine's journals tell of (MinIO lists no uploads of a prefix).
    """

    def work() -> Report:
        from kvstore_s3.cli.gc import GcOptions, collect_garbage

        settings = options.read_settings(store=store, endpoint_url=endpoint_url, region=region)
        return collect_garbage(GcOptions(uploads, older_than, lifecycle, dry_run), settings)

    return work


@app.command(short_help="Say what this installation can do on this machine.")
def doctor(json: options.Json = False) -> Work:
    """Say what this installation can do here: the CPU's codecs, the GPU library, the GPU. Needs no store."""

    def work() -> Report:
        from kvstore_s3.cli.doctor import examine

        return examine()

    return work


def find_help(arguments: Sequence[str]) -> str | None:
    """The help text that `arguments` ask for, if they do. Typer's own way to it goes through pydantic: 0.3 s."""
    options_only = arguments[: list(arguments).index("--")] if "--" in arguments else arguments
    if "--help" not in options_only:
        return None
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="kvstore-s3")
    verb = root.get_command(context, arguments[0])  # type: ignore[attr-defined]
    if verb is None:
        return root.get_help(context)
    return str(verb.get_help(typer.Context(verb, info_name=arguments[0], parent=context)))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Output goes to stdout and stderr."""
    help_text = find_help(arguments)
    if help_text is not None:
        sys.stdout.write(help_text + "\n")
        return exits.DONE
    as_json = "--json" in arguments
    try:
        with exits.raise_on_signals():
            work: Work = app(list(arguments), prog_name="kvstore-s3", standalone_mode=False)
            report = work()
            print_report(report, as_json=as_json)
            return report.exit_code
    except UsageError as error:
        print_failure(f"{error.format_message()} (see kvstore-s3 --help)", exits.USAGE, as_json=as_json)
        return exits.USAGE
    except KVStoreError as error:
        print_failure(str(error), error.exit_code, as_json=as_json)
        return error.exit_code
    except exits.Interrupted as error:
        message = "stopped; whatever was stored is whole, and a second run goes on from there"
        print_failure(message, error.exit_code, as_json=as_json)
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout has gone, as in `kvstore-s3 ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.SOME_FAILED
