// Arithmetic of sizes, for host and device.
#pragma once

#include <cstdint>

#include "../rans.h"

namespace kvs {

KVS_HOST_DEVICE std::uint64_t round_up(std::uint64_t value, std::uint64_t to) {
  return (value + to - 1) / to * to;
}

}  // namespace kvs
