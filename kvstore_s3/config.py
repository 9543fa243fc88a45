"""Settings, each with its default and meaning. The only place that reads the environment.

Precedence: arguments (command-line flags) > `KVSTORE_S3_*` environment > `kvstore-s3.toml` in the working directory >
the defaults below. Credentials are never settings: they come from the default AWS chain.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from kvstore_s3.errors import InvalidArgumentError

MiB = 1024 * 1024
_PREFIX = "KVSTORE_S3_"
_OF_KUBERNETES = re.compile(
    rf"{_PREFIX}(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes puts into the environment of each container beside a Service called kvstore-s3."""


def _find_absolute(path: Path) -> Path:
    """The path with `~` for the home directory. Another one for each working directory would be shared by nobody."""
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise PydanticCustomError("no_home", "the home directory is not known; give an absolute path") from error
    if not path.is_absolute():
        raise PydanticCustomError("relative_path", "give an absolute path")
    return path


class Settings(BaseSettings):
    """All settings. Unknown names are refused, so that a typing error is not a silent default."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, toml_file="kvstore-s3.toml", extra="forbid", frozen=True, env_ignore_empty=True
    )

    store: str | None = None
    """URL of the store: file:///dir, s3://bucket/prefix or memory://."""

    chunk_tokens: Annotated[int, Field(ge=16, le=65536, multiple_of=16)] = 256
    """Tokens in a chunk. Part of the namespace: another value is another cache."""

    profile: Literal["lossless", "near-lossless", "balanced", "small", "cachegen"] = "lossless"
    """Quality of what is written and read (see `quality.QUALITIES`). Nothing lossy unless it is asked for."""

    layer_group: Annotated[int, Field(ge=1, le=1024)] = 4
    """Layers coded into one section: what is decoded while the next is on the wire. A calibration brings its own."""

    endpoint_url: str | None = None
    """S3 endpoint, such as http://127.0.0.1:9000 for MinIO. None: AWS's own (or AWS_ENDPOINT_URL)."""

    region: str | None = None
    """S3 region. None: from the AWS chain, else us-east-1."""

    path_style: bool = True
    """Address buckets as endpoint/bucket (MinIO and most others) instead of bucket.endpoint."""

    connect_timeout_s: Annotated[float, Field(gt=0, le=300)] = 3.0
    """Seconds until a connection attempt is given up."""

    read_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """Seconds without a byte until a request is given up."""

    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Attempts per request, the first included."""

    request_deadline_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds for all attempts of a request together, pauses included."""

    retry_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Most retries, as a share of the requests made lately (beside a few that are always allowed)."""

    slowest_bytes_per_s: Annotated[int, Field(ge=1)] = 64 * 1024
    """A transfer that moves fewer bytes than this for several seconds is given up and tried again."""

    hedge_ratio: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Most reads that are asked for a second time because the first answer is late, as a share of all. 0: none."""

    breaker_failures: Annotated[int, Field(ge=1, le=1000)] = 5
    """Requests that fail in a row until the store is left alone for a while."""

    breaker_pause_s: Annotated[float, Field(gt=0, le=600)] = 1.0
    """Seconds until a store that failed is tried again; twice as long after each failed trial, up to 30 times this."""

    data_plane: Literal["direct", "aiobotocore"] = "direct"
    """How bytes travel from and to s3://: straight between socket and buffer, or by the AWS client."""

    multipart_bytes: Annotated[int, Field(ge=5 * MiB, le=1024 * MiB)] = 8 * MiB
    """Objects larger than this are uploaded in parts of this size."""

    upload_concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Parts of one object, and objects of one save, in flight at once; bounds a save's memory."""

    download_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    """Range reads in flight at once."""

    range_bytes: Annotated[int, Field(ge=64 * 1024, le=1024 * MiB)] = 8 * MiB
    """Neighbouring sections of an object are fetched by one range read up to this size."""

    gap_bytes: Annotated[int, Field(ge=0, le=64 * MiB)] = 64 * 1024
    """Unwanted bytes between two sections that are read along rather than asked for around."""

    buffer_bytes: Annotated[int, Field(ge=MiB)] = 256 * MiB
    """Slab pool: encoded bytes read and not yet decoded, in page-locked memory where there is a GPU."""

    pin_memory: bool | None = None
    """Whether slabs are page-locked for copies to a GPU. None: where CUDA is available."""

    device_buffer_bytes: Annotated[int, Field(ge=8 * MiB)] = 128 * MiB
    """Memory of each GPU that values are loaded to, for encoded bytes on their way to the kernels. Saves out of its
    memory take half as much, for encoded bytes on their way from there. Calibrations take up to twice as much for
    loads, and twice as much for saves."""

    device_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a GPU's multiprocessors whose room decoding may fill at once, and encoding as much; an engine's kernels
    have the rest. 1: all. For the whole process: the store that came to its GPU last says."""

    reuse_bytes: Annotated[int, Field(ge=0)] = 512 * MiB
    """Memory of loaded values that is kept for later loads when its tensors are gone. 0: none."""

    upload_bytes: Annotated[int, Field(ge=MiB)] = 256 * MiB
    """Bytes of chunks that are encoded and not yet stored, over all saves."""

    host_tier_bytes: Annotated[int, Field(ge=0)] = 0
    """Encoded bytes kept in this process's memory in front of the other tiers. 0: none."""

    nvme_tier_dir: Annotated[Path, AfterValidator(_find_absolute)] | None = None
    """Directory on a local disk that keeps objects in front of the store, absolute; processes may share it."""

    nvme_tier_bytes: Annotated[int, Field(ge=16 * MiB)] = 64 * 1024 * MiB
    """Budget of `nvme_tier_dir`, for all processes that share it together."""

    lookup_concurrency: Annotated[int, Field(ge=1, le=1024)] = 256
    """Heads in flight at once during a lookup."""

    codec_threads: Annotated[int, Field(ge=0, le=256)] = 0
    """Threads that encode and decode. 0: one for each core."""

    verdict_lifetime_s: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Seconds for which an object that was found is not asked for again, and one found damaged or vanished is not
    offered again (unless a save mends it sooner)."""

    miss_lifetime_s: Annotated[float, Field(ge=0, le=86400)] = 0.0
    """Seconds for which an object that was not there is not asked for again. 0: it is asked for each time."""

    lowest_profile: Literal["near-lossless", "balanced", "small"] | None = None
    """Quality down to which a load may go where the link is too slow for a lossy `profile`. None: not below it."""

    cache_dir: Path = Field(default_factory=lambda: _default_cache_dir())
    """Where digests of model weights are remembered between starts, and uploads under way are noted."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def find_tools_of_this_environment() -> None:
    """Put the folder of this Python last on PATH: the programs of an environment that was not activated lie there."""
    folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = path + os.pathsep + folder


