// Which class codes a component in the fewest bits, one component to a thread: the search of
// class_search.h, so that a GPU chooses what a CPU chooses.
//
// The surprises first:
// - Half octaves are counted modulo 64, in shared memory, while the values go by for the first time: a
//   component spans fewer, so that nothing need be known of its scale before. Where one spans more (an exact
//   zero is enough), or its outliers lie so far above the rest that the window misses what the search looks
//   at, its values are read once more, and those within the right window of 64 are counted.
// - A bin is one word: positive values in its low half, negative ones in its high half. Word bin * 32 + lane
//   belongs to one lane: no bank conflict, no atomic, no collective. Lanes may part ways anywhere in here.
//
// Instructions: some 10 for each value seen. To try a class is to add up 26 bins of two signs, some 210
// instructions, and a warp tries as many as its slowest lane, 12 to 25: for each of 256 rows, 10 to 20.
#pragma once

#include "../class_search.h"
#include "launch.h"
#include "simt.h"

// A loop whose iterations would take too many registers if all were done side by side.
#ifdef __CUDACC__
#define KVS_UNROLL_BY_FOUR _Pragma("unroll 4")
#else
#define KVS_UNROLL_BY_FOUR
#endif

namespace kvs {

namespace class_cost {

inline constexpr std::uint32_t kSteps =
    26;  // of a table; no table has a frequency for those from here to the escapes
inline constexpr std::uint32_t kStride =
    kSteps + 1;  // words; odd, so that the tables of both phases differ in banks

constexpr bool no_table_has_more_steps() {
  for (const auto& frequencies : kFrequencies) {
    for (std::uint32_t step = kSteps; step < kEscapeStep; ++step) {
      if (frequencies[step] != 0 || frequencies[32 + step] != 0) return false;
    }
  }
  return true;
}
static_assert(no_table_has_more_steps());

// For each table: the savings of the steps, sign 0 in the low half of a word, sign 1 in the high half; then
// the cost of an escape.
struct Costs {
  std::uint32_t words[kTables * kStride];

  constexpr Costs() : words() {
    for (std::uint32_t table = 0; table < kTables; ++table) {
      for (std::uint32_t step = 0; step < kSteps; ++step) {
        words[table * kStride + step] = static_cast<std::uint16_t>(saving(table, step)) |
                                        std::uint32_t{static_cast<std::uint16_t>(saving(table, 32 + step))}
                                            << 16;
      }
      words[table * kStride + kSteps] = static_cast<std::uint32_t>(escape(table));
    }
  }
};
KVS_DEVICE_TABLE Costs kCosts;

// kFrequencies where kernels can reach them.
struct Frequencies {
  std::uint16_t of[kTables][kSymbols];

  constexpr Frequencies() : of() {
    for (std::uint32_t table = 0; table < kTables; ++table) {
      for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol)
        of[table][symbol] = kFrequencies[table][symbol];
    }
  }
};
KVS_DEVICE_TABLE Frequencies kTablesOfFrequencies;

}  // namespace class_cost

inline constexpr std::uint32_t kCostBytes = 4 * kTables * class_cost::kStride;  // 1,728
inline constexpr std::uint32_t kMostCounted = 32767;  // tokens: a half word counts them

// The block's copy, in shared memory. sync_block before its use.
KVS_DEVICE void load_costs(std::uint32_t* shared) {
  for (std::uint32_t i = simt::thread(); i < kTables * class_cost::kStride; i += simt::threads()) {
    shared[i] = class_cost::kCosts.words[i];
  }
}

// One lane's counts.
class LaneCounts {
 public:
  static constexpr std::int32_t kBins = 64;
  static constexpr std::uint32_t kBytes = 4 * kBins * kLanes;  // for each warp

  KVS_DEVICE explicit LaneCounts(std::uint8_t* of_warp)
      : bins_(reinterpret_cast<std::uint32_t*>(of_warp) + simt::lane()) {}

  KVS_DEVICE void clear() const {
    for (std::int32_t bin = 0; bin < kBins; ++bin) bins_[bin * kLanes] = 0;
  }

  KVS_DEVICE void count(std::uint32_t value) const {
    bins_[(value >> kLowBits & (kBins - 1)) * kLanes] += 1u << (value >> 11 & 16);
  }

  // Both signs of a half octave, which may be negative: it is empty then.
  KVS_DEVICE std::uint32_t at(std::int32_t half_octave) const {
    return bins_[(half_octave & (kBins - 1)) * kLanes];
  }

  KVS_DEVICE std::int32_t total(std::int32_t half_octave) const {
    const std::uint32_t both = at(half_octave);
    return static_cast<std::int32_t>((both & 0xFFFF) + (both >> 16));
  }

 private:
  std::uint32_t* bins_;
};

// What the first look at a component tells.
struct Glance {
  std::uint32_t largest = 0, least = 0x7FFF;  // magnitudes
  std::uint32_t negative = 0;

