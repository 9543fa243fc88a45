"""The golden errors of codecs 3 and 4, as code: one for each refusal that docs/format-scalable.md calls for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from blake3 import blake3
from crafted import Crafted, CraftedSection
from crafted_scalable import CraftedHead, CraftedStream, RawStream, encode_integers, pack_payloads
from golden_faults import GoldenError
from golden_objects import as_bytes, make_identity, make_values
from golden_scalable import SCALABLE_MAKERS, Maker, Plan, Rotary
from reference_calibration import uncalibrated_tables
from reference_scalable import RAW

from kvstore_s3.bitstream import Identity
from kvstore_s3.errors import BitstreamFault as Fault
from kvstore_s3.layout import Shard

BAD, SHORT, UNKNOWN = Fault.BAD_PAYLOAD, Fault.TRUNCATED, Fault.UNSUPPORTED_FEATURE
FIRST_POSITION = 24
TOKENS = 24

_IDENTITY = make_identity(
    "scalable-errors", Shard(0, 1, 0, 2), dtype="bfloat16", tokens=TOKENS, head_dim=6, layers=2, kv_heads=2
)
_MAKER = Maker("scalable-errors", _IDENTITY, first_position=FIRST_POSITION)
_MAKER.rotary = Rotary("halves", [1.0, 0.1], [1])
_PLAN = Plan((0, 1), exact=[2, 5], extreme={head: [(1, at, 32404) for at in range(12)] for head in (0, 1)}, highest=30)
_HEAD = _MAKER.head(_PLAN)
_STREAMS = _MAKER.streams(_PLAN)
_CODED = [stream for stream in _STREAMS if isinstance(stream, CraftedStream)]
_PAYLOADS = pack_payloads(_HEAD, _STREAMS)


def make_all_scalable_errors() -> list[GoldenError]:
    makers = (_heads, _lengths, _streams, _numbers, _exact, _refinements, _codecs, _calibrated)
    return [error for maker in makers for error in maker()]


def _object(payloads: Sequence[bytes], identity: Identity = _IDENTITY, **fields: Any) -> bytes:
    sections = [
        CraftedSection(level=level, codec=3, layers=(identity.shard.layer_begin, identity.shard.layer_end), data=data)
        for level, data in enumerate(payloads)
    ]
    return Crafted(identity, sections, {"profile": 2} | fields).object()


def _error(name: str, payloads: Sequence[bytes], code: Fault = BAD) -> GoldenError:
    return _of(name, code, _object(payloads))


def _of(name: str, code: Fault, data: bytes, identity: Identity = _IDENTITY, **more: Any) -> GoldenError:
    return GoldenError(
        f"scalable-{name}", code, identity, data, profile="scalable", **{"first_position": FIRST_POSITION} | more
    )


def _with_base(base: bytes) -> list[bytes]:
    return [base, *_PAYLOADS[1:]]


def _heads() -> Iterator[GoldenError]:
    """The fields in front of the streams."""
    still = {"rotary": 0, "frequencies": (), "rotated": ()}
    changes: Mapping[str, Mapping[str, Any]] = {
        "mode-2": {"mode": 2},
        "mode-calibrated": {"mode": 0, **still},
        "span-in-mode-1": {"span": 1},
        "span-4": {"span": 4},
        "levels-0": {"levels": 0},
        "levels-4": {"levels": 4},
        "levels-fewer": {"levels": 2},
        "rotary-3": {"rotary": 3},
        "no-pairs": {"frequencies": (), "rotated": ()},
        "pairs-without-rotary": {"rotary": 0},
        "too-many-pairs": {"frequencies": [1.0, 0.5, 0.25, 0.125]},
        "most-pairs": {"pairs": 65535},
        "frequency-nan": {"frequencies": [1.0, float("nan")]},
        "frequency-infinite": {"frequencies": [float("inf"), 1.0]},
        "rotated-2": {"rotated": [2]},
        "rotated-padding": {"padding": b"\0\1\0"},
        "reserved": {"reserved": 256},
        "another-position": {"first_position": FIRST_POSITION + 24},
    }
    lengths = _PAYLOADS[0][len(_HEAD.pack()) :]
    for name, change in changes.items():
        yield _error(name, _with_base(replace(_HEAD, **change).pack() + lengths))
    yield _error("levels-more-than-there-are", _PAYLOADS[:2])


def _lengths() -> Iterator[GoldenError]:
    base, size = _PAYLOADS[0], len(_HEAD.pack())
    yield _error("head-cut", _with_base(base[:11]), SHORT)
    yield _error("rotation-cut", _with_base(base[: size - 1]), SHORT)
    yield _error("table-cut", _with_base(base[: size + 7]), SHORT)
    yield _error("streams-cut", _with_base(base[:-4]), SHORT)
    yield _error("length-huge", _with_base(base[:size] + b"\xff\xff\xff\xff" + base[size + 4 :]), SHORT)
    yield _error("too-long", _with_base(base + bytes(4)))
    for level in (1, 2):
        data = _PAYLOADS[level]
        others = {1: lambda new: [base, new, _PAYLOADS[2]], 2: lambda new: [base, _PAYLOADS[1], new]}[level]
        yield _error(f"table-cut-{level}", others(data[:7]), SHORT)
        yield _error(f"streams-cut-{level}", others(data[:-4]), SHORT)
        yield _error(f"too-long-{level}", others(data + bytes(4)))


def _with(number: int = 0, **changes: Any) -> list[bytes]:
    """The sound payloads, but for fields of one stream."""
    streams = list(_CODED)
    streams[number] = replace(streams[number], fields=changes)
    return pack_payloads(_HEAD, streams)


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _streams() -> Iterator[GoldenError]:
    """The fields of a stream, and its lengths."""
    stream = _CODED[0]
    classes, (step, *_) = bytes(stream.classes or b""), stream.steps
    raw = RawStream(_MAKER.patterns(_PLAN, "channel", 0))
    yield _error("flags-0", _with(flags=0))
    yield _error("flags-2", _with(flags=3))
    yield _error("stream-reserved", _with(reserved=1))
    yield _error("step-0", _with(steps=_floats(step, 0.0)))
    yield _error("step-negative", _with(steps=_floats(-step, step)))
    yield _error("step-infinite", _with(steps=_floats(step, float("inf"))))
    yield _error("step-nan", _with(steps=_floats(float("nan"), step)))
    yield _error("class-48", _with(classes=classes[:-1] + b"\x30"))
    number, found = _padded(0)
    yield _error("stream-end-padding", _with(number, end=bytes(found - 1) + b"\1"))
    yield _error("stream-longer", _with(end=bytes(_padding(_CODED[0], 0) + 4)))
    yield _error("stream-empty", _cut_stream(0))
    yield _error("stream-cut-fields", _cut_stream(8))
    yield _error("stream-cut-classes", _cut_stream(40))
    yield _error("raw-with-words", pack_payloads(_HEAD, [replace(raw, fields={"words": 1}), _CODED[1]]))
    yield _error("raw-with-escapes", pack_payloads(_HEAD, [replace(raw, fields={"escapes": 1}), _CODED[1]]))
    yield _error("raw-with-flags", pack_payloads(_HEAD, [replace(raw, fields={"flags": 1}), _CODED[1]]))
    yield _error("raw-short", pack_payloads(_HEAD, [replace(raw, rows=raw.rows[:-1]), _CODED[1]]))
    yield _error("raw-long", pack_payloads(_HEAD, [replace(raw, rows=[*raw.rows, raw.rows[0]]), _CODED[1]]))
    refined = pack_payloads(_HEAD, [raw, _CODED[1]])
    rest = refined[1][8:]
    refined[1] = struct.pack("<2I", 4, len(rest)) + bytes(4) + rest
    yield _error("raw-with-a-refinement", refined)


def _cut_stream(size: int) -> list[bytes]:
    """Stream 0 of level 0 ends early; the table of lengths says so."""
    first, second = (stream.level(0) for stream in _CODED)
    return _with_base(_HEAD.pack() + struct.pack("<2I", size, len(second)) + first[:size] + second)


def _values(number: int) -> bytes:
    rows = _CODED[number].exact.values()
    return b"".join(pattern.to_bytes(2, "little") for row in rows for pattern in row)


def _numbers() -> Iterator[GoldenError]:
    """States, words and escapes."""
    stream = _CODED[0]
    states, words, escapes = stream.coded.states, stream.coded.words[0], stream.coded.escapes
    assert len(escapes) > 1
    yield _error("state-low", _with(states=struct.pack(f"<{len(states)}I", *states[:-1], 2**15 - 1)))
    yield _error("state-high", _with(states=struct.pack(f"<{len(states)}I", 2**31, *states[1:])))
    yield _error("states-missing", _with(states=struct.pack(f"<{len(states) - 1}I", *states[1:])))
    yield _error(
        "words-run-out", _with(words=len(words) - 1, word_list=struct.pack(f"<{len(words) - 1}H", *words[:-1]))
    )
    yield _error("words-left", _with(words=len(words) + 1, word_list=struct.pack(f"<{len(words) + 1}H", *words, 0)))
    yield _error("words-huge", _with(words=2**32 - 1))
    yield _error("escapes-huge", _with(escapes=2**31))
    fewer, more = [*escapes][:-1], [*escapes, 0]
    for name, found in (("escapes-run-out", fewer), ("escapes-left", more)):
        yield _error(name, _with(escapes=len(found), escape_list=struct.pack(f"<{len(found)}h", *found)))
    for name, value in (("escape-3601", 3601), ("escape-lowest", -32768)):
        yield _error(name, _with(escape_list=struct.pack(f"<{len(escapes)}h", value, *escapes[1:])))
    q2 = [[0] * 12 for _ in range(TOKENS)]
    last = replace(stream, coded=encode_integers(q2, stream.classes or (), uncalibrated_tables(), 3, 2**15 + 1))
    yield _error("last-state", pack_payloads(_HEAD, [last, _CODED[1]]))
    for level in (1, 2):
        found = stream.coded.words[level]
        for name, changed in (("run-out", found[:-1]), ("left", [*found, 0])):
            all_words = [*stream.coded.words]
            all_words[level] = list(changed)
            coded = replace(stream.coded, words=all_words)
            yield _error(f"words-{name}-{level}", pack_payloads(_HEAD, [replace(stream, coded=coded), _CODED[1]]))


def _exact() -> Iterator[GoldenError]:
    (one, two), values = _CODED[0].exact, _values(0)
    half = len(values) // 2
    for name, tokens in (("exact-descend", (two, one)), ("exact-twice", (one, one)), ("exact-beyond", (one, TOKENS))):
        yield _error(name, _with(tokens=struct.pack("<2H", *tokens)))
    every = struct.pack(f"<{TOKENS}H", *range(TOKENS))
    yield _error("exact-all", _with(number=1, exact=TOKENS, tokens=every, values=values[:half] * TOKENS))
    yield _error("exact-most", _with(exact=RAW - 1))


def _refinements() -> Iterator[GoldenError]:
    for level in (1, 2):
        yield _error(f"words-huge-{level}", _with(**{f"words {level}": 2**32 - 1}))
        number, found = _padded(level)
        yield _error(f"end-padding-{level}", _with(number, **{f"end {level}": bytes(found - 1) + b"\1"}))
        yield _error(f"longer-{level}", _with(number, **{f"end {level}": bytes(found + 4)}))


def _padding(stream: CraftedStream, level: int) -> int:
    """Bytes of padding at the end of a stream."""
    marked = replace(stream, fields={"end": b"!", f"end {level}": b"!"})
    return len(stream.level(level)) - len(marked.level(level)) + 1


def _padded(level: int) -> tuple[int, int]:
    """A stream that ends with padding at this level, and how much."""
    return next((number, _padding(one, level)) for number, one in enumerate(_CODED) if _padding(one, level))


def _codecs() -> Iterator[GoldenError]:
    """Codec ids where they have no meaning, and codec 4."""
    exact = as_bytes(make_values(_IDENTITY, "errors"))
    sound = [CraftedSection(level=level, codec=3, data=data) for level, data in enumerate(_PAYLOADS)]
    raw = [CraftedSection(data=exact), *(CraftedSection(level=level, codec=4, data=b"\0") for level in (1, 2))]

    def make(sections: Sequence[CraftedSection], identity: Identity = _IDENTITY, profile: int = 2) -> bytes:
        return Crafted(identity, sections, {"profile": profile}).object()

    yield _of("nothing-1", BAD, make([raw[0], replace(raw[1], data=b"\1"), raw[2]]))
    yield _of("nothing-longer", BAD, make([*raw[:2], replace(raw[2], data=b"\0\0")]))
    yield _of("nothing-at-level-0", UNKNOWN, make([replace(raw[1], level=0), *raw[1:]]))
    yield _of("nothing-over-codec-3", UNKNOWN, make([sound[0], raw[1], sound[2]]))
    yield _of("codec-3-over-raw", UNKNOWN, make([raw[0], sound[1], raw[2]]))
    yield _of("raw-at-level-1", UNKNOWN, make([raw[0], replace(raw[0], level=1), raw[2]]))
    yield _of("codec-255-at-level-2", UNKNOWN, make([*raw[:2], replace(raw[2], codec=255)]))
    yield _of("codec-5", UNKNOWN, make([replace(raw[0], codec=5), *raw[1:]]))
    yield _of("in-a-lossless-object", UNKNOWN, make(sound[:1], profile=1))
    small = replace(_IDENTITY, layout=replace(_IDENTITY.layout, dtype="float8_e4m3fn"))
    yield _of("of-float8", UNKNOWN, make([replace(part, data=part.data[:500]) for part in sound], small), small)
    apart = [replace(part, parts=kind, data=part.data[:500]) for part in sound for kind in (1, 2)]
    yield _of("of-k-alone", UNKNOWN, make(apart))


def _calibrated() -> Iterator[GoldenError]:
    goldens = {golden.name: golden for golden in (make() for make in SCALABLE_MAKERS)}
    group, whole = goldens["scalable-group"], goldens["scalable-all"]

    def make(
        name: str, maker: Maker, plan: Plan, head: CraftedHead, of: str, streams: Any = None, **fields: Any
    ) -> GoldenError:
        payloads = pack_payloads(head, streams or maker.streams(plan))
        artefact = goldens[of].artefact
        assert artefact is not None
        data = _object(payloads, maker.identity, **{"calibration": blake3(artefact).digest()} | fields)
        return _of(name, BAD, data, maker.identity, calibration=of, first_position=0)

    one = replace(group.identity, shard=Shard(0, 2, 0, 2))
    maker, plan = Maker("scalable-group", one), Plan((0, 2), exact=[0])
    maker.calibrate("group", 2, Rotary("halves", [1.0, 0.125], [1, 0, 1]), 19)
    head = maker.head(plan)
    sound = make("", maker, plan, head, "scalable-group")
    yield replace(sound, name="scalable-calibration-not-at-hand", code=UNKNOWN, calibration=None)
    yield replace(sound, name="scalable-another-calibration", code=UNKNOWN, calibration="scalable-all")
    yield make("another-span", maker, plan, replace(head, span=0), "scalable-group")
    yield make("rotary-in-mode-0", maker, plan, replace(head, rotary=1), "scalable-group")
    yield make("pairs-in-mode-0", maker, plan, replace(head, frequencies=[1.0], rotated=[1, 1]), "scalable-group")
    yield make("uncalibrated-in-a-calibrated-object", maker, plan, replace(head, mode=1), "scalable-group")
    own = [replace(one, fields={"padding": b"\1"}) for one in maker.streams(replace(plan, explicit=[0, 1]))]
    yield make("classes-padding", maker, plan, head, "scalable-group", streams=own)
    none = make("calibrated-in-an-uncalibrated-object", maker, plan, head, "scalable-group", calibration=bytes(32))
    yield replace(none, calibration=None)
    maker.identity = replace(one, shard=Shard(0, 1, 0, 2))
    yield make("part-of-a-layer-group", maker, Plan((0, 2), exact=[0]), head, "scalable-group")
    maker.identity = replace(one, shard=Shard(1, 3, 0, 2))
    yield make("across-layer-groups", maker, Plan((1, 3), exact=[]), head, "scalable-group")
    wide = Maker("scalable-all", replace(whole.identity, shard=Shard(0, 2, 0, 1)))
    wide.calibrate("all", 2, Rotary("halves", [1.0, 0.25, 0.0625, 0.015625], [1, 1]), 50)
    yield make("not-all-heads", wide, Plan((0, 2)), wide.head(plan), "scalable-all")
