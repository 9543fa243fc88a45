// What the kernels that encode codec 3 share: sizes of a stream, its scratch, and its tables.
#pragma once

#include "../scalable_steps.h"
#include "api.h"
#include "pages.h"
#include "scalable_values.h"
#include "simt.h"
#include "sizes.h"

namespace kvs {

// What the levels code of a number: the symbol of level 0 in bits 8-15, and which push of its context a
// refinement takes, 3 * context + symbol, in bits 4-7 (level 1) and 0-3 (level 2).
KVS_HOST_DEVICE std::uint32_t pack_symbols(std::int32_t number) {
  const std::int32_t middle = coarsen_number(number), coarse = coarsen_number(middle);
  const auto symbol = static_cast<std::uint32_t>(coarse + kBaseOffset);
  return (symbol < kBaseEscape ? symbol : kBaseEscape) << 8 |
         (3 * context_of(coarse) + ternary_symbol(coarse, middle)) << 4 |
         (3 * context_of(middle) + ternary_symbol(middle, number));
}

// A table set as the encoder looks things up in it. A Push is 8 bytes: `meta` in the low half, whose highest
// bit says that this is an escape: of a symbol that is one, or has no frequency.
struct PackedPushes {
  static constexpr std::uint32_t kEscapes = 1u << 31;

  std::uint64_t base[kClasses][kBaseSymbols];
  std::uint64_t ternary[2][kClasses][kContexts * 3];
  double borders[kClasses];
  double gains[kClasses][kClasses];  // [found][static]
  std::uint32_t first[4];
  std::uint16_t symbols[1 << 16];  // pack_symbols of numbers, by their low 16 bits
};

static_assert(sizeof(PackedPushes) == 48 * 256 * 8 + 2 * 48 * 12 * 8 + 48 * 8 + 48 * 48 * 8 + 16 + 2 * 65536);

inline constexpr float kLargest = 9.0f * kMostBase - 9;  // components of this magnitude and above do not fit
inline constexpr std::uint32_t kMostExact = 0xFFFE;      // exact tokens of a stream that is not raw
inline constexpr std::uint32_t kMarkRaw = 0xFFFF;

struct EncodeSize {
  std::uint32_t tokens, dim, planes, numbers, components, item_bytes, levels;

  KVS_HOST_DEVICE static EncodeSize of(const KvsScalableEncodeJob& job, std::uint32_t dim,
                                       std::uint32_t item_bytes) {
    const std::uint32_t planes = job.heads * job.layers * 2;
    return {job.tokens, dim, planes, planes * dim, job.components, item_bytes, job.levels};
  }
  KVS_HOST_DEVICE std::uint64_t raw_bytes() const { return std::uint64_t{tokens} * numbers * item_bytes; }
  KVS_HOST_DEVICE std::uint64_t raw_stream() const { return round_up(12 + raw_bytes(), 4); }
};

// What the kernels found out about a stream, at the beginning of its scratch.
struct EncodedStream {
  std::uint32_t words[kLevels], escapes;
  std::uint32_t coded[kLevels];  // M
  std::uint32_t exact;
  std::uint32_t raw;               // 1: stored as it is
  std::uint32_t explicit_classes;  // 1: the stream gives its classes

  // Of the object's last level. Compared, not indexed: what is in registers cannot be.
  KVS_HOST_DEVICE std::uint32_t last(std::uint32_t levels) const {
    return levels == 1 ? coded[0] : levels == 2 ? coded[1] : coded[2];
  }
  KVS_HOST_DEVICE std::uint32_t lanes(std::uint32_t levels) const {
    return last(levels) < kLanes ? last(levels) : kLanes;
  }
};

// Offsets in the stream of level 0.
struct EncodedBase {
  std::uint64_t means, classes, classes_end, states, words, escapes, tokens, values, values_end, end;

