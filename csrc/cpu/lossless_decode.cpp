// Decoding a payload: every length is checked before anything is read, everything that was read is checked at
// the end.

#include "../rans.h"
#include "decode_rows.h"

namespace kvs {
namespace {

using Bytes = std::span<const std::uint8_t>;
using HeadView = SectionView<std::uint16_t>;

// Reads bit strings, least significant bit first; `bits` at most 13.
class BitReader {
 public:
  explicit BitReader(const std::uint8_t* from) : from_(from) {}

  std::uint32_t take(unsigned bits) {
    while (held_ < bits) {
      window_ |= static_cast<std::uint32_t>(*from_++) << held_;
      held_ += 8;
    }
    const std::uint32_t value = window_ & ((1u << bits) - 1);
    window_ >>= bits;
    held_ -= bits;
    return value;
  }

 private:
  const std::uint8_t* from_;
  std::uint32_t window_ = 0;
  unsigned held_ = 0;
};

Fault copy_raw(Bytes stream, const HeadShape& shape, const HeadView& out) {
  if (stream[1] != 0 || stream[2] != 0 || stream[3] != 0) return Fault::kBadPayload;
  if (stream.size() != kRawHeader + 2 * shape.values()) return Fault::kBadPayload;
  const std::uint8_t* from = stream.data() + kRawHeader;
  for (std::uint64_t plane = 0; plane < out.planes(); ++plane) {
    std::uint16_t* to = out.data + out.plane_offset(plane);
    for (std::uint32_t token = 0; token < out.tokens; ++token, from += 2ull * out.dim) {
      std::memcpy(to + token * out.token_stride, from, 2ull * out.dim);
    }
  }
  return Fault::kNone;
}

void read_classes(BitReader& classes, LaneBlock& block, std::uint32_t top_min, unsigned top_bits) {
  for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
    const std::uint32_t table = classes.take(4);
    const std::uint32_t flip = classes.take(1);
    block.table[lane] = table * kSlots;
    block.base[lane] = static_cast<std::uint16_t>(class_base((top_min + classes.take(top_bits)) & 255, flip));
  }
}

bool finished(const StreamReader& from, const LaneBlock& block, const HeadShape& shape) {
  const auto at_start = [](std::uint32_t state) { return state == kStateMin; };
  return from.words == from.words_end && from.escapes == from.escapes_end &&
         std::all_of(block.state, block.state + shape.states(), at_start);
}

Fault decode_coded(Bytes stream, const HeadShape& shape, const HeadView& out, Implementation how) {
  if (stream.size() < kCodedHeader) return Fault::kBadPayload;
  const std::uint8_t* start = stream.data();
  const unsigned top_bits = start[2];
  if (top_bits > 8 || start[3] != 0) return Fault::kBadPayload;
  const auto escapes = load<std::uint32_t>(start + 8);
  const StreamParts parts = lay_out(shape, load<std::uint32_t>(start + 4), escapes, top_bits);
  if (parts.end != stream.size()) return Fault::kBadPayload;

  LaneBlock block{};
  for (std::uint32_t lane = 0; lane < shape.states(); ++lane) {
    block.state[lane] = load<std::uint32_t>(start + parts.states + 4 * lane);
    if (block.state[lane] < kStateMin || block.state[lane] >> 31) return Fault::kBadPayload;
  }
  StreamReader from{start + parts.words, start + parts.rows, start + parts.escapes,
                    start + parts.escapes + escapes, start + parts.end};
  BitReader classes(start + parts.classes);
  block.rows = start + parts.rows;
  for (std::uint64_t index = 0; index < shape.blocks(); ++index) {
    block.lanes = shape.lanes(index);
    read_classes(classes, block, start[1], top_bits);
    const BlockRuns runs = find_runs(out, index, block.lanes);
    std::uint64_t done = 0;
    if (how != Implementation::kPortable && block.lanes >= kFewLanes) {
      const auto fast = how == Implementation::kAvx2 ? decode_rows_avx2 : decode_rows_avx512;
      done = fast(from, block, runs, shape.tokens, out.data, out.token_stride);
    }
    if (from.exhausted) return Fault::kBadPayload;
    const Fault fault =
        decode_rows_portable(from, block, runs, done, shape.tokens, out.data, out.token_stride);
    if (fault != Fault::kNone) return fault;
    block.rows += shape.tokens * row_bytes(block.lanes);
  }
  return finished(from, block, shape) ? Fault::kNone : Fault::kBadPayload;
}

Fault decode_head(Bytes stream, const HeadView& out, Implementation how) {
  const HeadShape shape{static_cast<std::uint64_t>(out.planes()) * out.dim, out.tokens};
  if (stream.size() < kRawHeader) return Fault::kBadPayload;
  switch (stream[0]) {
    case kModeRaw:
      return copy_raw(stream, shape, out);
    case kModeCoded:
      return decode_coded(stream, shape, out, how);
    default:
      return Fault::kBadPayload;
  }
}

}  // namespace

Fault decode_lossless(Bytes payload, const SectionView<std::uint16_t>& out, std::uint32_t head_begin,
                      std::uint32_t section_heads, Implementation how) {
  std::uint64_t at = 4ull * section_heads;
  if (payload.size() < at) return Fault::kTruncated;
  std::uint64_t total = at;
  for (std::uint32_t head = 0; head < section_heads; ++head) {
    const auto length = load<std::uint32_t>(payload.data() + 4ull * head);
    total += length;
    if (head < head_begin) at += length;
  }
  if (total != payload.size()) return total > payload.size() ? Fault::kTruncated : Fault::kBadPayload;
  for (std::uint32_t head = 0; head < out.heads; ++head) {
    const auto length = load<std::uint32_t>(payload.data() + 4ull * (head_begin + head));
    HeadView view = out;
    view.data = out.data + head * out.head_stride;
    const Fault fault = decode_head(payload.subspan(at, length), view, how);
    if (fault != Fault::kNone) return fault;
    at += length;
  }
  return Fault::kNone;
}

}  // namespace kvs
