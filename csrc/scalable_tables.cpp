#include "scalable_tables.h"

#include <cstring>
#include <stdexcept>

namespace kvs {
namespace {

void expect(bool sound, const char* what) {
  if (!sound) throw std::invalid_argument(what);
}

BaseBounds find_bounds(const std::uint16_t* frequencies) {
  BaseBounds found{};
  std::uint32_t start = 0;
  for (std::uint32_t symbol = 0; symbol < kBaseSymbols; ++symbol) {
    const std::uint32_t frequency = frequencies[symbol];
    if (frequency == 0) continue;
    const std::uint32_t entry = pack_base_entry(symbol, frequency, start);
    if (start == 0) {
      found.first = entry;
    } else if (symbol == kBaseEscape) {
      found.bounds[kMostBounds] = start;
      found.entries[kMostBounds] = entry;
    } else if (found.count < kMostBounds) {
      found.bounds[found.count] = start;
      found.entries[found.count++] = entry;
    } else {
      found.count = kMostBounds + 1;
      break;
    }
    start += frequency;
  }
  return found;
}

}  // namespace

ScalableTables::ScalableTables(const Source& source) {
  std::memcpy(first_, source.first, sizeof first_);
  expect(kClasses >= first_[0] && first_[0] >= first_[1] && first_[1] >= first_[2] && first_[2] >= 1,
         "first: 48 >= first[0] >= first[1] >= first[2] >= 1");
  for (unsigned level = 0; level < kLevels; ++level) {
    for (std::uint32_t k = first_[level]; k < kClasses; ++k) {
      const float shift = source.shift[level * kClasses + k];
      expect(shift >= 0 && shift <= 0.5f, "shift: 0 to 0.5");
      shift_[level][k] = shift;
    }
  }
  slots_.reserve((kClasses - first_[0]) * kSlots);
  for (std::uint32_t k = first_[0]; k < kClasses; ++k) {
    add_base(source.base + k * kBaseSymbols);
    bounds_[k] = find_bounds(source.base + k * kBaseSymbols);
  }
  for (unsigned level = 1; level < kLevels; ++level) {
    for (std::uint32_t k = first_[level]; k < kClasses; ++k) {
      set_refine(level, k, source.refine + ((level - 1) * kClasses + k) * kContexts * 2);
    }
  }
}

void ScalableTables::add_base(const std::uint16_t* frequencies) {
  std::uint32_t start = 0;
  for (std::uint32_t symbol = 0; symbol < kBaseSymbols; ++symbol) {
    const std::uint32_t frequency = frequencies[symbol];
    expect(frequency < kSlots && start + frequency <= kSlots,
           "base: frequencies below 4096 that sum to 4096");
    base_pushes_.push_back(make_push(frequency, start));
    for (std::uint32_t i = 0; i < frequency; ++i) slots_.push_back(pack_base_entry(symbol, frequency, i));
    start += frequency;
  }
  expect(start == kSlots, "base: frequencies below 4096 that sum to 4096");
  expect(frequencies[kBaseEscape] >= 1, "base: the escape has a frequency of at least 1");
}

void ScalableTables::set_refine(unsigned level, std::uint32_t k, const std::uint16_t* pairs) {
  for (std::uint32_t context = 0; context < kContexts; ++context) {
    const std::uint32_t c1 = pairs[2 * context], c2 = pairs[2 * context + 1];
    expect(0 < c1 && c1 < c2 && c2 < kSlots, "refine: 0 < c1 < c2 < 4096");
    thresholds_[level - 1][k][context] = pack_thresholds(c1, c2);
    Push* pushes = ternary_pushes_[level - 1][k][context];
    pushes[0] = make_push(c1, 0);
    pushes[1] = make_push(c2 - c1, c1);
    pushes[2] = make_push(kSlots - c2, c2);
  }
}

}  // namespace kvs