  KVS_HOST_DEVICE static EncodedBase of(const EncodeSize& size, bool calibrated, const EncodedStream& coded) {
    EncodedBase base{};
    base.means = 12 + (calibrated ? 0 : 4ull * size.planes);
    base.classes = base.means + (calibrated ? 0 : size.numbers);
    base.classes_end = base.classes + (coded.explicit_classes ? size.components : 0);
    base.states = round_up(base.classes_end, 4);
    base.words = base.states + 4ull * coded.lanes(size.levels);
    base.escapes = base.words + 2ull * coded.words[0];
    base.tokens = base.escapes + 2ull * coded.escapes;
    base.values = base.tokens + 2ull * coded.exact;
    base.values_end = base.values + std::uint64_t{coded.exact} * size.numbers * size.item_bytes;
    base.end = round_up(base.values_end, 4);
    return base;
  }
};

// A stream's scratch. `x` [token][number]; once numbers are there, words take its place, from its end down,
// and escapes, from its front up: both together never more than raw values and kSlack, see CodeLevels.
// Distances and what is furthest [token][plane] are of the fit.
class EncodeScratch {
 public:
  static constexpr std::uint64_t kSlack = 1088;

  KVS_HOST_DEVICE EncodeScratch(const EncodeSize& size, bool calibrated, bool matrix, std::uint64_t at)
      : begin_(at) {
    const std::uint64_t tokens = size.tokens, numbers = size.numbers, components = size.components;
    const std::uint64_t rows = round_up(components, kLanes);
    const std::uint64_t planes = calibrated ? 0 : size.planes;
    const std::uint64_t words = size.raw_bytes() + kSlack, floats = 4 * tokens * numbers + 16;
    take(stream_, sizeof(EncodedStream));
    take(states_, 4 * kLanes);
    take(exact_, tokens);
    take(exact_tokens_, 2 * tokens);
    take(classes_, components);
    take(order_, 2 * components);
    take(steps_, 4 * planes);
    take(means_, calibrated ? 0 : numbers);
    take(centers_, calibrated ? 0 : 8 * numbers);
    take(deviations_, 8 * planes);
    take(distances_, 8 * tokens * planes);
    take(furthest_, 8 * tokens * planes);
    take(rounded_, 2 * tokens * components);
    take(rows_, 2 * tokens * rows);
    take(y_, matrix ? 4 * tokens * components : 0);
    take(shrink_, matrix ? 4 * tokens : 0);
    take(x_, floats > words ? floats : words);
    x_low_ = x_ + round_up(2 * tokens * numbers, 16);
    words_end_ = x_ + words / 2 * 2;
  }

  KVS_HOST_DEVICE std::uint64_t bytes() const { return end_; }

  KVS_DEVICE EncodedStream& stream() const { return *at<EncodedStream>(stream_); }
  KVS_DEVICE std::uint32_t* states() const { return at<std::uint32_t>(states_); }
  // 0 where a token is coded, 1 where it is exact.
  KVS_DEVICE std::uint8_t* exact() const { return at<std::uint8_t>(exact_); }
  // 1 where a token is about to be exact: apart, for threads mark tokens while others look who is exact.
  // Where rows lie later.
  KVS_DEVICE std::uint32_t* marks() const { return at<std::uint32_t>(rows_); }
  KVS_DEVICE std::uint16_t* exact_tokens() const { return at<std::uint16_t>(exact_tokens_); }
  KVS_DEVICE std::uint8_t* classes() const { return at<std::uint8_t>(classes_); }
  KVS_DEVICE std::uint16_t* order() const { return at<std::uint16_t>(order_); }
  KVS_DEVICE float* steps() const { return at<float>(steps_); }
  KVS_DEVICE std::int8_t* means() const { return at<std::int8_t>(means_); }
  KVS_DEVICE double* centers() const { return at<double>(centers_); }
  KVS_DEVICE double* deviations() const { return at<double>(deviations_); }
  KVS_DEVICE double* distances() const { return at<double>(distances_); }
  KVS_DEVICE double* furthest() const { return at<double>(furthest_); }
  // Numbers at the finest step, [token][component].
  KVS_DEVICE std::int16_t* rounded() const { return at<std::int16_t>(rounded_); }
  // Their pack_symbols in coding order, [block][token][lane].
  KVS_DEVICE std::uint16_t* rows() const { return at<std::uint16_t>(rows_); }
  KVS_DEVICE float* y() const { return at<float>(y_); }
  KVS_DEVICE float* x() const { return at<float>(x_); }
  // With a matrix of float16: x is the sum of two of them times `shrink` of its token, a power of two.
  KVS_DEVICE std::uint16_t* x_high() const { return at<std::uint16_t>(x_); }
  KVS_DEVICE std::uint16_t* x_low() const { return at<std::uint16_t>(x_low_); }
  KVS_DEVICE float* shrink() const { return at<float>(shrink_); }
  KVS_DEVICE std::uint16_t* escapes() const { return at<std::uint16_t>(x_); }
  KVS_DEVICE std::uint16_t* words_end() const { return at<std::uint16_t>(words_end_); }

