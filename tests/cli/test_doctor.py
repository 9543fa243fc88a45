from __future__ import annotations

import pytest
from cli.conftest import Cli

from kvstore_s3.cli.doctor import Gpu, decide

HOPPER = Gpu("H", (9, 0), 80 * 2**30, 132)
REFUSED = Gpu("H", (9, 0), 80 * 2**30, 132, "the driver is older than the CUDA runtime of the library")
TURING = Gpu("T", (7, 5), 16 * 2**30, 40)


def test_doctor_says_where_kv_is_decoded(cli: Cli) -> None:
    ran = cli("doctor", "--json")
    assert ran.code == 0
    assert "portable" in ran.json["native_implementations"]
    assert ran.json["decoding"].startswith("on the ")
    assert isinstance(ran.json["gpu_library"]["detail"], str)
    if not ran.json["gpus"]:
        assert ran.json["decoding"].startswith("on the CPU: ")


def test_doctor_has_a_line_for_each_part(cli: Cli) -> None:
    ran = cli("doctor")
    assert ran.code == 0
    heads = {line.split("  ")[0] for line in ran.out.splitlines()}
    assert heads == {"kvstore-s3", "native codecs", "GPU library", "GPU", "decoding"}


@pytest.mark.parametrize(
    ("library", "gpus", "verdict"),
    [
        (True, [HOPPER], "on the GPU"),
        (True, [TURING, HOPPER], "on the GPU"),
        (True, [TURING], "on the CPU: the GPU library is built, but the GPU is not usable: too old"),
        (True, [REFUSED], "on the CPU: the GPU library is built, but the GPU is not usable: the driver is older"),
        (True, [REFUSED, HOPPER], "on the GPU"),
        (True, [], "on the CPU: the GPU library is built, but there is no GPU"),
        (False, [HOPPER], "on the CPU: there is a GPU, but no library for it"),
        (False, [], "on the CPU: no GPU library was built, and there is no GPU"),
    ],
)
def test_the_verdict_names_what_is_missing(library: bool, gpus: list[Gpu], verdict: str) -> None:
    assert decide(library=library, gpus=gpus).startswith(verdict)


def test_a_gpu_that_is_too_old_is_named_as_such() -> None:
    assert "too old" in TURING.describe()
    assert "too old" not in HOPPER.describe()
    assert "the driver is older" in REFUSED.describe()
