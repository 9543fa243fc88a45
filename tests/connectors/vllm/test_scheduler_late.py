"""The rig on a GPU whose queues run late, the engine's too: see device/late_streams.py.

The model's KV is written, and fresh blocks are spoilt, when the engine's queue comes to it; what it reads, it waits
for its own queue for, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = pytest.mark.engine

import torch  # noqa: E402
from connectors.vllm.rig_device import ABORTING, CASES, abort_loads, meet_only_right_kv  # noqa: E402
from connectors.vllm.rig_model import _POISON, RankPages  # noqa: E402
from connectors.vllm.rig_traffic import Habits  # noqa: E402
from device.counting import CountingLibrary  # noqa: E402
from device.emulated import build  # noqa: E402
from device.late_streams import LateDevice, late_device  # noqa: E402

from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder  # noqa: E402

LATE = [
    "the engine's own prefix cache in front",
    "preemptions",
    "chunks that end within a block",
    "float16",
    "loads by layer",
    "two ranks",
]


@pytest.fixture(params=range(2), ids=lambda seed: f"order {seed}")
def late(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LateDevice]:
    library = CountingLibrary(build(Path(pytestconfig.cache.mkdir("kernels"))), emulated=True)
    with late_device(library, request.param) as late:
        late.library = library  # type: ignore[attr-defined]
        let_pages_be_late(late, monkeypatch)
        yield late


@pytest.fixture
def decoder(late: LateDevice) -> Iterator[DeviceDecoder]:
    with DeviceDecoder(late.library, torch.device("cpu"), SMALLEST_BUDGET) as decoder:  # type: ignore[attr-defined]
        yield decoder


def let_pages_be_late(late: LateDevice, patch: pytest.MonkeyPatch) -> None:
    """Whoever writes to pages does so in the engine's queue; whoever looks at them has waited for it."""
    begin, write, spoil = RankPages.__post_init__, RankPages.write, RankPages.spoil
    look = {name: getattr(RankPages, name) for name in ("check_untouched", "wrong_blocks", "close_to_load")}

    real = {}  # other threads run the queue while the model writes to the shadow

    def adopt(pages: RankPages) -> None:
        begin(pages)
        late.adopt(pages.tensor)
        real[id(pages)] = pages._pages

    def poison(pages: RankPages, blocks: Sequence[int]) -> None:
        pages._shadow[:, blocks] = pages.formula.shape.bits(_POISON)
        pages._held[:, blocks] = 0
        copy(pages, slice(None), blocks, slice(None))

    def copy(pages: RankPages, layer: object, block: object, mask: object) -> None:
        """Let the engine's queue write what the shadow has now."""
        there, values = real[id(pages)], pages._shadow[layer, block][..., mask].copy()  # type: ignore[index]

        def work() -> None:
            rows = there[layer, block]
            rows[..., mask] = values
            there[layer, block] = rows

        late.default.put(work)

    def write_later(method: object) -> object:
        def later(pages: RankPages, layer: int, table: Sequence[int], *rest: object) -> None:
            pages._pages = pages._shadow
            method(pages, layer, table, *rest)  # type: ignore[operator]
            pages._pages = real[id(pages)]
            size, (first, last) = pages.formula.shape.block_tokens, rest[-2:]
            for index in range(first // size, -(-last // size)):  # type: ignore[operator]
                mask = pages.formula.mask(max(first - index * size, 0), min(last - index * size, size))  # type: ignore[operator]
                copy(pages, layer, table[index], mask)

        return later

    patch.setattr(RankPages, "__post_init__", adopt)
    patch.setattr(RankPages, "poison", poison)
    patch.setattr(RankPages, "write", write_later(write))
    patch.setattr(RankPages, "spoil", write_later(spoil))
    for name, method in look.items():

        def wait(pages: RankPages, *args: object, method: object = method) -> object:
            late.default.synchronize()
            return method(pages, *args)  # type: ignore[operator]

        patch.setattr(RankPages, name, wait)


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])
@pytest.mark.parametrize("name", LATE)
def test_random_traffic_meets_only_right_kv_in_late_queues(name: str, watched: bool, decoder: DeviceDecoder):
    options = replace(CASES[name], decoder=decoder, watched=watched)
    store = f"faulty://late-{LATE.index(name)}-{watched}-{id(decoder)}"
    meet_only_right_kv(store, options, Habits(requests=20), seed=len(name))


def test_loads_and_aborts_leave_blocks_of_others_alone_in_late_queues(decoder: DeviceDecoder):
    abort_loads(f"faulty://late-aborts-{id(decoder)}", replace(ABORTING, decoder=decoder), rounds=4)
