"""From the command line's DOCS to documents: directories, globs, files, JSONL and standard input. No model is involved.

A text document is the file's bytes read as UTF-8, nothing stripped or translated, so that a client that reads the same
file gets the same tokens.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvstore_s3.errors import InvalidArgumentError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
"""What is taken from a directory; a file that is named itself, or by a glob, may have any other name too."""

STDIN = Path("-")

Message = Mapping[str, Any]
"""One turn of a conversation: at least `role` and `content`, both strings."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: `text`, or the turns of a conversation in `messages` (then `text` is empty)."""

    name: str
    text: str
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that cannot be used, and why; the others are not touched by that."""

    name: str
    reason: str


def find_sources(arguments: Sequence[str]) -> list[Path]:
    """Expand DOCS into files in a stable order, each once; `STDIN` stands for standard input.

    A path that exists is taken literally before it is tried as a glob (`**` included). Raises `InvalidArgumentError`
    where an argument matches nothing.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        for path in [STDIN] if argument == "-" else _expand(argument):
            found.setdefault(str(path) if path == STDIN else os.path.realpath(path), path)
    return list(found.values())


def read_documents(source: Path, stdin: BinaryIO, *, jsonl_field: str | None = None) -> Iterator[Document | Rejected]:
    """Read the documents of one source; what is empty, not UTF-8 or not readable comes as `Rejected`."""
    name = "standard input" if source == STDIN else str(source)
    try:
        content = stdin.read() if source == STDIN else source.read_bytes()
    except OSError as error:
        yield Rejected(name, f"cannot be read: {error.strerror or error}")
        return
    if source.suffix.lower() not in JSONL_SUFFIXES:
        yield _text_document(name, content)
        return
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        yield Rejected(name, "is empty; put one JSON object on each line")
    for number, line in lines:
        yield _json_document(f"{name}:{number}", line, jsonl_field)


def read_text(path: Path, what: str) -> str:
    """Read a whole UTF-8 file that the work cannot start without. Raises `InvalidArgumentError`."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{what} {str(path)!r} {_not_utf8(error)}") from error


def _expand(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        return _walk(path)
    if path.exists():
        return [path]
    if not glob.has_magic(argument):
        raise InvalidArgumentError(f"no such file or directory: {argument!r}; give documents that exist, or a glob")
    matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
    files = [match for match in matches if match.is_file()]
    if not files:
        raise InvalidArgumentError(f"no document matches {argument!r}; check the glob against the working directory")
    return files


def _walk(directory: Path) -> list[Path]:
    """Documents below a directory, sorted; hidden files and directories are left out, links are not followed down."""
    suffixes = TEXT_SUFFIXES + JSONL_SUFFIXES
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = (name for name in sorted(names) if not name.startswith("."))
        found += [Path(folder, name) for name in shown if name.lower().endswith(suffixes)]
    if not found:
        raise InvalidArgumentError(f"no document under {str(directory)!r}; expected {', '.join(suffixes)} files")
    return found


def _text_document(name: str, content: bytes) -> Document | Rejected:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(name, _not_utf8(error))
    return _checked(name, text)


def _checked(name: str, text: str) -> Document | Rejected:
    if not text.strip():
        return Rejected(name, "is empty; remove it or give it text")
    return Document(name, text)


def _json_document(name: str, line: bytes, field: str | None) -> Document | Rejected:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejected(name, _not_utf8(error))
    except (ValueError, RecursionError) as error:
        return Rejected(name, f"is not JSON: {error}")
    if not isinstance(record, dict):
        return Rejected(name, f"is a JSON {type(record).__name__}, expected an object with 'text' or 'messages'")
    chosen = field or ("text" if "text" in record else "messages")
    if chosen not in record:
        shown = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        wanted = repr(field) if field else "'text' or 'messages'"
        return Rejected(name, f"has no field {wanted}; its fields are {shown} (choose with --jsonl-field)")
    value = record[chosen]
    if isinstance(value, str):
        if not _is_unicode(value):
            return Rejected(name, "holds a lone surrogate, which is not Unicode text")
        return _checked(name, value)
    if chosen == "messages":
        return _conversation(name, value)
    return Rejected(name, f"field {chosen!r} is not a string")


def _conversation(name: str, value: object) -> Document | Rejected:
    if not isinstance(value, list) or not value or not all(_is_message(turn) for turn in value):
        return Rejected(name, "field 'messages' is not a list of objects with the strings 'role' and 'content'")
    return Document(name, "", tuple(value))


def _is_message(turn: object) -> bool:
    if not isinstance(turn, dict):
        return False
    return all(isinstance(turn.get(key), str) and _is_unicode(turn[key]) for key in ("role", "content"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start}); convert it, e.g. with iconv"
