"""The kernels' emulation with its data races found: each access of a kernel is seen by the detector in `races`."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from device.emulated import EmulatedDevice, build

from kvstore_s3.codec.device.library import Library


@dataclass(frozen=True, slots=True)
class Race:
    """Two accesses to the same byte that nothing orders; `places` are their kernel and lines, innermost first."""

    kinds: tuple[str, str]
    places: tuple[str, str]
    who: str

    def __str__(self) -> str:
        first, second = (f"{kind} by {place}" for kind, place in zip(self.kinds, self.places, strict=True))
        return f"{first}\nand {second}\n({self.who})"


class WatchedDevice(EmulatedDevice):
    """The host, one caller at a time."""

    def __init__(self, cache: Path) -> None:
        super().__init__(Library(build(cache, watched=True), emulated=True))
        self._detector = ctypes.CDLL(str(self.library.path))
        self._detector.kvs_races_report.restype = ctypes.c_uint64
        self._detector.kvs_races_accesses.restype = ctypes.c_uint64

    def begin(self, *, votes_order: bool = False) -> None:
        """Forget what was found. `votes_order`: as if ballots, shuffles and products ordered memory."""
        self._detector.kvs_races_begin(ctypes.c_int(votes_order))

    def count_accesses(self) -> int:
        return int(self._detector.kvs_races_accesses())

    def races(self) -> list[Race]:
        """What was found since `begin`."""
        lines = ctypes.create_string_buffer(1 << 16)
        count = self._detector.kvs_races_report(lines, ctypes.c_size_t(len(lines)))
        found = [self._read(line) for line in lines.value.decode().splitlines()]
        assert found or not count
        return found

    def make_mistake(self, which: int, mended: bool, to: int) -> int:
        """How many mistakes there are; see races/mistakes.cu."""
        call = self._detector.kvs_races_make_mistake
        return int(call(ctypes.c_uint32(which), ctypes.c_int(mended), ctypes.c_void_p(to)))

    def _read(self, line: str) -> Race:
        first, first_at, second, second_at, who = line.split(" ", 4)
        return Race((first, second), (self._find_place(first_at), self._find_place(second_at)), f"times {who}")

    def _find_place(self, offset: str) -> str:
        """The lines that led to an offset in the library, innermost first, and the kernel that they are of."""
        call = hex(int(offset, 16) - 1)  # the offset is where the call returns to
        command = ["addr2line", "-Cfis", "-e", str(self.library.path), call]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        lines = [line.split(" ")[0] for line in found[1::2]]
        kernel = re.search(r"launch<(.+?)>\(", "".join(found[::2]))
        ours = lines[: next((i for i, line in enumerate(lines) if line.startswith("emulator.h")), len(lines))]
        return f"{kernel.group(1) if kernel else 'no kernel'} at {' in '.join(ours)}"
