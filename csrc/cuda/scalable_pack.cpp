// Table sets for the device. Host code.

#include <cstring>

#include "api.h"
#include "scalable_tables_packed.h"

namespace {

using namespace kvs;

bool pack_base(PackedTables& to, std::uint32_t k, const std::uint16_t* frequencies) {
  std::uint32_t start = 0;
  for (std::uint32_t symbol = 0; symbol < kBaseSymbols; ++symbol) {
    const std::uint32_t frequency = frequencies[symbol];
    if (frequency >= kSlots || start + frequency > kSlots) return false;
    to.symbols[k][symbol] = pack_base_entry(symbol, frequency, start & (kSlots - 1));
    std::memset(to.slots[k] + start, static_cast<int>(symbol), frequency);
    start += frequency;
  }
  return start == kSlots && frequencies[kBaseEscape] >= 1;
}

bool pack_refine(PackedTables& to, unsigned level, std::uint32_t k, const std::uint16_t* pairs) {
  for (std::uint32_t context = 0; context < kContexts; ++context) {
    const std::uint32_t c1 = pairs[2 * context], c2 = pairs[2 * context + 1];
    if (!(0 < c1 && c1 < c2 && c2 < kSlots)) return false;
    to.thresholds[level - 1][k][context] = pack_thresholds(c1, c2);
  }
  return true;
}

}  // namespace

std::size_t kvs_scalable_tables_bytes() { return sizeof(PackedTables); }

int kvs_scalable_pack_tables(const std::uint8_t* first, const std::uint16_t* base,
                             const std::uint16_t* refine, const float* shift, std::uint8_t* packed) {
  constexpr int kRefused = static_cast<int>(Fault::kBadPayload);
  static PackedTables const kNone{};
  auto& to = *reinterpret_cast<PackedTables*>(packed);
  to = kNone;
  if (!(kClasses >= first[0] && first[0] >= first[1] && first[1] >= first[2] && first[2] >= 1))
    return kRefused;
  for (unsigned level = 0; level < kLevels; ++level) {
    to.first[level] = first[level];
    for (std::uint32_t k = first[level]; k < kClasses; ++k) {
      const float value = shift[level * kClasses + k];
      if (!(value >= 0 && value <= 0.5f)) return kRefused;
      to.shift[level][k] = value;
      const bool sound =
          level == 0 ? pack_base(to, k, base + k * kBaseSymbols)
                     : pack_refine(to, level, k, refine + ((level - 1) * kClasses + k) * kContexts * 2);
      if (!sound) return kRefused;
    }
  }
  return 0;
}
