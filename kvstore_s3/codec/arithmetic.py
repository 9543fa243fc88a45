"""Arithmetic coding of small integers, channel by channel, with the coder of torchac.

torchac (Mentzer et al., 2019) is the coder that CacheGen was published with. The package ships C++ source; its coder is
compiled once, at first use, by torch's own extension loader into `TORCH_EXTENSIONS_DIR`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.config import find_tools_of_this_environment
from kvstore_s3.errors import InvalidArgumentError

Symbols = npt.NDArray[np.int16]
"""Symbols from 0 on, shape [channels, tokens]."""

Cdfs = npt.NDArray[np.uint16]
"""Cumulated frequencies, shape [channels, symbols + 1]: 0, ascending, and the last, 65536, as 0: that is what fits."""

TOTAL = 1 << 16
"""Sum of the frequencies of a channel."""

_INSTALL = "pip install 'kvstore-s3[cachegen]'"
_LOADING = Lock()


def require_coder() -> None:
    """Load torchac's coder, compiled the first time (20 to 30 s).

    Raises `InvalidArgumentError` where torchac or what compiles it is missing, and says what to install.
    """
    with _LOADING:
        _load_coder()


def count_symbols(symbols: Symbols, alphabet: int) -> npt.NDArray[np.int64]:
    """How often each channel has each symbol below `alphabet`, shape [channels, alphabet]."""
    channels = symbols.shape[0]
    numbers = symbols + np.arange(channels, dtype=np.int64)[:, None] * alphabet
    return np.bincount(numbers.reshape(-1), minlength=channels * alphabet).reshape(channels, alphabet)


def cumulate(counts: npt.NDArray[np.int64]) -> Cdfs:
    """Cumulated frequencies of `counts` [channels, alphabet], in integers alone, so that every machine gets the same.

    Each symbol has at least frequency 1; what rounding leaves goes to a channel's most frequent symbol.
    """
    channels, alphabet = counts.shape
    frequencies = 1 + counts * (TOTAL - alphabet) // counts.sum(axis=1, keepdims=True)
    frequencies[np.arange(channels), counts.argmax(axis=1)] += TOTAL - frequencies.sum(axis=1)
    cdfs = np.zeros((channels, alphabet + 1), np.uint16)
    cdfs[:, 1:] = frequencies.cumsum(axis=1)  # the last wraps to 0, which the coder takes for 65536
    return cdfs


def encode_symbols(symbols: Symbols, cdfs: Cdfs) -> bytes:
    """One stream of `symbols`, channel after channel, each with its row of `cdfs`. Holds the GIL, as torchac does."""
    with _LOADING:
        coder = _load_coder()
    coded: bytes = coder.encode_cdf(_one_row_each(cdfs, symbols.shape[1]), torch.from_numpy(symbols.reshape(-1)))
    return coded


def decode_symbols(stream: bytes, cdfs: Cdfs, tokens: int) -> Symbols:
    """The inverse, shape [channels, tokens]. Any bytes decode to some symbols: past its end a stream has zeros.

    `cdfs` must ascend strictly (`ascends`): the coder looks symbols up in them without any checks. Holds the GIL.
    """
    with _LOADING:
        coder = _load_coder()
    decoded: Symbols = coder.decode_cdf(_one_row_each(cdfs, tokens), stream).numpy()
    return decoded.reshape(cdfs.shape[0], tokens)


def ascends(cdfs: Cdfs) -> bool:
    """Whether every symbol of every channel has a frequency of at least 1; what was stored may not."""
    rows = cdfs.astype(np.int32)
    rows[:, -1] = TOTAL
    return bool((rows[:, 0] == 0).all() and (np.diff(rows, axis=1) > 0).all())


def _one_row_each(cdfs: Cdfs, tokens: int) -> torch.Tensor:
    return torch.from_numpy(np.repeat(cdfs.view(np.int16), tokens, axis=0))


@cache
def _load_coder() -> Any:
    package = find_spec("torchac")
    if package is None or not package.submodule_search_locations:
        raise InvalidArgumentError(f"CacheGen's entropy coder torchac is not installed; {_INSTALL}")
    find_tools_of_this_environment()
    if shutil.which("ninja") is None:
        raise InvalidArgumentError(f"torchac is compiled at first use by ninja, which is not on PATH; {_INSTALL}")
    source = Path(package.submodule_search_locations[0]) / "backend" / "torchac_backend.cpp"
    # Not by importing torchac: that prints to stdout, and compiles without optimisation. One build for each torch.
    name = "kvstore_s3_torchac_" + re.sub(r"\W", "_", torch.__version__)
    try:
        from torch.utils import cpp_extension

        return cpp_extension.load(name=name, sources=[str(source)], extra_cflags=["-O2"])
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        raise InvalidArgumentError(
            f"torchac cannot be compiled: {_telling_line(str(error))}; it needs a C++ compiler "
            "(CXX, or c++ on PATH) and the folder TORCH_EXTENSIONS_DIR, or torch's default, to write to"
        ) from error


def _telling_line(output: str) -> str:
    """What went wrong, out of all that a compiler and its callers say."""
    lines = output.splitlines() or ["no reason given"]
    return next((line for line in lines if re.search(r"error: |not found|[Nn]o such file", line)), lines[0])
