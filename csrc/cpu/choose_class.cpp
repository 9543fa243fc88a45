#include "choose_class.h"

#include "../class_search.h"

namespace kvs {
namespace {

constexpr std::uint64_t kMostTokens = 32767;  // counts must fit a signed 16-bit number

// Costs as cost_of adds them up: a sign's steps side by side.
struct Costs {
  alignas(32) std::int16_t saving[kTables][kSymbols];
  std::int32_t escape[kTables];

  constexpr Costs() : saving(), escape() {
    for (std::uint32_t table = 0; table < kTables; ++table) {
      escape[table] = class_cost::escape(table);
      for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol)
        saving[table][symbol] = class_cost::saving(table, symbol);
    }
  }
};
constexpr Costs kCosts;

// How often each half octave occurs, the largest first, for each sign; room before and after for any top.
struct Counts {
  static constexpr std::uint32_t kRoom = 16;
  static constexpr std::uint32_t kSize = 512 + 3 * kRoom;
  std::int16_t of[2][kSize];

  // Counts of the steps below `top`, a run of 32.
  const std::int16_t* below(std::uint32_t sign, std::uint32_t top) const {
    return of[sign] + kRoom + 510 - 2 * top;
  }

  // Sets those of the exponents from `least` to `most` to 0.
  void clear(std::uint32_t least, std::uint32_t most) {
    for (auto& sign : of) {
      std::fill(sign + kRoom + 510 - 2 * most, sign + kRoom + 512 - 2 * least, std::int16_t{0});
    }
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

// What a glance at a lane tells: its largest and its least magnitude, and how many of its values are
// negative.
struct Glance {
  std::int16_t largest[kLanes] = {};
  std::int16_t least[kLanes];
  std::int16_t negative[kLanes] = {};

  Glance() { std::fill_n(least, kLanes, std::int16_t{0x7FFF}); }
};

Glance glance_at(const std::uint16_t* values, std::int32_t tokens) {
  Glance seen;
  for (const std::uint16_t* end = values + static_cast<std::size_t>(tokens) * kLanes; values != end;
       values += kLanes) {
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      const auto magnitude = static_cast<std::int16_t>(values[lane] & 0x7FFF);
      seen.largest[lane] = std::max(seen.largest[lane], magnitude);
      seen.least[lane] = std::min(seen.least[lane], magnitude);
      seen.negative[lane] = static_cast<std::int16_t>(seen.negative[lane] + (values[lane] >> 15));
    }
  }
  return seen;
}

// The largest exponent that at most 1 in 32 tokens exceeds, `largest` or below: an outlier must not set the
// scale.
std::uint32_t upper_exponent(const Counts& counts, std::uint32_t largest, std::int32_t tokens) {
  std::int32_t seen = 0;
  for (std::uint32_t exponent = largest;; --exponent) {
    for (const auto& of : counts.of) {
      seen += of[Counts::kRoom + 510 - 2 * exponent] + of[Counts::kRoom + 511 - 2 * exponent];
    }
    if (seen * 32 > tokens || exponent == 0) return exponent;
  }
}

Class choose_class(const Counts& counts, bool flip, std::uint32_t upper, std::int32_t tokens) {
  const auto cost = [&counts, flip, tokens](std::uint32_t table, std::uint32_t top) {
    return cost_of(counts, table, flip, top, tokens);
  };
  ClassSearch search(cost);
  search.run(upper);
  return {static_cast<std::uint8_t>(search.table()), flip, static_cast<std::uint8_t>(search.top())};
}

// Eight neighbouring lanes are counted side by side: counting one value after the other in one place would
// wait for each store.
constexpr std::uint32_t kSideBySide = 8;
constexpr std::uint32_t kBatch = 32;  // tokens

struct SideBySide {
  Counts lanes[kSideBySide] = {};  // all 0 before and after use

  // Where the values of `tokens` tokens are counted, in numbers from the first on.
  static void place(const std::uint16_t* values, std::uint32_t tokens, std::uint16_t* places) {
    for (const std::uint16_t* end = values + tokens * kLanes; values != end;
         values += kLanes, places += kSideBySide) {
      for (std::uint32_t lane = 0; lane < kSideBySide; ++lane) {
        const auto negative = static_cast<std::uint16_t>((values[lane] >> 15) * Counts::kSize);
        const auto half_octave = static_cast<std::uint16_t>(values[lane] >> kLowBits & 511);
        const auto most = static_cast<std::uint16_t>(lane * 2 * Counts::kSize + Counts::kRoom + 511);
        places[lane] = static_cast<std::uint16_t>(most + negative - half_octave);
      }
    }
  }

  void count(const std::uint16_t* values, std::uint32_t tokens) {
    std::int16_t* counts = lanes[0].of[0];
    alignas(16) std::uint16_t places[kBatch * kSideBySide];
    for (std::uint32_t done = 0; done < tokens; done += kBatch) {
      const std::uint32_t batch = std::min(kBatch, tokens - done);
      place(values + done * kLanes, batch, places);
      for (std::uint32_t i = 0; i < batch * kSideBySide; i += kSideBySide) {
        for (std::uint32_t lane = 0; lane < kSideBySide; ++lane) ++counts[places[i + lane]];
      }
    }
  }
};

}  // namespace

void choose_classes(const std::uint16_t* values, std::uint32_t lanes, std::uint64_t tokens, Class* chosen) {
  const auto counted = static_cast<std::int32_t>(std::min(tokens, kMostTokens));
  const Glance seen = glance_at(values, counted);
  SideBySide counts;
  for (std::uint32_t first = 0; first < lanes; first += kSideBySide) {
    counts.count(values + first, static_cast<std::uint32_t>(counted));
    for (std::uint32_t lane = first; lane < first + kSideBySide; ++lane) {
      Counts& of_lane = counts.lanes[lane - first];
      const std::uint32_t largest = static_cast<std::uint32_t>(seen.largest[lane]) >> 7;
      if (lane < lanes) {
        const std::uint32_t upper = upper_exponent(of_lane, largest, counted);
        chosen[lane] = choose_class(of_lane, 2 * seen.negative[lane] > counted, upper, counted);
      }
      of_lane.clear(static_cast<std::uint32_t>(seen.least[lane]) >> 7, largest);
    }
  }
}

}  // namespace kvs
