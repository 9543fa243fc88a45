"""curl as the limit: many transfers of one process, presigned, bodies to /dev/null; its PUT sends no checksum."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from minio import Minio

from peers.base import Job


class Curl:
    """Its cost is that of its child processes."""

    in_children = True

    def __init__(self, job: Job) -> None:
        if shutil.which("curl") is None:
            raise ImportError("curl is not installed")
        self.job = job
        self.folder = TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.signer = Minio(job.host, job.access_key, job.secret_key, secure=job.secure, region="us-east-1")
        self.trust = f'cacert = "{job.authority}"\n' if job.authority else ""

    def get(self, starts: Sequence[int], buffers: Sequence[memoryview]) -> None:
        url = self.signer.get_presigned_url("GET", self.job.bucket, self.job.key, expires=timedelta(hours=1))
        size = len(buffers[0])
        blocks = [f'range = "{start}-{start + size - 1}"\n{self._url(url)}' for start in starts]
        self._run(blocks, len(buffers))

    def put(self, keys: Sequence[str], data: memoryview, connections: int) -> None:
        body = Path(self.folder.name, "body")
        if not body.exists():
            body.write_bytes(data)
        blocks = []
        for key in keys:
            url = self.signer.get_presigned_url("PUT", self.job.bucket, key, expires=timedelta(hours=1))
            blocks.append(f'upload-file = "{body}"\nheader = "Expect:"\n{self._url(url)}')
        self._run(blocks, connections)

    def close(self) -> None:
        self.folder.cleanup()

    def _url(self, url: str) -> str:
        return f'url = "{url}"\noutput = "/dev/null"\nno-progress-meter\nfail\n{self.trust}'

    def _run(self, blocks: Sequence[str], connections: int) -> None:
        parallel = f"parallel\nparallel-max = {connections}\n" if connections > 1 else ""
        config = Path(self.folder.name, "config")
        config.write_text(parallel + "next\n".join(blocks))
        subprocess.run(["curl", "--disable", "--config", str(config)], check=True, stdout=subprocess.DEVNULL)