 private:
  KVS_HOST_DEVICE void take(std::uint64_t& place, std::uint64_t bytes) {
    place = end_;
    end_ += round_up(bytes, 16);
  }
  template <typename Value>
  KVS_DEVICE Value* at(std::uint64_t place) const {
    return reinterpret_cast<Value*>(begin_ + place);
  }

  std::uint64_t begin_, end_ = 0;
  std::uint64_t stream_, states_, exact_, exact_tokens_, classes_, order_, steps_, means_, centers_,
      deviations_, distances_, furthest_, rounded_, rows_, y_, shrink_, x_, x_low_, words_end_;
};

KVS_DEVICE EncodeScratch scratch_of(const KvsScalableEncodeJob& job, const EncodeSize& size) {
  return {size, job.calibrated != 0, job.matrix_bytes != 0, job.scratch};
}

// work(job, token) by a warp for each token of each job, of which none has more than `tokens`.
template <typename Work>
KVS_DEVICE void each_token(const KvsScalableEncodeJob* jobs, std::uint32_t count, std::uint32_t tokens,
                           const Work& work) {
  const std::uint64_t all = std::uint64_t{count} * tokens;
  const std::uint64_t step = std::uint64_t{simt::blocks()} * simt::warps();
  for (std::uint64_t i = std::uint64_t{simt::block()} * simt::warps() + simt::warp(); i < all; i += step) {
    const KvsScalableEncodeJob& job = jobs[i / tokens];
    const auto token = static_cast<std::uint32_t>(i % tokens);
    if (token < job.tokens) work(job, token);
  }
}

// The tiles that products are made in: of a job, the most.
struct ProductTiles {
  std::uint32_t planes, tokens, components;

  KVS_HOST_DEVICE std::uint64_t count() const { return std::uint64_t{planes} * tokens * components; }

  // work(job, plane, tile of tokens, tile of components) by a block for each of those jobs whose matrix is of
  // elements of `bytes`; which of them there are is the work's to know.
  template <typename Work>
  KVS_DEVICE void each(const KvsScalableEncodeJob* jobs, std::uint32_t number, std::uint32_t bytes,
                       const Work& work) const {
    const std::uint64_t of_job = count();
    for (std::uint64_t i = simt::block(); i < number * of_job; i += simt::blocks()) {
      const KvsScalableEncodeJob& job = jobs[i / of_job];
      const auto tile = static_cast<std::uint32_t>(i % of_job);
      if (job.matrix_bytes != bytes) continue;
      work(job, tile / (tokens * components), tile / components % tokens, tile % components);
    }
  }
};

// The values of one of a job's planes, which are its numbers [plane * dim, + dim): those of the first token
// of the first block.
template <typename Bits>
KVS_DEVICE const Bits* find_plane(const KvsPages& pages, const KvsScalableEncodeJob& job,
                                  std::uint32_t plane) {
  const std::uint32_t within = plane % (2u * job.layers), head = plane / (2u * job.layers);
  return find_head<const Bits>(pages, job.layer_begin + within / 2, within % 2, job.head + head);
}

}  // namespace kvs
