"""The transformers connector: `PrefixCache(model, store).generate(...)` loads stored prefixes and saves new ones."""

from __future__ import annotations

from kvstore_s3.connectors.transformers.prefix_cache import PrefixCache, Reuse

__all__ = ["PrefixCache", "Reuse"]
