// The scalable fuzzer's input: which tables, a shape, classes, and the parts of a stream.
#pragma once

#include <array>
#include <memory>
#include <stdexcept>

#include "../scalable.h"
#include "fuzz_input.h"

namespace kvs::fuzz {

// The arrays that a table set is made of.
struct TableArrays {
  std::array<std::uint8_t, kLevels> first{};
  std::uint16_t base[kClasses][kBaseSymbols] = {};
  std::uint16_t refine[2][kClasses][kContexts][2] = {};
  float shift[kLevels][kClasses] = {};

  ScalableTables build() const { return ScalableTables({first.data(), base[0], refine[0][0][0], shift[0]}); }

  // Sound tables, unlike each other: `reach` of a class says how slowly frequencies fall from 0 on, and with
  // its top bit that there are 3 to 18 symbols alone (few are decoded in another way than many).
  void fill(std::span<const std::uint8_t> reach) {
    for (std::uint32_t k = 0; k < kClasses; ++k) {
      const std::uint32_t of_class = reach[k % reach.size()], slow = 1 + of_class % 64;
      const std::uint32_t symbols = of_class >> 7 ? 2 + of_class % 16 : kBaseEscape;
      std::uint32_t left = kSlots - symbols - 1;
      base[k][kBaseEscape] = 1;
      for (std::uint32_t step = 0; step < symbols; ++step) {
        const std::uint32_t symbol = step % 2 == 0 ? 127 + step / 2 : 127 - (step + 1) / 2;
        const std::uint32_t share = step + 1 < symbols ? left / (slow + 1) : left;
        base[k][symbol] = static_cast<std::uint16_t>(1 + share);
        left -= share;
      }
      for (std::uint32_t context = 0; context < kContexts; ++context) {
        for (auto& level : refine) {
          level[k][context][0] = static_cast<std::uint16_t>(1 + (slow * 31 + context * 300) % 2000);
          level[k][context][1] = static_cast<std::uint16_t>(2100 + slow * 29 + context * 10);
        }
      }
      for (auto& level : shift) level[k] = static_cast<float>(slow) / 128;
    }
  }
};

// Two fixed sets, and one for each other number: made of bytes of the input, of which some may damage it.
inline std::unique_ptr<const ScalableTables> take_tables(Input& input, std::uint32_t which) {
  static constexpr std::uint8_t kReach[][4] = {{128 + 1, 128 + 3, 9, 128 + 60}, {60, 128 + 2, 0, 17}};
  static constexpr std::array<std::uint8_t, kLevels> kFirst[] = {{40, 36, 30}, {46, 46, 1}};
  const auto arrays = std::make_unique<TableArrays>();
  if (which < 2) {
    arrays->first = kFirst[which];
    arrays->fill(kReach[which]);
    return std::make_unique<const ScalableTables>(arrays->build());
  }
  for (auto& first : arrays->first) first = static_cast<std::uint8_t>(input.take_byte());
  arrays->first[0] |= 32;  // sets of 48 classes take long to build
  const std::vector<std::uint8_t> reach{static_cast<std::uint8_t>(input.take_byte()),
                                        static_cast<std::uint8_t>(input.take_byte())};
  arrays->fill(reach);
  for (std::uint32_t changes = input.take_byte() % 4; changes > 0; --changes) {
    const std::uint32_t place = input.take_short(), value = input.take_short();
    const std::uint32_t k = 32 + place % 16, symbol = place / 16 % 256;
    if (place >> 15) {
      arrays->refine[symbol % 2][k][symbol / 2 % kContexts][symbol / 8 % 2] =
          static_cast<std::uint16_t>(value);
    } else {  // the sum stays what it is
      const auto moved = static_cast<std::uint16_t>(value & 31);
      arrays->base[k][symbol] = static_cast<std::uint16_t>(arrays->base[k][symbol] + moved);
      arrays->base[k][127] = static_cast<std::uint16_t>(arrays->base[k][127] - moved);
    }
  }
  try {
    return std::make_unique<const ScalableTables>(arrays->build());
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}

struct ScalableInput {
  std::uint32_t tokens, count, object_levels, levels;
  std::vector<std::uint8_t> classes, states, words[kLevels], escapes;

  static ScalableInput take(Input& input) {
    ScalableInput stream{};
    stream.tokens = 1 + input.take_byte() % 64;
    stream.count = 1 + input.take_byte();
    stream.object_levels = 1 + input.take_byte() % kLevels;
    stream.levels = 1 + input.take_byte() % stream.object_levels;
    stream.classes = input.take_bytes(stream.count);
    stream.classes.resize(stream.count);
    stream.states = input.take_bytes(input.take_short());
    for (auto& words : stream.words) words = input.take_bytes(input.take_short());
    stream.escapes = input.take_rest();
    return stream;
  }

  void put(Output& output) const {
    output.put_byte(tokens - 1).put_byte(count - 1).put_byte(object_levels - 1).put_byte(levels - 1);
    output.put_bytes(classes).put_short(static_cast<std::uint32_t>(states.size())).put_bytes(states);
    for (const auto& level : words) {
      output.put_short(static_cast<std::uint32_t>(level.size())).put_bytes(level);
    }
    output.put_bytes(escapes);
  }
};

}  // namespace kvs::fuzz
