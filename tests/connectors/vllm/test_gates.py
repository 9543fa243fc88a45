"""How far a load by layer has come: what has landed, and what is only queued on a device."""

from __future__ import annotations

import threading

from kvstore_s3.connectors.vllm.gates import LayerGate


class Point:
    """A mark in a queue that nobody has to wait for."""

    def synchronize(self) -> None:
        raise AssertionError("the host waits for the device")


def test_layers_that_are_there_are_not_waited_for():
    gate = LayerGate()
    gate.advance(4)
    assert [gate.wait(layer) for layer in range(4)] == [[], [], [], []]


def test_a_layer_that_is_queued_gives_its_marks_once():
    gate, marks = LayerGate(), [Point(), Point()]
    gate.note_queued(0, 2, [marks[0], marks[1]], shares=2)
    gate.note_queued(0, 2, [marks[1]], shares=2)
    assert gate.wait(1) == marks
    assert gate.wait(0) == []


def test_a_band_of_which_a_share_is_missing_is_waited_for():
    gate, late, passed = LayerGate(), Point(), threading.Event()
    gate.note_queued(0, 2, [Point()], shares=2)
    gate.note_queued(2, 4, [late], shares=1)  # whole, but behind one that is not

    def wait() -> None:
        assert late in gate.wait(2)
        passed.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not passed.wait(0.05)
    gate.note_queued(0, 2, [Point()], shares=2)
    waiter.join(5)
    assert passed.is_set()


def test_the_end_of_a_load_lets_everybody_through():
    gate = LayerGate()
    gate.note_queued(0, 2, [Point()], shares=2)
    gate.end()
    assert gate.wait(5) == []
    gate.wait_for_end()


def test_layers_that_have_landed_are_there_whatever_is_queued():
    gate, mark = LayerGate(), Point()
    gate.note_queued(2, 4, [mark], shares=1)
    gate.advance(2)
    assert gate.wait(1) == []
    gate.advance(4)
    assert gate.wait(3) == [mark]
