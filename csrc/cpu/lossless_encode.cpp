// Encoding a section: each head is packed into rows of 32 lanes, classed, coded from its end, and put
// together.

#include <memory>
#include <stdexcept>

#include "choose_class.h"
#include "encode_rows.h"

namespace kvs {
namespace {

using HeadView = SectionView<const std::uint16_t>;

// Writes bit strings, least significant bit first; `bits` at most 13. Bits left over in the last byte are 0.
class BitWriter {
 public:
  explicit BitWriter(std::uint8_t* to) : to_(to) {}

  void put(std::uint32_t value, unsigned bits) {
    window_ |= value << held_;
    for (held_ += bits; held_ >= 8; held_ -= 8, window_ >>= 8) *to_++ = static_cast<std::uint8_t>(window_);
  }

  std::uint8_t* finish() {
    if (held_ != 0) *to_++ = static_cast<std::uint8_t>(window_);
    return to_;
  }

 private:
  std::uint8_t* to_;
  std::uint32_t window_ = 0;
  unsigned held_ = 0;
};

void append_raw(const HeadView& view, std::vector<std::uint8_t>& payload) {
  std::size_t at = payload.size() + kRawHeader;
  const std::size_t row = 2ull * view.dim;
  payload.resize(at + static_cast<std::size_t>(view.planes()) * view.tokens * row);
  for (std::uint64_t plane = 0; plane < view.planes(); ++plane) {
    const std::uint16_t* from = view.data + view.plane_offset(plane);
    for (std::uint32_t token = 0; token < view.tokens; ++token, at += row) {
      std::memcpy(payload.data() + at, from + token * view.token_stride, row);
    }
  }
}

constexpr auto code_rows(Implementation how, std::uint32_t lanes) {
  if (how == Implementation::kPortable || lanes < kFewLanes) return encode_rows_portable;
  return how == Implementation::kAvx2 ? encode_rows_avx2 : encode_rows_avx512;
}

// Scratch of one head, used again for the next.
class HeadCoder {
 public:
  HeadCoder(const HeadView& view, Implementation how)
      : shape_{static_cast<std::uint64_t>(view.planes()) * view.dim, view.tokens},
        how_(how),
        values_(new std::uint16_t[shape_.tokens * kLanes]),
        classes_(shape_.components),
        rows_(new std::uint8_t[shape_.blocks() * shape_.tokens * row_bytes(kLanes)]),
        words_(new std::uint8_t[kWriteRoom + 2 * shape_.values()]),
        words_end_(words_.get() + kWriteRoom + 2 * shape_.values()),
        escapes_(new std::uint8_t[shape_.values()]),
        escapes_end_(escapes_.get() + shape_.values()) {}

  // Appends the stream of one head to `payload`.
  void append(const HeadView& view, std::vector<std::uint8_t>& payload) {
    code(view);
    find_tops();
    assemble(view, payload);
  }

 private:
  // Coding goes from the last block to the first; each is done while it lies in the nearest cache.
  void code(const HeadView& view) {
    StreamWriter to{words_end_, escapes_end_};
    std::fill_n(block_.state, kLanes, kStateMin);
    for (std::uint64_t block = shape_.blocks(); block-- > 0;) {
      block_.lanes = shape_.lanes(block);
      block_.values = values_.get();
      pack(view, block);
      Class* chosen = &classes_[block * kLanes];
      choose_classes(values_.get(), block_.lanes, shape_.tokens, chosen);
      for (std::uint32_t lane = 0; lane < block_.lanes; ++lane) {
        block_.table[lane] = chosen[lane].table * kSymbols;
        block_.base[lane] = class_base(chosen[lane].top, chosen[lane].flip);
      }
      code_rows(how_, block_.lanes)(to, block_, shape_.tokens);
      write_rows(rows_.get() + block * shape_.tokens * row_bytes(kLanes));
    }
    word_bytes_ = static_cast<std::size_t>(words_end_ - to.words);
    escape_bytes_ = static_cast<std::size_t>(escapes_end_ - to.escapes);
  }

  void pack(const HeadView& view, std::uint64_t block) {
    const BlockRuns runs = find_runs(view, block, block_.lanes);
    std::uint16_t* row = values_.get();
    if (block_.lanes < kLanes) std::fill_n(row, shape_.tokens * kLanes, std::uint16_t{0});
    const std::uint16_t* from = view.data;
    for (std::uint64_t token = 0; token < shape_.tokens; ++token, row += kLanes, from += view.token_stride) {
      for (std::uint32_t i = 0; i < runs.count; ++i) {
        const Run& run = runs.runs[i];
        copy_run(row + run.lane, from + run.offset, run.lanes);
      }
    }
  }

