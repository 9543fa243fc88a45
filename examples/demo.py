"""The demo: store the KV of three documents, then ask about one of them from a new process, cold and warm.

    python examples/demo.py                            a small model with fixed random weights, a store in .demo/
    python examples/demo.py --model DIR_OR_HUB_ID      a model of your own
    python examples/demo.py --store minio              over S3, to a MinIO that lives as long as the demo
    python examples/demo.py --store s3://bucket/dir    to a store of your own

Ends with 0 if both runs gave the same tokens, else with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCUMENTS = HERE / "documents"
HOME = HERE.parent / ".demo"

ROOM = 192
"""Tokens of the model's context that are kept for the chat template, the question and the answer."""

DOCUMENT = DOCUMENTS / "greenhouse-controller-manual.md"
QUESTION = "\n\nComplete the sentence from the manual: Rinse the drippers once in a season"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` and `finally` end what was started
    try:
        with open_store(options.store) as (url, environment):
            return run_demo(options, url, {**os.environ, **environment})
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        print(f"demo: this failed with exit code {error.returncode}: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Warm documents, then ask about one from a new process.")
    parser.add_argument("--model", help="model directory or hub id (default: a small one with fixed random weights)")
    parser.add_argument("--store", default="file", help="file, minio, or the URL of a store (default: %(default)s)")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="which document to ask about")
    parser.add_argument("--question", default=QUESTION, help="what to ask after the document")
    return parser.parse_args(arguments)


@contextmanager
def open_store(store: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The store's URL and what its credentials add to the environment. The stores of the demo itself start empty."""
    if store == "file":
        directory = HOME / "store"
        shutil.rmtree(directory, ignore_errors=True)
        yield directory.as_uri(), {}
    elif store == "minio":
        from minio_server import BUCKET, ServerMissingError, running_minio

        try:
            with running_minio() as server:
                yield f"s3://{BUCKET}/demo", server.environment()
        except ServerMissingError as error:
            sys.exit(f"demo: {error}")
    else:
        yield store, {}


def run_demo(options: argparse.Namespace, url: str, environment: Mapping[str, str]) -> int:
    model = options.model or str(build_model())
    tokenizer, context = read_model(model)
    documents = [*sorted(DOCUMENTS.glob("*.md"))]
    asked = options.document.resolve()
    if asked not in documents:
        documents.append(asked)
    fitting = {path: fit_document(path, tokenizer, context) for path in documents}
    chat = ["--chat"] if tokenizer.chat_template is not None else []
    warm = [str(Path(sys.executable).with_name("kvstore-s3")), "warm", *name_sources(fitting)]
    stored = run([*warm, "--model", model, "--store", url, *chat, "--json"], environment)
    ask = [sys.executable, str(HERE / "demo_ask.py"), model, url, str(fitting[asked]), options.question]
    answer = run(ask, environment)
    report(options, stored, answer)
    return 0 if answer["identical"] and answer["loaded_tokens"] else 1


def build_model() -> Path:
    """Build the demo's model under `HOME`, or take the one of an earlier run."""
    from demo_model import build_demo_model

    return build_demo_model(HOME, [path.read_text() for path in sorted(DOCUMENTS.glob("*.md"))])


def read_model(model: str) -> tuple[Any, int | None]:
    """The model's tokenizer, and how many tokens it was made for."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    return AutoTokenizer.from_pretrained(model), getattr(config, "max_position_embeddings", None)


def fit_document(path: Path, tokenizer: Any, context: int | None) -> Path:
    """The document, or a copy without its last paragraphs where it leaves no room for a question and its answer."""
    paragraphs = path.read_text().split("\n\n")
    whole = len(paragraphs)
    while context and len(tokenizer("\n\n".join(paragraphs))["input_ids"]) > context - ROOM and len(paragraphs) > 1:
        paragraphs.pop()
    if len(paragraphs) == whole:
        return path
    print(f"{path.name}: the first {len(paragraphs)} of {whole} paragraphs, the model reads {context:,} tokens")
    short = HOME / "documents" / path.name
    short.parent.mkdir(parents=True, exist_ok=True)
    short.write_text("\n\n".join(paragraphs))
    return short


def name_sources(fitting: Mapping[Path, Path]) -> list[str]:
    """The sources for the command line: the directory, as long as all of its documents are taken as they are."""
    if any(fitting[path] != path for path in fitting):
        return [str(path) for path in fitting.values()]
    return [str(DOCUMENTS), *(str(path) for path in fitting if path.parent != DOCUMENTS)]


def run(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a command that prints one JSON document; its progress goes to the terminal. It never outlives this call."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def report(options: argparse.Namespace, stored: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    computed = answer["prompt_tokens"] - answer["loaded_tokens"]
    bits = stored["bits_per_value"]
    lines = {
        "document": f"{options.document.name}, {answer['prompt_tokens']:,} tokens with the question",
        "answer": repr(answer["text"]),
        "stored": f"{stored['tokens']:,} tokens of {len(stored['documents'])} documents"
        + (f": {stored['bytes']:,} bytes, {bits:.2f} bits a value" if bits else ", all of them by an earlier run"),
        "cold": f"{answer['cold_seconds']:7.3f} s to the first token: {answer['prompt_tokens']:,} tokens computed",
        "warm": f"{answer['warm_seconds']:7.3f} s to the first token: {answer['loaded_tokens']:,} tokens loaded in "
        f"{answer['load_seconds']:.3f} s, {computed:,} computed",
        "ratio": f"{answer['cold_seconds'] / answer['warm_seconds']:7.1f} x",
        "tokens": f"identical, all {answer['tokens']}" if answer["identical"] else "NOT identical",
    }
    print()
    for name, line in lines.items():
        print(f"{name:10}{line}")


if __name__ == "__main__":
    sys.exit(main())
