"""What a store's link, slabs, tiers and breakers are at the moment: numbers for metrics."""

from __future__ import annotations

from kvstore_s3.loader import Loader
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.guarded import GuardedStore


def measure(loader: Loader, objects: ObjectStore) -> dict[str, float]:
    """Gauges by name. What is not known yet, or not there, is left out.

    - `link_bytes_per_s`, `link_latency_s`: the link to the store, as its reads showed it
    - `slab_bytes`, `slab_budget_bytes`: encoded bytes in memory now, and the most there may be
    - `slab_waiting`: reads that wait for a slab
    - `tier_<name>_bytes`, `tier_<name>_budget_bytes`: what a tier keeps ("host", "nvme")
    - `tier_<name>_on`: 1, or 0 while it is left alone because it failed
    - `reads_open`, `writes_open`: 1 while the store is not asked, or not written to, because it failed
    """
    gauges: dict[str, float] = {"link_latency_s": loader.link.bandwidth.latency_s}
    rate = loader.link.bandwidth.bytes_per_s
    if rate is not None:
        gauges["link_bytes_per_s"] = rate
    slabs = loader.slabs
    gauges |= {"slab_bytes": slabs.leased, "slab_budget_bytes": slabs.budget, "slab_waiting": slabs.waiting}
    for name, state in loader.tiers.states().items():
        gauges[f"tier_{name}_bytes"] = state.bytes
        gauges[f"tier_{name}_budget_bytes"] = state.budget
        gauges[f"tier_{name}_on"] = float(state.on)
    if isinstance(objects, GuardedStore):
        gauges["reads_open"] = float(not objects.available)
        gauges["writes_open"] = float(not objects.writable)
    return gauges
