// Constants of the lossless payload. docs/format-lossless.md is the text; these are its numbers.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace kvs {

static_assert(std::endian::native == std::endian::little,
              "payloads are read as they lie: little-endian hosts only");

// Why a payload was refused: the numbers of kvstore_s3.errors.BitstreamFault, pinned.
enum class Fault : int { kNone = 0, kTruncated = 1, kBadPayload = 13 };

inline constexpr std::uint32_t kLanes = 32;     // components coded side by side, each in its own rANS state
inline constexpr std::uint32_t kSlotBits = 12;  // frequencies of a table sum to 1 << kSlotBits
inline constexpr std::uint32_t kSlots = 1u << kSlotBits;
inline constexpr std::uint32_t kStateMin = 1u << 15;  // states lie in [kStateMin, kStateMin << 16): 31 bits
inline constexpr std::uint32_t kTables = 16;
inline constexpr std::uint32_t kSymbols = 64;     // sign * 32 + half octaves below the top
inline constexpr std::uint32_t kEscapeStep = 30;  // steps 30 and 31: the exponent follows in the escape bytes
inline constexpr std::uint32_t kLowBits = 6;      // mantissa bits that are stored as they are
inline constexpr std::uint32_t kClassBits = 5;    // table and flip; the bits of the top come on top

inline constexpr std::size_t kCodedHeader = 12;
inline constexpr std::size_t kRawHeader = 4;
inline constexpr std::uint8_t kModeRaw = 0;
inline constexpr std::uint8_t kModeCoded = 1;

// A head whose raw stream is longer than this is refused by the encoder, so that lengths fit 32 bits.
inline constexpr std::uint64_t kMaxHeadBytes = 1ull << 31;

}  // namespace kvs
