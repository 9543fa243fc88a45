// Table sets for encoding on the device. Host code.

#include <cstring>

#include "api.h"
#include "scalable_encode.h"

namespace {

using namespace kvs;

std::uint64_t pack_push(std::uint32_t frequency, std::uint32_t start) {
  const Push push = make_push(frequency, start);
  return push.meta | std::uint64_t{push.reciprocal} << 32;
}

bool pack_base(PackedPushes& to, std::uint32_t k, const std::uint16_t* frequencies) {
  std::uint32_t start = 0;
  for (std::uint32_t symbol = 0; symbol < kBaseSymbols; ++symbol) {
    const std::uint32_t frequency = frequencies[symbol];
    if (frequency >= kSlots || start + frequency > kSlots) return false;
    to.base[k][symbol] = pack_push(frequency, start);
    start += frequency;
  }
  if (start != kSlots || frequencies[kBaseEscape] == 0) return false;
  const std::uint64_t escape = to.base[k][kBaseEscape] | PackedPushes::kEscapes;
  for (std::uint32_t symbol = 0; symbol < kBaseSymbols; ++symbol) {
    if (symbol == kBaseEscape || frequencies[symbol] == 0) to.base[k][symbol] = escape;
  }
  return true;
}

bool pack_refine(PackedPushes& to, unsigned level, std::uint32_t k, const std::uint16_t* pairs) {
  for (std::uint32_t context = 0; context < kContexts; ++context) {
    const std::uint32_t c1 = pairs[2 * context], c2 = pairs[2 * context + 1];
    if (!(0 < c1 && c1 < c2 && c2 < kSlots)) return false;
    std::uint64_t* of = to.ternary[level - 1][k] + 3 * context;
    of[0] = pack_push(c1, 0);
    of[1] = pack_push(c2 - c1, c1);
    of[2] = pack_push(kSlots - c2, c2);
  }
  return true;
}

}  // namespace

std::size_t kvs_scalable_encode_tables_bytes() { return sizeof(PackedPushes); }

int kvs_scalable_pack_encode_tables(const std::uint8_t* first, const std::uint16_t* base,
                                    const std::uint16_t* refine, const double* borders, const double* gains,
                                    std::uint8_t* packed) {
  constexpr std::int32_t kMostNumber = 9 * kMostBase + 4;
  constexpr int kRefused = static_cast<int>(Fault::kBadPayload);
  static PackedPushes const kNone{};
  auto& to = *reinterpret_cast<PackedPushes*>(packed);
  to = kNone;
  if (!(kClasses >= first[0] && first[0] >= first[1] && first[1] >= first[2] && first[2] >= 1))
    return kRefused;
  std::memcpy(to.borders, borders, sizeof to.borders);
  std::memcpy(to.gains, gains, sizeof to.gains);
  for (std::int32_t number = -kMostNumber; number <= kMostNumber; ++number) {
    to.symbols[static_cast<std::uint16_t>(number)] = static_cast<std::uint16_t>(pack_symbols(number));
  }
  for (unsigned level = 0; level < kLevels; ++level) {
    to.first[level] = first[level];
    for (std::uint32_t k = first[level]; k < kClasses; ++k) {
      const bool sound =
          level == 0 ? pack_base(to, k, base + k * kBaseSymbols)
                     : pack_refine(to, level, k, refine + ((level - 1) * kClasses + k) * kContexts * 2);
      if (!sound) return kRefused;
    }
  }
  return 0;
}