  KVS_DEVICE void see(std::uint32_t value) {
    const std::uint32_t magnitude = value & 0x7FFF;
    largest = magnitude > largest ? magnitude : largest;
    least = magnitude < least ? magnitude : least;
    negative += value >> 15;
  }
};

// Where the counted window lies: half octaves above last - 64, up to last.
template <typename Values>
class Window {
 public:
  // `counts` hold all of the values, modulo 64. The window reaches three octaves above the largest value,
  // because the search looks as far above the upper exponent.
  KVS_DEVICE Window(const LaneCounts& counts, const Values& values, std::int32_t tokens, const Glance& seen)
      : counts_(counts),
        values_(values),
        tokens_(tokens),
        last_(static_cast<std::int32_t>(seen.largest >> 7) * 2 + 7) {
    whole_ = last_ - static_cast<std::int32_t>(seen.least >> kLowBits) < LaneCounts::kBins;
    if (!whole_) move(last_);
  }

  // The largest exponent that at most 1 in 32 tokens exceeds: an outlier must not set the scale.
  KVS_DEVICE std::int32_t find_upper(std::int32_t largest) {
    std::int32_t seen = 0;
    for (std::int32_t exponent = largest;; --exponent) {
      if (2 * exponent <= last_ - LaneCounts::kBins) move(2 * exponent + 1);
      seen += counts_.total(2 * exponent) + counts_.total(2 * exponent + 1);
      if (seen * 32 > tokens_ || exponent == 0) return exponent;
    }
  }

  // Counts what the search around `upper` looks at, where that has not been counted: scales from half an
  // octave below to three octaves above, and kSteps down from each.
  KVS_DEVICE void cover(std::int32_t upper) {
    if (!whole_ || 2 * upper - 32 <= last_ - LaneCounts::kBins) move(2 * upper + 7);
  }

 private:
  KVS_DEVICE void move(std::int32_t last) {
    last_ = last;
    counts_.clear();
    for (std::int32_t token = 0; token < tokens_; ++token) {
      const std::uint32_t value = values_.at(static_cast<std::uint32_t>(token));
      const std::uint32_t below = static_cast<std::uint32_t>(last) - (value >> kLowBits & 511);
      if (below < static_cast<std::uint32_t>(LaneCounts::kBins)) counts_.count(value);
    }
  }

  const LaneCounts& counts_;
  const Values& values_;
  std::int32_t tokens_, last_;
  bool whole_;  // all values lie in the window
};

// What a lane's values cost: the search asks for it.
class LaneCost {
 public:
  KVS_DEVICE LaneCost(const LaneCounts& counts, const std::uint32_t* costs, bool flip, std::int32_t tokens)
      : counts_(counts), costs_(costs), turn_(flip ? 16 : 0), tokens_(tokens) {}

  KVS_DEVICE std::int32_t operator()(std::uint32_t table, std::uint32_t top) const {
    const std::uint32_t* costs = costs_ + table * class_cost::kStride;
    const std::uint32_t first = 2 * top + 1;  // the half octave of its first step
    std::int32_t saved = 0;
    KVS_UNROLL_BY_FOUR for (std::uint32_t step = 0; step < class_cost::kSteps; ++step) {
      const std::uint32_t both = counts_.at(static_cast<std::int32_t>(first - step));
      const std::uint32_t savings = costs[step];
      saved +=
          static_cast<std::int32_t>(both >> turn_ & 0xFFFF) * static_cast<std::int16_t>(savings & 0xFFFF);
      saved +=
          static_cast<std::int32_t>(both >> (16 - turn_) & 0xFFFF) * static_cast<std::int16_t>(savings >> 16);
    }
    return tokens_ * static_cast<std::int32_t>(costs[class_cost::kSteps]) + saved;
  }

 private:
  const LaneCounts& counts_;
  const std::uint32_t* costs_;
  std::uint32_t turn_;
  std::int32_t tokens_;
};

// A component's class in 16 bits: table in bits 0-3, flip in bit 4, top in bits 8-15.
KVS_DEVICE std::uint32_t pack_class(std::uint32_t table, bool flip, std::uint32_t top) {
  return table | static_cast<std::uint32_t>(flip) << 4 | top << 8;
}

// The class of the lane's component, of which the first `tokens` (at most kMostCounted) values were counted
// and seen. `values.at(token)` reads one again. `costs` as load_costs leaves them.
template <typename Values>
KVS_DEVICE std::uint32_t choose_class(const LaneCounts& counts, const Glance& seen, const Values& values,
                                      std::int32_t tokens, const std::uint32_t* costs) {
  Window<Values> window(counts, values, tokens, seen);
  const std::int32_t upper = window.find_upper(static_cast<std::int32_t>(seen.largest >> 7));
  window.cover(upper);
  const bool flip = static_cast<std::int32_t>(2 * seen.negative) > tokens;
  const LaneCost cost(counts, costs, flip, tokens);
  ClassSearch search(cost);
  search.run(static_cast<std::uint32_t>(upper));
  return pack_class(search.table(), flip, search.top());
}

}  // namespace kvs
