"""Memory is used again when its last view is gone, and not before."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from kvstore_s3.recycling import Recycler

MiB = 1024 * 1024


def test_a_tensor_has_the_shape_and_dtype_asked_for() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn):
        tensor = Recycler(64 * MiB).empty((3, 2, 512, 8, 128), dtype)
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 2, 512, 8, 128), dtype, True)
        tensor.view(torch.uint8).fill_(1)


def test_memory_is_used_again_after_its_tensor() -> None:
    recycler = Recycler(64 * MiB)
    tensor = recycler.empty((4 * MiB,), torch.uint8)
    address = tensor.data_ptr()
    del tensor
    assert recycler.waiting_bytes == 4 * MiB
    assert recycler.empty((MiB, 2), torch.bfloat16).data_ptr() == address


@pytest.mark.parametrize(
    "look",
    [
        lambda tensor: tensor[1:2],
        lambda tensor: tensor.view(torch.int16),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[6:].view(np.uint16),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.from_dlpack(tensor),
        lambda tensor: tensor.reshape(2, -1)[1].numpy()[::2],
    ],
)
def test_memory_is_not_used_again_while_anything_looks_at_it(look) -> None:  # type: ignore[no-untyped-def]
    recycler = Recycler(64 * MiB)
    tensor = recycler.empty((4 * MiB,), torch.uint8)
    tensor.fill_(7)
    view = look(tensor)
    del tensor
    gc.collect()
    assert recycler.waiting_bytes == 0
    recycler.empty((4 * MiB,), torch.uint8).fill_(9)
    assert bytes(torch.as_tensor(np.asarray(view)).flatten()[:1].numpy().tobytes())[0] == 7
    del view
    gc.collect()
    assert recycler.waiting_bytes > 0


def test_no_more_than_the_budget_waits() -> None:
    recycler = Recycler(10 * MiB)
    tensors = [recycler.empty((4 * MiB,), torch.uint8) for _ in range(5)]
    tensors.clear()
    assert recycler.waiting_bytes == 8 * MiB
    recycler.close()
    assert recycler.waiting_bytes == 0


def test_a_block_much_larger_than_needed_is_left_for_others() -> None:
    recycler = Recycler(64 * MiB)
    del_me = recycler.empty((32 * MiB,), torch.uint8)
    del del_me
    small = recycler.empty((4 * MiB,), torch.uint8)
    assert recycler.waiting_bytes == 32 * MiB
    del small


def test_threads_may_drop_what_another_one_took() -> None:
    recycler = Recycler(64 * MiB)
    queue: list[torch.Tensor] = []

    def drop() -> None:
        for _ in range(200):
            while not queue:
                pass
            queue.pop()

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    for number in range(200):
        tensor = recycler.empty((MiB,), torch.uint8)
        tensor.fill_(number)
        assert int(tensor[-1]) == number
        queue.append(tensor)
        del tensor
    thread.join()
    assert recycler.waiting_bytes <= 64 * MiB


def test_what_has_waited_longest_makes_room_for_what_comes_back() -> None:
    recycler = Recycler(10 * MiB)
    large = recycler.empty((8 * MiB,), torch.uint8)
    del large
    small = recycler.empty((3 * MiB,), torch.uint8)
    address = small.data_ptr()
    del small
    assert recycler.waiting_bytes == 3 * MiB, "not both fit"
    assert recycler.empty((3 * MiB,), torch.uint8).data_ptr() == address
