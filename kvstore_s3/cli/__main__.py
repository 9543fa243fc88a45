"""`python -m kvstore_s3.cli` is `kvstore-s3`."""

from __future__ import annotations

from kvstore_s3.cli import main

main()
