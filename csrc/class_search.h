// Which class codes a component in the fewest bits, for host and device: what a symbol costs, and the search.
// Integers alone, so that every machine chooses the same. How counts are kept, and costs added up, is the
// machine's affair: csrc/cpu/choose_class.cpp, csrc/cuda/choose_class.h.
#pragma once

#include <cstdint>

#include "lossless_tables.h"
#include "rans.h"

namespace kvs {
namespace class_cost {

inline constexpr std::uint32_t kUnit = 256;  // costs are in 1/256 bit

// log2(x) * kUnit of x from 1 to 4096, rounded down: the fraction by repeated squaring.
constexpr std::uint32_t log2_units(std::uint32_t x) {
  std::uint32_t whole = 0;
  while (x >> (whole + 1)) ++whole;
  std::uint64_t mantissa = (static_cast<std::uint64_t>(x) << 31) >> whole;  // in [2^31, 2^32)
  std::uint32_t units = whole;
  for (std::uint32_t unit = 1; unit < kUnit; unit *= 2) {
    mantissa = mantissa * mantissa >> 31;
    const bool above = mantissa >> 32;
    units = units * 2 + above;
    if (above) mantissa >>= 1;
  }
  return units;
}

constexpr std::int32_t escape(std::uint32_t table) {
  return static_cast<std::int32_t>((kSlotBits + 8) * kUnit - log2_units(kFrequencies[table][kEscapeStep]));
}

// Cost of a symbol less the cost of an escape: so the escapes need not be counted one by one. 0 of what is
// coded as one.
constexpr std::int16_t saving(std::uint32_t table, std::uint32_t symbol) {
  const std::uint32_t frequency = kFrequencies[table][symbol];
  if ((symbol & 31) >= kEscapeStep || frequency == 0) return 0;
  const auto bits = static_cast<std::int32_t>(kSlotBits * kUnit - log2_units(frequency));
  return static_cast<std::int16_t>(bits - escape(table));
}

}  // namespace class_cost

// The search: scales are in half octaves, 2 * top + phase; a table is 2 * mean + phase. `cost_of(table,
// top)` is what all values cost.
template <typename CostOf>
class ClassSearch {
 public:
  KVS_HOST_DEVICE explicit ClassSearch(const CostOf& cost_of) : cost_of_(cost_of) {}

  // `upper` is the exponent to begin at.
  KVS_HOST_DEVICE void run(std::uint32_t upper) {
    find_scale(upper);
    find_mean(best_scale_);
  }

  KVS_HOST_DEVICE std::uint32_t table() const { return 2 * best_mean_ + best_scale_ % 2; }
  KVS_HOST_DEVICE std::uint32_t top() const { return best_scale_ / 2; }

 private:
  static constexpr std::uint32_t kMostScale = 511;
  static constexpr std::int32_t kDear = 0x7FFFFFFF;

  // The scale first, by the tables of mean 0: the costs have one valley, walked down from its upper end.
  KVS_HOST_DEVICE void find_scale(std::uint32_t upper) {
    const std::uint32_t low = 2 * upper;
    std::uint32_t scale = low + 5 < kMostScale ? low + 5 : kMostScale;
    while (try_class(0, scale) && scale != low) --scale;
  }

  // Then the mean, from small to large for as long as it pays, at that scale and its neighbours.
  KVS_HOST_DEVICE void find_mean(std::uint32_t scale) {
    const std::uint32_t last = scale < kMostScale ? scale + 1 : kMostScale;
    for (std::uint32_t near = scale > 0 ? scale - 1 : 0; near <= last; ++near) {
      last_ = kDear;
      for (std::uint32_t mean = 1; mean < kTables / 2 && try_class(mean, near); ++mean) continue;
    }
  }

  // Keeps the class if it is the best so far. True if it is no dearer than the one tried before.
  KVS_HOST_DEVICE bool try_class(std::uint32_t mean, std::uint32_t scale) {
    const std::int32_t cost = cost_of_(2 * mean + scale % 2, scale / 2);
    if (cost < least_) {
      least_ = cost;
      best_mean_ = mean;
      best_scale_ = scale;
    }
    const bool cheaper = cost <= last_;
    last_ = cost;
    return cheaper;
  }

  const CostOf& cost_of_;
  std::int32_t least_ = kDear, last_ = kDear;
  std::uint32_t best_mean_ = 0, best_scale_ = 0;
};

}  // namespace kvs
