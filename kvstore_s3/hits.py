"""What lookup, stream and save answer: a hit, groups of layers, a count."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore_s3.load import StoredChunk
from kvstore_s3.quality import describe_quality, worst_quality

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Hit:
    """The longest stored prefix of a prompt: `chunks` whole chunks of `chunk_tokens` tokens. Falsy when nothing is.

    `expected` is `qualities` as the lookup saw them.
    """

    chunks: tuple[StoredChunk, ...]
    chunk_tokens: int
    expected: tuple[str, ...] = ()
    _learned: MutableMapping[bytes, tuple[str, bool | None]] = field(default_factory=dict, compare=False, repr=False)
    """Chunk key -> quality, and whether its object names a calibration, as `load` and `stream` found them."""

    @property
    def tokens(self) -> int:
        return len(self.chunks) * self.chunk_tokens

    @property
    def qualities(self) -> tuple[str, ...]:
        """What each chunk is read at: "lossless", "near-lossless", "balanced", "small" or "cachegen".

        Another writer may replace an object after the lookup: `load` and `stream` tell what they met, and this answers
        anew once they have. After several loads of one hit, at different paces, it is the last one's that is told.
        """
        known = zip(self.chunks, self.expected, strict=True)
        return tuple(self._learned.get(chunk.identity.key, (expected, None))[0] for chunk, expected in known)

    @property
    def quality(self) -> str:
        """The worst of `qualities`; "lossless" for an empty hit."""
        return worst_quality(self.qualities)

    @property
    def calibrated(self) -> tuple[bool | None, ...]:
        """For each chunk, whether it was coded with a calibration; None where it is not of a scalable profile.

        None too where only an object's metadata was read so far, which does not tell: `load` and `stream` read the
        headers, and this answers anew once they have.
        """
        known = (self._learned.get(chunk.identity.key, ("", chunk.calibrated)) for chunk in self.chunks)
        return tuple(calibrated for _, calibrated in known)

    def learn(self, read: Iterable[StoredChunk], qualities: Iterable[str]) -> None:
        """Note what the headers of `read` told; for `load` and `stream`."""
        told = zip(read, qualities, strict=True)
        self._learned.update((chunk.identity.key, (quality, chunk.calibrated)) for chunk, quality in told)

    def describe_quality(self) -> str:
        """`quality` as people read it: "balanced (uncalibrated)" where a chunk is known to have no calibration."""
        return describe_quality(self.quality, False if False in self.calibrated else None)

    def __bool__(self) -> bool:
        return bool(self.chunks)

    def cut(self, tokens: int) -> Hit:
        """The hit's first whole chunks within `tokens` tokens."""
        count = max(tokens, 0) // self.chunk_tokens
        return Hit(self.chunks[:count], self.chunk_tokens, self.expected[:count], self._learned)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save did: chunks that it wrote, chunks that were there or that another writer was first with, bytes.

    `quality` is what it writes, and `calibrated` whether with a calibration: None where it wrote nothing, or not in a
    scalable profile. A scalable object has all levels, whichever of them the quality reads, unless it was computed from
    a prefix of fewer.
    """

    chunks_new: int
    chunks_present: int
    bytes: int
    quality: str = "lossless"
    calibrated: bool | None = None


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """KV of layers `layer_begin` to `layer_end`: `kv` [layers, 2, tokens, kv_heads, head_dim].

    `tokens` never grows from group to group; it shrinks when damage is met, and what earlier groups gave beyond it
    must then be dropped. `qualities` and `calibrated` tell of each chunk in `kv` what `Hit` does; here all is known.
    """

    layer_begin: int
    layer_end: int
    kv: torch.Tensor
    qualities: tuple[str, ...] = ()
    calibrated: tuple[bool | None, ...] = ()

    @property
    def tokens(self) -> int:
        return self.kv.shape[2]

    @property
    def quality(self) -> str:
        """The worst of `qualities`."""
        return worst_quality(self.qualities)
