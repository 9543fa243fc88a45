"""What a store is made of, put together."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore_s3.calibrations import Calibrations
from kvstore_s3.config import Settings
from kvstore_s3.inspection import Inspector
from kvstore_s3.layout import Shard
from kvstore_s3.loader import Loader
from kvstore_s3.lookup import ChunkFinder
from kvstore_s3.metrics import Count
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.quality import Quality
from kvstore_s3.saving import Saver
from kvstore_s3.shards import KnownShards


@dataclass(frozen=True, slots=True)
class Parts:
    """The loader, the shards and the saver are to be closed."""

    calibrations: Calibrations
    loader: Loader
    shards: KnownShards
    finder: ChunkFinder
    saver: Saver


def assemble(
    objects: ObjectStore, namespace: Namespace, quality: Quality, settings: Settings, shard: Shard, count: Count
) -> Parts:
    """The parts of a store of `quality` that holds the rectangle `shard` of the namespace's model."""
    lifetime_s = settings.verdict_lifetime_s
    calibrations = Calibrations(objects, namespace, lifetime_s=lifetime_s)
    loader = Loader(
        objects,
        namespace.layout,
        shard,
        namespace.chunk_tokens,
        quality,
        settings,
        find_calibration=calibrations.find,
        count=count,
    )
    shards = KnownShards(objects, namespace, lifetime_s=lifetime_s)
    inspector = Inspector(
        objects,
        quality,
        find_calibration=calibrations.find,
        read_local=loader.tiers.read_start,
        on_delay=loader.link.bandwidth.observe_delay,
    )
    finder = ChunkFinder(
        inspector,
        shards,
        concurrency=settings.lookup_concurrency,
        verdict_lifetime_s=lifetime_s,
        miss_lifetime_s=settings.miss_lifetime_s,
        count=count,
    )
    saver = Saver(
        objects,
        namespace,
        quality,
        settings,
        finder=finder,
        loader=loader,
        shards=shards,
        calibrations=calibrations,
        count=count,
    )
    return Parts(calibrations, loader, shards, finder, saver)