def load_settings(**given: Any) -> Settings:
    """Settings from `given` (None: not given), the environment, `kvstore-s3.toml` and the defaults, in this order.

    Raises `InvalidArgumentError` naming the first wrong setting and where it came from.
    """
    given = {name: value for name, value in given.items() if value is not None}
    _check_environment()
    try:
        return Settings(**given)
    except ValidationError as error:
        raise InvalidArgumentError(_explain(error, given)) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgumentError(f"kvstore-s3.toml is not TOML: {error}; mend or remove it") from error
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"the settings cannot be read: {error}") from error


def _check_environment() -> None:
    """A misspelt variable would be a silent default. KVSTORE_S3_TEST_ is left to the tests."""
    known = {_PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if not name.startswith(_PREFIX) or name.startswith(f"{_PREFIX}TEST_") or _OF_KUBERNETES.fullmatch(name):
            continue
        if name.upper() not in known:
            raise InvalidArgumentError(f"{name} in the environment is not a setting; check its spelling")


def _explain(error: ValidationError, given: dict[str, Any]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        place = "" if name in given else " in kvstore-s3.toml"
        return f"{name!r}{place} is not a setting; check its spelling"
    source = name if name in given else f"{_PREFIX}{name.upper()}, or {name} in kvstore-s3.toml"
    return f"{source}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {first['input']!r}"


def _default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "kvstore-s3"
    except RuntimeError as error:  # a user that the system does not know, as containers have them
        raise InvalidArgumentError(
            f"there is no home directory to keep small files in ({error}); set HOME, or KVSTORE_S3_CACHE_DIR to a "
            "directory that only this user can write"
        ) from error
