"""Digest of a model directory: what its weights, config and remote code are, not where they lie.

Content is read in full once per machine. What was read is remembered per file under `cache_dir`, with the file's
device, inode, size, mtime and ctime; later starts compare those five numbers and read nothing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvstore_s3.errors import InvalidArgumentError

_log = logging.getLogger(__name__)

WEIGHTS_CONTEXT = "kvstore-s3 v1 model weights"
"""BLAKE3 derive_key context of weights digests. Part of the format: another string is another revision."""

_CONFIG_NAMES = ("config.json", "adapter_config.json")

_IGNORED_FIELDS = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "base_model_name_or_path",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields that say where a model came from or how it is run, at any depth. The KV dtype is in the namespace itself."""

_FALLBACK_SUFFIXES = (".bin", ".pt", ".pth", ".gguf")
"""Weights that engines load only where there is no safetensors file."""

_MAX_CONFIG_BYTES = 16 * 1024 * 1024

_READ_BYTES = 8 * 1024 * 1024

_SETTLED_NS = 2_000_000_000
"""Age in ns from which a timestamp is trusted. File systems stamp in ticks, up to 2 s long: a write in the tick of
the last one leaves the same ctime, so a younger file could change without a trace. It is read again instead."""

_READERS = 4
"""Files read at once: one hashes while another waits for the disk."""


