"""Small pieces of work for kernels that are PTX: what comes of each, as bytes."""

from __future__ import annotations

import numpy as np
from codec.sections import draw_normal
from device.emulated import Device
from device.scalable_encoder import CALIBRATIONS, Coder, case_of_layout, values_of
from device.test_lossless_decode import cut
from device.test_lossless_decode import decode as decode_streams
from device.test_lossless_encode import WHOLE, Section
from device.test_lossless_encode import encode as encode_sections
from device.test_scalable_decode import CALIBRATIONS as DECODED
from device.test_scalable_decode import decode as decode_sections
from device.test_scalable_decode import encode as encode_on_host
from device.test_scalable_decode import values_of as decoded_values_of
from device.test_scalable_decode import whole

from kvstore_s3.codec.lossless import LosslessCodec

SHAPE = (2, 2, 40, 2, 24)
"""Layers, kinds, tokens, heads, dim of the lossless sections."""
TOKENS = 40
VALUES = draw_normal(np.random.Generator(np.random.PCG64(5)), SHAPE)


def lossless_decode(device: Device) -> bytes:
    faults, values = decode_streams(device, cut(LosslessCodec().encode(VALUES), SHAPE[3]), SHAPE)
    return np.array(faults).tobytes() + values.tobytes()


def lossless_encode(device: Device) -> bytes:
    return b"".join(encode_sections(device, VALUES, [Section(WHOLE, WHOLE, WHOLE, WHOLE)]))


def scalable_encode(device: Device) -> bytes:
    case = case_of_layout(values_of(7, TOKENS), CALIBRATIONS["group"])
    return b"".join(Coder(device).encode(case))


def scalable_decode(device: Device) -> bytes:
    """By tensor cores, from what the host encoded."""
    kv = decoded_values_of(7)
    calibration = DECODED["group"]
    found = decode_sections(device, kv, calibration, whole(encode_on_host(kv, calibration)))
    return np.array(found.faults).tobytes() + found.values.tobytes()


WORK = {of.__name__: of for of in (lossless_decode, lossless_encode, scalable_encode, scalable_decode)}
