"""A short run of benchmarks/vllm_soak.py: a real engine, a real server, faults, aborts, preemptions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.server, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "vllm_soak.py"


def test_answers_are_those_of_an_engine_without_a_store_and_nothing_is_left(tmp_path: Path):
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--requests", "200", "--period-s", "0.5", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert out.exists(), ran.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["wrong_answers"] == 0
    assert result["finished"] + result["aborted"] == 200
    assert not any(result["left_behind"].values()), result["left_behind"]
    assert result["counters"]["vllm:kvstore_tokens_loaded"] > 0
    assert result["counters"]["vllm:num_preemptions"] > 0
    assert ran.returncode == 0
