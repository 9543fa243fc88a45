"""On which cores the connector's threads run."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress


def spread_over_cores() -> None:
    """Let the calling thread, and those it starts, run on every core that the engine may use.

    vLLM pins a CPU worker to the cores of its matrix kernels, main thread to the first, and threads inherit that: all
    decoding would share one core with the model. The engine's own process, the worker's parent, is not pinned.
    """
    if multiprocessing.parent_process() is not None and hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # the parent is gone, or the system forbids it: slower, not wrong
            os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
