"""A benchmark's figures in a file that is whole at any time: what ends the process loses the row under way, no other.

The file is replaced with every row (written aside, then renamed). It names the task under way, and those begun before
it, so that another process can go on behind one that died.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import describe_machine

Row = dict[str, Any]


class Journal:
    """Of what a benchmark found: lists of rows by name, `failed` and `left_out`.

    `path` None: it is kept in memory alone. `part`: the document's part that is this benchmark's; what else is in the
    file stays as it is. `on_sign` is told of each sign of life.
    """

    def __init__(
        self,
        path: Path | None,
        head: dict[str, Any],
        *,
        part: str | None = None,
        resume: bool = False,
        on_sign: Callable[[], None] | None = None,
    ) -> None:
        self._path, self._part, self._on_sign = path, part, on_sign
        begun = read_document(path, part) if resume else {}
        self.document: dict[str, Any] = {"failed": [], "left_out": [], "begun": [], **head, **begun}

    @property
    def failed(self) -> list[Row]:
        found: list[Row] = self.document["failed"]
        return found

    @property
    def left_out(self) -> list[str]:
        """What there was no time or room for, and why."""
        found: list[str] = self.document["left_out"]
        return found

    def begin(self, what: str) -> bool:
        """Note that a task is under way. False: it was begun before, by a process that is gone."""
        if what in self.document["begun"]:
            return False
        self.document["begun"].append(what)
        self.document["under_way"] = what
        self._write()
        return True

    def add(self, name: str, row: Row) -> None:
        """Keep a row in the list `name`."""
        self.document.setdefault(name, []).append(row)
        self._write()

    def put(self, name: str, found: Row) -> None:
        """Keep what was found beside what `name` has already."""
        self.document[name] = {**self.document.get(name, {}), **found}
        self._write()

    def fail(self, what: str, why: str, row: Row | None = None) -> None:
        """`row`: the figures of what came out wrong."""
        print(f"FAILED: {what}: {why}", flush=True)
        self.failed.append({"what": what, "why": why, **({} if row is None else {"wrong_row": row})})
        self._write()

    def end(self) -> None:
        """The task under way has ended, one way or another."""
        self.document.pop("under_way", None)
        self._write()

    def close(self) -> None:
        """All tasks have ended."""
        self.document.pop("under_way", None)
        self.document.pop("begun", None)
        self._write()

    def _write(self) -> None:
        if self._on_sign is not None:
            self._on_sign()
        if self._path is not None:
            write_document(self._path, self._part, self.document)


def read_document(path: Path | None, part: str | None) -> dict[str, Any]:
    """What a file has so far; nothing where it is not there."""
    document: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    return document if part is None else document.get(part, {})


def write_document(path: Path, part: str | None, document: dict[str, Any]) -> None:
    """Replace the file, or a part of it, at once."""
    whole = {"benchmark": path.stem, **(document if part is None else {**read_document(path, None), part: document})}
    whole.setdefault("machine", describe_machine("numpy", "torch"))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(whole, indent=2) + "\n", encoding="ascii")
    aside.replace(path)
