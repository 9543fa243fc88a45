"""A MinIO server for development: `make minio`.

    python examples/minio_server.py                 run until Ctrl-C (or --stop from elsewhere)
    python examples/minio_server.py --detach        start it, print how to use it, and return
    python examples/minio_server.py --stop          stop it

It listens on 127.0.0.1 alone. Data and credentials, which are made up at the first start, stay in .minio/ in the
checkout. In a program: `with running_minio() as server: ...` runs one on a free port, with data that go with it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from local_server import (
    MINIO,
    STOP_S,
    LocalServer,
    ServerMissingError,
    free_port,
    running,
    spawn,
    stop,
    wait_ready,
)

CHECKOUT = Path(__file__).resolve().parent.parent
BUCKET = "kvstore"
DEFAULT_PORT = 9000
IMAGE = "minio/minio"
READY = "/minio/health/cluster"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    home: Path = options.data_dir.resolve()
    if options.stop:
        return stop_recorded(home)
    if (recorded := read_record(home)) is not None:
        print(f"MinIO is running already (process {recorded.pid}); stop it with --stop\n")
        print_usage(recorded, home)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return start(home, options.port, options.bucket, detach=options.detach)
    except ServerMissingError as error:
        print(f"minio: {error}", file=sys.stderr)
        return 1


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A MinIO server for development, on 127.0.0.1 alone.")
    parser.add_argument(
        "--data-dir", type=Path, default=CHECKOUT / ".minio", help="where data and credentials are kept"
    )
    parser.add_argument("--port", type=int, help=f"port (default: {DEFAULT_PORT}, or a free one where that is taken)")
    parser.add_argument("--bucket", default=BUCKET, help="bucket to create (default: %(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--detach", action="store_true", help="return as soon as it answers, and leave it running")
    mode.add_argument("--stop", action="store_true", help="stop the one that uses this data directory")
    return parser.parse_args(arguments)


def start(home: Path, port: int | None, bucket: str, *, detach: bool) -> int:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    credentials = load_credentials(home)
    command, log = find_command(), home / "log"
    log.write_bytes(b"")
    chosen = port or choose_port()
    process = spawn(command(home / "data", chosen), environment(credentials), log, bound=not detach)
    server = LocalServer("minio", f"http://127.0.0.1:{chosen}", *credentials, process.pid)
    try:
        wait_ready("minio", process, server.endpoint, READY, log)
        server.make_bucket(bucket)
        write_private(home / "server.json", json.dumps({**asdict(server), "started": start_time(process.pid)}))
        print_usage(server, home, bucket)
        if detach:
            return 0
        print("\nCtrl-C, or `make minio-stop`, stops it.", flush=True)
        return max(process.wait(), 0)  # ended by --stop is no failure
    except KeyboardInterrupt:
        return 0
    except BaseException:
        detach = False  # whatever went wrong, do not leave it running
        raise
    finally:
        if not detach:
            stop(process)
            (home / "server.json").unlink(missing_ok=True)


@contextmanager
def running_minio(bucket: str = BUCKET) -> Iterator[LocalServer]:
    """A MinIO on a free port, with a bucket, its data and itself gone at the end. Raises ServerMissingError."""
    credentials = ("kvstore", secrets.token_hex(16))
    command = find_command()
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-s3-minio-") as data,
        running(
            "minio",
            lambda port: command(Path(data), port),
            credentials=credentials,
            environment=environment(credentials),
            ready_path=READY,
        ) as server,
    ):
        server.make_bucket(bucket)
        yield server


class MinioCommand:
    """How MinIO is started here: as a program, or in a container."""

    def __init__(self, program: Path | None) -> None:
        self.program = program

    def __call__(self, data: Path, port: int) -> list[str]:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.program is not None:
            return [str(self.program), "server", "--address", f"127.0.0.1:{port}", str(data)]
        user, ports, volume = f"{os.getuid()}:{os.getgid()}", f"127.0.0.1:{port}:9000", f"{data}:/data"
        secrets_by_name = ["-e", "MINIO_ROOT_USER", "-e", "MINIO_ROOT_PASSWORD"]
        options = ["--rm", "--user", user, "-p", ports, "-v", volume, *secrets_by_name]
        return ["docker", "run", *options, IMAGE, "server", "/data"]


def find_command() -> MinioCommand:
    """A `minio` on PATH or built earlier, else docker where its daemon answers, else one built now with go."""
    if (program := MINIO.find()) is not None:
        return MinioCommand(program)
    if docker_answers():
        return MinioCommand(None)
    try:
        return MinioCommand(MINIO.build())
    except ServerMissingError as error:
        raise ServerMissingError(f"{error}. Install minio, or docker, or go 1.24 or newer, and try again") from error


def docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def environment(credentials: tuple[str, str]) -> dict[str, str]:
    return {
        "MINIO_ROOT_USER": credentials[0],
        "MINIO_ROOT_PASSWORD": credentials[1],
        "MINIO_BROWSER": "off",
        "MINIO_UPDATE": "off",
    }


def load_credentials(home: Path) -> tuple[str, str]:
    """The credentials of this data directory, made up at the first start."""
    path = home / "credentials.json"
    if not path.exists():
        write_private(path, json.dumps(["kvstore", secrets.token_hex(16)]))
    user, password = json.loads(path.read_text())
    return str(user), str(password)


def write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def choose_port() -> int:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            return free_port()
    return DEFAULT_PORT


def print_usage(server: LocalServer, home: Path, bucket: str = BUCKET) -> None:
    print(f"MinIO runs; its data lie in {home}")
    print(f"  endpoint    {server.endpoint}")
    print(f"  access key  {server.access_key}")
    print(f"  secret key  {server.secret_key}")
    print(f"  bucket      {bucket}")
    print("\nTo use it from a shell:\n")
    print(f"export AWS_ACCESS_KEY_ID={server.access_key}")
    print(f"export AWS_SECRET_ACCESS_KEY={server.secret_key}")
    print(f"export KVSTORE_S3_ENDPOINT_URL={server.endpoint}")
    print(f"kvstore-s3 warm DOCS... --model MODEL --store s3://{bucket}/demo", flush=True)


def read_record(home: Path) -> LocalServer | None:
    """The server that runs with this data directory, if one does."""
    try:
        record = json.loads((home / "server.json").read_text())
        started = record.pop("started")
        server = LocalServer(**record)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return server if started == start_time(server.pid) else None


def start_time(pid: int) -> str | None:
    """When the process started, in ticks since boot: with it, a number used again is not taken for the server's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def stop_recorded(home: Path) -> int:
    server = read_record(home)
    if server is None:
        print("no MinIO runs with this data directory")
        return 0
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(server.pid)
        for what in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(server.pid, what)
            if select.select([handle], [], [], STOP_S)[0]:
                break
        os.close(handle)
    (home / "server.json").unlink(missing_ok=True)
    print("MinIO is stopped; its data are kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
