// Where the numbers of a stream of codec 3 lie in scratch, for host and device.
//
// They are 16 bits, [block of 32 components][octet of tokens][component][8 tokens], the last octet filled up
// with zeros. A lane moves 8 of its component's numbers with one access of 16 bytes, a warp 512 in a row; and
// 8 tokens of one component are a row of what the tensor cores' loads take.
#pragma once

#include "../scalable_steps.h"
#include "api.h"

namespace kvs {

inline constexpr std::uint32_t kOctet = 8;
inline constexpr std::uint32_t kRawStream = 0xFFFF;

KVS_HOST_DEVICE std::uint64_t padded_tokens(std::uint32_t tokens) {
  return (std::uint64_t{tokens} + kOctet - 1) / kOctet * kOctet;
}

// Where the numbers of component `c` of the coding order begin that belong to the octet of `token`.
KVS_HOST_DEVICE std::uint64_t place_of_octet(std::uint32_t c, std::uint32_t token, std::uint32_t tokens) {
  return (c / kLanes * padded_tokens(tokens) + token / kOctet * kOctet) * kLanes + c % kLanes * kOctet;
}

// Eight tokens' numbers of a component, two to a word.
struct alignas(16) Octet {
  std::uint32_t pairs[kOctet / 2];
};

KVS_HOST_DEVICE std::int32_t number_in(std::uint32_t pair, std::uint32_t which) {
  return static_cast<std::int16_t>(pair >> 16 * which);
}

// Whether tensor cores multiply for a stream: its matrix is of float16, and its rows can be copied by 16
// bytes.
KVS_HOST_DEVICE bool takes_tiles(const KvsScalableJob& job) {
  return job.span > 1 && job.matrix_bytes == 2 && job.dim % 8 == 0 && job.matrix % 16 == 0;
}

}  // namespace kvs