def weights_digest(directory: str | Path, cache_dir: str | Path) -> str:
    """Return the digest, 64 hex digits, of a model or adapter directory's content.

    Covers config.json and adapter_config.json (without fields that do not change values, so that another transformers
    version or KV dtype gives the same digest), other quantisation settings (`*quant*.json`), every `*.safetensors`
    at the top (where there is none, `*.bin`, `*.pt`, `*.pth` and `*.gguf`) and all `*.py` (remote code), each by name,
    size and content; and the `weight_map` of their `*.index.json`, which decides from which file an engine takes a
    tensor. Tokenizers are left out: keys are made of token ids. The directory's place, and links in it, do
    not count.

    Hundreds of gigabytes are not read at each start: the digest of each file is remembered in `cache_dir`, under its
    real path and with (device, inode, size, mtime, ctime). Any write changes the ctime, and no user can set it back;
    a file younger than two seconds is not remembered, as a second write in the same clock tick would go unseen. So that
    writes through a memory map show, too, the file is written back to its disk before it is read: only the first
    write to a clean page is stamped. tmpfs has no disk: there, do not change a model through a map that stays open. A
    damaged or missing cache costs a read, never a wrong digest. Only a first start, or one after a change, reads.

    Blocking; call it in a thread from asynchronous code. Raises `InvalidArgumentError` for a directory without a
    config or weights, with a part of the weights missing, not readable, or changing while it is read.
    """
    root = Path(directory)
    configs = {name: _canonical_config(root / name) for name in _CONFIG_NAMES if (root / name).is_file()}
    if not configs:
        raise InvalidArgumentError(f"{root} has no config.json (nor adapter_config.json); give a model directory")
    paths, maps = _find_files(root)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="kvstore-weights") as pool:
        digests = list(pool.map(lambda path: _digest_file(path, Path(cache_dir)), paths))
    files = [
        [path.relative_to(root).as_posix(), size, content] for path, (size, content) in zip(paths, digests, strict=True)
    ]
    parts = {"configs": configs, "files": files} | ({"weight_maps": maps} if maps else {})
    document = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return blake3(document.encode("ascii"), derive_key_context=WEIGHTS_CONTEXT).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a model's JSON file. Raises `InvalidArgumentError` if it is not there or none."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InvalidArgumentError(f"{path} has more than {_MAX_CONFIG_BYTES} bytes; this is no model's config")
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgumentError(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document


def _canonical_config(path: Path) -> object:
    try:
        return _without_ignored(read_json(path))
    except RecursionError as error:
        raise InvalidArgumentError(f"{path} is nested too deeply; this is no model's config") from error


def _without_ignored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: item if name == "quantization_config" else _without_ignored(item)  # all of it changes values
            for name, item in value.items()
            if name not in _IGNORED_FIELDS
        }
    if isinstance(value, list):
        return [_without_ignored(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 10000.0 and 10000 are one setting
    return value


def _find_files(root: Path) -> tuple[list[Path], dict[str, dict[str, str]]]:
    """Return the files that decide a model's values, sorted by name, and the weight maps of its indices by name.

    Raises if there are no weights, or not all.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_file())
        code = sorted(_find_code(root))
    except OSError as error:
        raise InvalidArgumentError(f"cannot list {root}: {error}") from error
    weights = [name for name in names if name.endswith(".safetensors")]
    weights = weights or [name for name in names if name.endswith(_FALLBACK_SUFFIXES)]
    if not weights:
        raise InvalidArgumentError(f"{root} has no weights (*.safetensors or *.bin); is the download complete?")
    maps = {
        name: _read_weight_map(root / name, weights)
        for name in names
        if name.endswith(".index.json") and any(weight.endswith(_index_suffix(name)) for weight in weights)
    }
    settings = [name for name in names if name.endswith(".json") and "quant" in name]
    return [root / name for name in weights + settings] + code, maps


def _read_weight_map(index: Path, weights: list[str]) -> dict[str, str]:
    """Return which file each tensor is taken from. A half-done download has a digest too, but not the model's."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InvalidArgumentError(f"{index} has no weight_map from tensors to files; is the download complete?")
    listed = set(shards.values())
    missing = sorted(listed - set(weights))
    if missing:
        raise InvalidArgumentError(
            f"{index.parent} lacks {len(missing)} of the {len(listed)} weight files in {index.name}, such as "
            f"{missing[0]}; complete the download"
        )
    return shards


def _index_suffix(index_name: str) -> str:
    return "." + index_name.removesuffix(".index.json").rsplit(".", 1)[-1]


def _find_code(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells one state of a file from another without reading it. Times in ns."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, stat: os.stat_result) -> _Stamp:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def as_list(self) -> list[int]:
        return [self.device, self.inode, self.size, self.mtime, self.ctime]

    def is_settled(self, now: int) -> bool:
        """Whether a later write is sure to show. `now` (ns) is the time before the content was read."""
        return max(self.mtime, self.ctime) + _SETTLED_NS < now


def _digest_file(path: Path, cache_dir: Path) -> tuple[int, str]:
    """Return size and content digest of one file, from memory if it is unchanged since it was read."""
    try:
        real = Path(os.path.realpath(path, strict=True))
        stamp = _Stamp.of(os.stat(real))
        known = _recall(real, stamp, cache_dir)
        if known is not None:
            return stamp.size, known
        with open(real, "rb", buffering=0) as file:
            _write_back(file)
            started, stamp = time.time_ns(), _Stamp.of(os.fstat(file.fileno()))
            content = _read_digest(file, stamp)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read the model file {path}: {error}") from error
    if stamp.is_settled(started):
        _remember(real, stamp, content, cache_dir)
    return stamp.size, content


def _write_back(file: FileIO) -> None:
    """Make pages that were changed through a memory map clean: the next such change then changes the times.

    Without this, a change of a page that is dirty already leaves no trace until the kernel writes it back.
    """
    with suppress(OSError):  # a file system that cannot be written, or has nothing to write back to
        os.fsync(file.fileno())


def _read_digest(file: FileIO, stamp: _Stamp) -> str:
    hasher, buffer = blake3(max_threads=blake3.AUTO), bytearray(_READ_BYTES)
    view = memoryview(buffer)
    while count := file.readinto(buffer):  # not mapped: a file cut short meanwhile would kill the process
        hasher.update(view[:count])
    if _Stamp.of(os.fstat(file.fileno())) != stamp:
        raise InvalidArgumentError(f"{file.name} changed while it was read; wait until it is written")
    return hasher.hexdigest()


def _entry_path(real: Path, cache_dir: Path) -> Path:
    return cache_dir / "weights" / f"{blake3(os.fsencode(real)).hexdigest()}.json"


def _recall(real: Path, stamp: _Stamp, cache_dir: Path) -> str | None:
    """Return the remembered digest; None where nothing, something older, or something damaged is remembered."""
    try:
        entry = json.loads(_entry_path(real, cache_dir).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("path") != str(real) or entry.get("stamp") != stamp.as_list():
        return None
    digest = entry.get("blake3")
    return digest if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _remember(real: Path, stamp: _Stamp, digest: str, cache_dir: Path) -> None:
    """Write one file's entry. One file each, renamed into place: writers at the same time do not disturb each other."""
    entry = _entry_path(real, cache_dir)
    text = json.dumps({"path": str(real), "stamp": stamp.as_list(), "blake3": digest})
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".", suffix=".tmp")  # mode 0600
        try:
            with open(handle, "w", encoding="ascii") as file:
                file.write(text)
            os.replace(temporary, entry)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        _log.warning(
            "digests of weights cannot be remembered in %s (%s); each start reads all weights", cache_dir, error
        )
