#include "choose_class.h"

#include "../lossless_tables.h"

namespace kvs {
namespace {

constexpr std::uint32_t kUnit = 256;          // costs are in 1/256 bit
constexpr std::uint64_t kMostTokens = 32767;  // counts must fit a signed 16-bit number

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

// Cost of each symbol less the cost of an escape: so the escapes need not be counted one by one.
struct Costs {
  alignas(32) std::int16_t saving[kTables][kSymbols];
  std::int32_t escape[kTables];

  constexpr Costs() : saving(), escape() {
    for (std::uint32_t table = 0; table < kTables; ++table) {
      escape[table] =
          static_cast<std::int32_t>((kSlotBits + 8) * kUnit - log2_units(kFrequencies[table][kEscapeStep]));
      for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        const std::uint32_t frequency = kFrequencies[table][symbol];
        if ((symbol & 31) >= kEscapeStep || frequency == 0) continue;
        const auto bits = static_cast<std::int32_t>(kSlotBits * kUnit - log2_units(frequency));
        saving[table][symbol] = static_cast<std::int16_t>(bits - escape[table]);
      }
    }
  }
};
constexpr Costs kCosts;

// How often each half octave occurs, the largest first, for each sign; room before and after for any top.
struct Counts {
  static constexpr std::uint32_t kRoom = 16;
  std::int16_t of[2][512 + 3 * kRoom] = {};

  // Counts of the steps below `top`, a run of 32.
  const std::int16_t* below(std::uint32_t sign, std::uint32_t top) const {
    return of[sign] + kRoom + 510 - 2 * top;
  }
};

std::int32_t cost_of(const Counts& counts, std::uint32_t table, std::uint32_t flip, std::uint32_t top,
                     std::int32_t tokens) {
  std::int32_t saved = 0;
  for (std::uint32_t sign = 0; sign < 2; ++sign) {
    const std::int16_t* count = counts.below(sign ^ flip, top);
    const std::int16_t* saving = kCosts.saving[table] + 32 * sign;
    for (std::uint32_t step = 0; step < 32; ++step) saved += count[step] * saving[step];
  }
  return tokens * kCosts.escape[table] + saved;
}

// The largest exponent that at most 1 in 32 tokens exceeds: an outlier must not set the scale.
std::uint32_t upper_exponent(const Counts& counts, std::int32_t tokens) {
  std::int32_t seen = 0;
  for (std::uint32_t exponent = 255;; --exponent) {
    for (const auto& of : counts.of) {
      seen += of[Counts::kRoom + 510 - 2 * exponent] + of[Counts::kRoom + 511 - 2 * exponent];
    }
    if (seen * 32 > tokens || exponent == 0) return exponent;
  }
}

}  // namespace

Class choose_class(const std::uint16_t* values, std::uint32_t lane, std::uint64_t tokens) {
  const auto counted = static_cast<std::int32_t>(std::min(tokens, kMostTokens));
  Counts counts;
  std::int32_t negative = 0;
  for (std::int32_t token = 0; token < counted; ++token) {
    const std::uint32_t value = values[static_cast<std::size_t>(token) * kLanes + lane];
    negative += static_cast<std::int32_t>(value >> 15);
    ++counts.of[value >> 15][Counts::kRoom + 511 - (value >> kLowBits & 511)];
  }
  const std::uint32_t flip = 2 * negative > counted;
  // Scale first, in half octaves, by the two tables of mean 0; then the mean, at that scale and its
  // neighbours.
  const std::uint32_t upper = upper_exponent(counts, counted);
  const std::uint32_t scale_end = 2 * std::min(upper + 4, 256u);
  std::uint32_t scale = 2 * upper;
  std::int32_t least = cost_of(counts, scale % 2, flip, scale / 2, counted);
  for (std::uint32_t other = scale + 1; other < scale_end; ++other) {
    const std::int32_t cost = cost_of(counts, other % 2, flip, other / 2, counted);
    if (cost < least) least = cost, scale = other;
  }
  Class best{static_cast<std::uint8_t>(scale % 2), static_cast<std::uint8_t>(flip),
             static_cast<std::uint8_t>(scale / 2)};
  const std::uint32_t last = std::min(scale + 1, 511u);
  for (std::uint32_t near = scale > 0 ? scale - 1 : 0; near <= last; ++near) {
    for (std::uint32_t table = 2 + near % 2; table < kTables; table += 2) {
      const std::int32_t cost = cost_of(counts, table, flip, near / 2, counted);
      if (cost < least) {
        least = cost;
        best.table = static_cast<std::uint8_t>(table);
        best.top = static_cast<std::uint8_t>(near / 2);
      }
    }
  }
  return best;
}

}  // namespace kvs
