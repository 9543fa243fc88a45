"""Tiers: copies of encoded bytes nearer than the object store, in memory and on a local disk."""
