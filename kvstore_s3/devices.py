"""The GPUs that a store loads to and saves from: a decoder and an encoder for each, made when first asked for."""

from __future__ import annotations

import asyncio
import logging

import torch

from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.codec.device.library import Library, find_library
from kvstore_s3.codec.device.streams import name_fully
from kvstore_s3.config import Settings
from kvstore_s3.device_load import Device
from kvstore_s3.errors import DeviceError, InvalidArgumentError

log = logging.getLogger("kvstore_s3")


class Devices:
    """All methods may be called from any thread, one at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._side_by_side = settings.device_share == 1  # what bounds a launch is to bound all of them
        self._decoders: dict[torch.device, DeviceDecoder] = {}
        self._encoders: dict[torch.device | DeviceDecoder, DeviceEncoder] = {}

    def decoder_for(self, device: Device | None) -> DeviceDecoder | None:
        """What decodes into the memory of `device`; None for the host. One for each device.

        Raises `InvalidArgumentError` for a device of another kind, and `DeviceError` where there is no such GPU.
        """
        if isinstance(device, DeviceDecoder):
            return device
        wanted = _find(device)
        if wanted is None:
            return None
        if wanted not in self._decoders:
            budget = self._settings.device_buffer_bytes
            self._decoders[wanted] = DeviceDecoder(self._open(wanted), wanted, budget, side_by_side=self._side_by_side)
        return self._decoders[wanted]

    def encoder_for(self, device: Device | None) -> DeviceEncoder | None:
        """What encodes out of the memory of `device`, as `decoder_for`: given a decoder, with its library."""
        wanted = device if isinstance(device, DeviceDecoder) else _find(device)
        if wanted is None:
            return None
        if wanted not in self._encoders:
            budget = self._settings.device_buffer_bytes // 2
            library, there = (
                (wanted.library, wanted.device) if isinstance(wanted, DeviceDecoder) else (self._open(wanted), wanted)
            )
            self._encoders[wanted] = DeviceEncoder(library, there, budget, side_by_side=self._side_by_side)
        return self._encoders[wanted]

    async def close(self) -> None:
        """Wait for what was queued, and release memory and threads."""
        for decoder in self._decoders.values():
            await asyncio.to_thread(decoder.close)
        for encoder in self._encoders.values():
            await asyncio.to_thread(encoder.close)

    def _open(self, device: torch.device) -> Library | None:
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"there is no {device} that torch {torch.__version__} can use; load to the CPU")
        found = find_library()
        if found.library is None:
            log.info("values on %s are coded by the CPU: %s", device, found.reason)
            return None
        with torch.cuda.device(device):
            reason = found.library.why_not()
        if reason is not None:
            log.warning("values on %s are coded by the CPU: %s", device, reason)
            return None
        share = self._settings.device_share
        if share < 1 or found.library.has("kvs_limit_multiprocessors"):
            there = torch.cuda.get_device_properties(device).multi_processor_count
            found.library.limit_multiprocessors(allowed_multiprocessors(there, share))
        return found.library


def allowed_multiprocessors(there: int, share: float) -> int:
    """How many of the multiprocessors that are `there` kernels may fill, for `Settings.device_share`; 0: all."""
    return 0 if share == 1 else max(1, round(there * share))


def _find(device: torch.device | str | None) -> torch.device | None:
    """The GPU that is meant; None: the host."""
    wanted = torch.device("cpu" if device is None else device)
    if wanted.type == "cpu":
        return None
    if wanted.type != "cuda":
        raise InvalidArgumentError(f"values can be loaded to the CPU and to CUDA devices, not to {device}")
    return name_fully(wanted) if torch.cuda.is_available() else wanted