  void write_rows(std::uint8_t* to) const {
    if (how_ != Implementation::kPortable && block_.lanes == kLanes) {
      return write_rows_avx2(to, values_.get(), shape_.tokens);
    }
    const std::uint16_t* row = values_.get();
    for (const std::uint16_t* end = row + shape_.tokens * kLanes; row != end; row += kLanes) {
      to = block_.lanes == kLanes ? write_full_row(to, row) : write_row(to, row, block_.lanes);
    }
  }

  // Eight values are six bytes.
  static std::uint8_t* write_full_row(std::uint8_t* to, const std::uint16_t* row) {
    for (const std::uint16_t* end = row + kLanes; row != end; row += 8, to += 6) {
      std::uint64_t packed = 0;
      for (unsigned lane = 0; lane < 8; ++lane)
        packed |= static_cast<std::uint64_t>(row[lane] & 63) << lane * kLowBits;
      store(to, static_cast<std::uint32_t>(packed));
      store(to + 4, static_cast<std::uint16_t>(packed >> 32));
    }
    return to;
  }

  static std::uint8_t* write_row(std::uint8_t* to, const std::uint16_t* row, std::uint32_t lanes) {
    BitWriter low(to);
    for (std::uint32_t lane = 0; lane < lanes; ++lane) low.put(row[lane] & 63u, kLowBits);
    return low.finish();
  }

  void find_tops() {
    const auto [least, most] = std::minmax_element(
        classes_.begin(), classes_.end(), [](const Class& a, const Class& b) { return a.top < b.top; });
    top_min_ = least->top;
    top_bits_ = static_cast<unsigned>(std::bit_width(most->top - top_min_));
  }

  void assemble(const HeadView& view, std::vector<std::uint8_t>& payload) {
    const StreamParts parts = lay_out(shape_, word_bytes_ / 2, escape_bytes_, top_bits_);
    const std::size_t at = payload.size();
    if (parts.end >= kRawHeader + 2 * shape_.values()) return append_raw(view, payload);
    payload.resize(at + parts.end);
    std::uint8_t* to = payload.data() + at;
    to[0] = kModeCoded;
    to[1] = static_cast<std::uint8_t>(top_min_);
    to[2] = static_cast<std::uint8_t>(top_bits_);
    store(to + 4, static_cast<std::uint32_t>(word_bytes_ / 2));
    store(to + 8, static_cast<std::uint32_t>(escape_bytes_));
    std::memcpy(to + parts.states, block_.state, 4 * shape_.states());
    std::memcpy(to + parts.words, words_end_ - word_bytes_, word_bytes_);
    std::memcpy(to + parts.rows, rows_.get(), parts.classes - parts.rows);
    write_classes(to + parts.classes);
    std::memcpy(to + parts.escapes, escapes_end_ - escape_bytes_, escape_bytes_);
  }

  void write_classes(std::uint8_t* to) {
    BitWriter classes(to);
    for (const Class& found : classes_) {
      classes.put(found.table | found.flip << 4 | (found.top - top_min_) << kClassBits,
                  kClassBits + top_bits_);
    }
    classes.finish();
  }

  HeadShape shape_;
  Implementation how_;
  std::unique_ptr<std::uint16_t[]> values_;  // of one block, [token][32 lanes]
  std::vector<Class> classes_;
  std::unique_ptr<std::uint8_t[]> rows_;
  std::unique_ptr<std::uint8_t[]> words_;
  std::uint8_t* words_end_;
  std::unique_ptr<std::uint8_t[]> escapes_;
  std::uint8_t* escapes_end_;
  LaneValues block_{};
  std::uint32_t top_min_ = 0;
  unsigned top_bits_ = 0;
  std::size_t word_bytes_ = 0, escape_bytes_ = 0;
};

}  // namespace

std::vector<std::uint8_t> encode_lossless(const SectionView<const std::uint16_t>& values,
                                          Implementation how) {
  if (2ull * values.planes() * values.dim * values.tokens >= kMaxHeadBytes) {
    throw std::length_error("a head of this section is too large for the lossless codec");
  }
  HeadCoder coder(values, how);
  std::vector<std::uint8_t> payload(4ull * values.heads);
  payload.reserve(values.heads * (8 + 2ull * values.planes() * values.dim * values.tokens));
  for (std::uint32_t head = 0; head < values.heads; ++head) {
    HeadView view = values;
    view.data = values.data + head * values.head_stride;
    const std::size_t before = payload.size();
    coder.append(view, payload);
    store(payload.data() + 4ull * head, static_cast<std::uint32_t>(payload.size() - before));
  }
  return payload;
}

}  // namespace kvs
