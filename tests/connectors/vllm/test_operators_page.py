"""docs/vllm.md says what is: its options, its metrics, its environment variables and its links exist."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

from kvstore_s3.config import Settings
from kvstore_s3.connectors.vllm.measures import METRICS
from kvstore_s3.connectors.vllm.options import Options

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "vllm.md").read_text(encoding="utf-8")


def rows_of(section: str) -> dict[str, str]:
    """Name and default of the section's options, the default as it is written."""
    text = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
    return {name: default for name, default in rows if default != "Default"}


def test_every_option_is_in_the_table_and_no_other():
    assert set(rows_of("Options")) == {field.name for field in fields(Options)}


def test_the_defaults_in_the_table_are_those_of_the_options():
    written = rows_of("Options")
    for field in fields(Options):
        if field.default in (MISSING, None):
            continue
        if field.name.endswith("_bytes"):
            assert written[field.name] == f"{field.default // 2**30} GiB"
        else:
            assert written[field.name].strip("`") == str(field.default)


def test_every_metric_that_is_named_exists():
    named = set(re.findall(r"`(kvstore_\w+)`", PAGE))
    assert named
    assert {name for name in named if name != "kvstore_s3"} <= set(METRICS)


def test_every_environment_variable_that_is_named_is_a_setting():
    named = set(re.findall(r"KVSTORE_S3_(\w+)", PAGE))
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        name, _, anchor = target.partition("#")
        text = (DOCS / name).read_text(encoding="utf-8") if name else PAGE
        headings = {slug_of(line) for line in text.splitlines() if line.startswith("#")}
        assert not anchor or anchor in headings, target


def slug_of(heading: str) -> str:
    """The anchor that a Markdown viewer gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lstrip("# ").lower()).replace(" ", "-")
