"""What goes out: one report on stdout, for people or as one JSON document; everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore_s3.cli import exits


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a verb: `data` for `--json`, `lines` for people, and the exit code."""

    data: Mapping[str, Any]
    lines: Sequence[str] = field(default=())
    exit_code: int = exits.DONE


def print_report(report: Report, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({**report.data, "exit_code": report.exit_code}) + "\n")
    else:
        sys.stdout.writelines(line + "\n" for line in report.lines)
    sys.stdout.flush()


def print_failure(message: str, exit_code: int, *, as_json: bool) -> None:
    """Say in one line on stderr what is wrong and, with `--json`, as the one document on stdout."""
    line = " ".join(message.split())
    if as_json:
        sys.stdout.write(json.dumps({"error": line, "exit_code": exit_code}) + "\n")
        sys.stdout.flush()
    say(line)


def say(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"kvstore-s3: {message}\n")
    sys.stderr.flush()


def align_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lay out a table in plain text: easy to read, to cut and to grep. Columns after the first align right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def format_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """75.3 -> '1 min 15 s'; under a minute, one decimal under ten seconds."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count_noun(count: int, noun: str) -> str:
    """1, 'chunk' -> '1 chunk'; 2000, 'chunk' -> '2,000 chunks'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
