"""What timed connectors tell, each process in a file of its own, and who asks for it. Without vLLM."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

DIRECTORY = "BENCH_VLLM_CALLS"
"""The environment's name for the directory of the files."""
NOTHING: Mapping[str, float] = {"scheduler": 0.0, "worker": 0.0, "waiting": 0.0}
"""Seconds in the connector's calls on the threads of the scheduler and of the worker, and of requests not scheduled
because it had no answer yet."""
_EVERY_S = 0.2


def tell(seconds: Mapping[str, float]) -> None:
    """Write `seconds` now and then, for ever."""
    path = Path(os.environ[DIRECTORY]) / f"{os.getpid()}.json"
    while True:
        time.sleep(_EVERY_S)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(seconds))
        draft.replace(path)


def read_calls() -> dict[str, float]:
    """The sums of all processes, once they have told what happened until now."""
    time.sleep(2 * _EVERY_S)
    found = [json.loads(path.read_text()) for path in Path(os.environ[DIRECTORY]).glob("*.json")]
    return {name: sum(seconds[name] for seconds in found) for name in NOTHING}
