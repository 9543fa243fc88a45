"""The command line `kvstore-s3`: warm, ls, stat, check. Nothing heavy is imported until a verb runs."""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    import sys

    from kvstore_s3.cli.app import run

    sys.exit(run(sys.argv[1:]))
