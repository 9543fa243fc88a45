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

// Scratch of one head, used again for the next.
class HeadCoder {
 public:
  HeadCoder(const HeadView& view, Implementation how)
      : shape_{static_cast<std::uint64_t>(view.planes()) * view.dim, view.tokens},
        how_(how),
        values_(new std::uint16_t[shape_.blocks() * shape_.tokens * kLanes]),
        classes_(shape_.components),
        words_(new std::uint8_t[kRoom + 2 * shape_.values()]),
        words_end_(words_.get() + kRoom + 2 * shape_.values()),
        escapes_(new std::uint8_t[shape_.values()]),
        escapes_end_(escapes_.get() + shape_.values()) {}

  // Appends the stream of one head to `payload`.
  void append(const HeadView& view, std::vector<std::uint8_t>& payload) {
    pack(view);
    choose();
    code();
    assemble(view, payload);
  }

 private:
  static constexpr std::size_t kRoom = 16;  // for a wide store before the first word

  std::uint16_t* block_values(std::uint64_t block) { return values_.get() + block * shape_.tokens * kLanes; }

  void pack(const HeadView& view) {
    for (std::uint64_t block = 0; block < shape_.blocks(); ++block) {
      const BlockRuns runs = find_runs(view, block, shape_.lanes(block));
      std::uint16_t* row = block_values(block);
      if (shape_.lanes(block) < kLanes) std::fill_n(row, shape_.tokens * kLanes, std::uint16_t{0});
      for (std::uint64_t token = 0; token < shape_.tokens; ++token, row += kLanes) {
        const std::uint16_t* from = view.data + static_cast<std::int64_t>(token) * view.token_stride;
        for (std::uint32_t i = 0; i < runs.count; ++i) {
          std::memcpy(row + runs.runs[i].lane, from + runs.runs[i].offset, 2 * runs.runs[i].lanes);
        }
      }
    }
  }

  void choose() {
    for (std::uint64_t block = 0; block < shape_.blocks(); ++block) {
      choose_classes(block_values(block), shape_.lanes(block), shape_.tokens, &classes_[block * kLanes]);
    }
    const auto [least, most] = std::minmax_element(
        classes_.begin(), classes_.end(), [](const Class& a, const Class& b) { return a.top < b.top; });
    top_min_ = least->top;
    top_bits_ = static_cast<unsigned>(std::bit_width(most->top - top_min_));
  }

  void code() {
    StreamWriter to{words_end_, escapes_end_};
    std::fill_n(block_.state, kLanes, kStateMin);
    for (std::uint64_t block = shape_.blocks(); block-- > 0;) {
      block_.lanes = shape_.lanes(block);
      block_.values = block_values(block);
      for (std::uint32_t lane = 0; lane < block_.lanes; ++lane) {
        const Class& found = classes_[block * kLanes + lane];
        block_.table[lane] = found.table * kSymbols;
        block_.base[lane] = class_base(found.top, found.flip);
      }
      if (how_ == Implementation::kAvx2 && block_.lanes == kLanes) {
        encode_rows_avx2(to, block_, shape_.tokens);
      } else {
        encode_rows_portable(to, block_, shape_.tokens);
      }
    }
    word_bytes_ = static_cast<std::size_t>(words_end_ - to.words);
    escape_bytes_ = static_cast<std::size_t>(escapes_end_ - to.escapes);
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
    write_rows(to + parts.rows);
    write_classes(to + parts.classes);
    std::memcpy(to + parts.escapes, escapes_end_ - escape_bytes_, escape_bytes_);
  }

  void write_rows(std::uint8_t* to) {
    for (std::uint64_t block = 0; block < shape_.blocks(); ++block) {
      const std::uint16_t* row = block_values(block);
      const std::uint32_t lanes = shape_.lanes(block);
      for (std::uint64_t token = 0; token < shape_.tokens; ++token, row += kLanes) {
        to = lanes == kLanes ? write_full_row(to, row) : write_row(to, row, lanes);
      }
    }
  }

  // Eight values are six bytes; the two bytes more that are stored are overwritten by what follows.
  static std::uint8_t* write_full_row(std::uint8_t* to, const std::uint16_t* row) {
    for (const std::uint16_t* end = row + kLanes; row != end; row += 8, to += 6) {
      std::uint64_t packed = 0;
      for (unsigned lane = 0; lane < 8; ++lane)
        packed |= static_cast<std::uint64_t>(row[lane] & 63) << lane * kLowBits;
      store(to, packed);
    }
    return to;
  }

  static std::uint8_t* write_row(std::uint8_t* to, const std::uint16_t* row, std::uint32_t lanes) {
    BitWriter low(to);
    for (std::uint32_t lane = 0; lane < lanes; ++lane) low.put(row[lane] & 63u, kLowBits);
    return low.finish();
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
  std::unique_ptr<std::uint16_t[]> values_;
  std::vector<Class> classes_;
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
