// What both digests read: bytes as numbers. Little-endian machines only.
#pragma once

#include <cstdint>
#include <cstring>

namespace digests {

using Octet = unsigned char;
using Word = std::uint32_t;
using Long = std::uint64_t;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

template <typename Number>
Number read(const Octet* from) {
  Number number;
  std::memcpy(&number, from, sizeof number);
  return number;
}

}  // namespace digests
