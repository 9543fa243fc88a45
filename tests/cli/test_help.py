from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

HEAVY = ("numpy", "torch", "transformers", "pydantic", "pydantic_settings", "aiobotocore", "blake3")

PROBE = """
import json, sys
from kvstore_s3.cli import main
try:
    main()
except SystemExit as end:
    code = end.code
loaded = sorted(set(sys.modules) & set({heavy!r}))
sys.stderr.write(json.dumps([code, loaded]))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["warm", "--help"], ["check", "--store", "x", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    code, loaded = json.loads(ran.stderr.splitlines()[-1])
    assert loaded == []
    assert code == 0
    assert ran.stdout.startswith("Usage: kvstore-s3 ")


def cpu_seconds() -> float:
    """Of the children: all that help does is compute, and other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("verb", [[], ["warm"]])
def test_help_takes_less_than_300_ms_where_python_takes_12_to_start(verb: list[str]) -> None:
    """Half of that; but machines differ, and the same one from hour to hour."""

    def measure(*arguments: str) -> float:
        start = cpu_seconds()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return cpu_seconds() - start

    pairs = [(measure("-m", "kvstore_s3.cli", *verb, "--help"), measure("-c", "")) for _ in range(3)]
    assert min(ours / bare for ours, bare in pairs) < 0.3 / 0.012


def test_help_names_every_verb_and_exit_code() -> None:
    ran = subprocess.run([sys.executable, "-m", "kvstore_s3.cli", "--help"], capture_output=True, text=True, check=True)
    for part in ("warm", "ls", "stat", "check", "0 done", "4 damaged data found", "kvstore-s3.toml"):
        assert part in ran.stdout
