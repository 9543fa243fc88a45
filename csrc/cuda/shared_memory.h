// Shared memory by 32-bit addresses: an address is one register, and its bits can be put together. A pointer
// is two, and cannot.
#pragma once

#include "simt.h"

namespace kvs {

#ifdef __CUDACC__

KVS_DEVICE std::uint32_t shared_address() {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(simt::shared_memory()));
}

KVS_DEVICE std::uint32_t load_shared_8(std::uint32_t address) {
  std::uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// Aligned to 2 bytes.
KVS_DEVICE std::uint32_t load_shared_16(std::uint32_t address) {
  std::uint32_t value;
  asm volatile("{ .reg .u16 half; ld.shared.u16 half, [%1]; cvt.u32.u16 %0, half; }"
               : "=r"(value)
               : "r"(address));
  return value;
}

// Aligned to 4 bytes.
KVS_DEVICE std::uint32_t load_shared_32(std::uint32_t address) {
  std::uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// Aligned to 8 bytes.
KVS_DEVICE void load_shared_64(std::uint32_t address, std::uint32_t& first, std::uint32_t& second) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(address));
}

KVS_DEVICE void store_shared_8(std::uint32_t address, std::uint32_t value) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

KVS_DEVICE void store_shared_32(std::uint32_t address, std::uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

#else

// Not 0, as on most GPUs: 1,024 bytes are the system's.
inline std::uint32_t shared_address() { return 1024; }

template <typename Value>
Value* at_shared(std::uint32_t address) {
  return reinterpret_cast<Value*>(simt::shared_memory() + (address - shared_address()));
}

inline std::uint32_t load_shared_8(std::uint32_t address) { return *at_shared<const std::uint8_t>(address); }
inline std::uint32_t load_shared_16(std::uint32_t address) {
  return *at_shared<const std::uint16_t>(address);
}
inline std::uint32_t load_shared_32(std::uint32_t address) {
  return *at_shared<const std::uint32_t>(address);
}

inline void load_shared_64(std::uint32_t address, std::uint32_t& first, std::uint32_t& second) {
  first = at_shared<const std::uint32_t>(address)[0];
  second = at_shared<const std::uint32_t>(address)[1];
}

inline void store_shared_8(std::uint32_t address, std::uint32_t value) {
  *at_shared<std::uint8_t>(address) = static_cast<std::uint8_t>(value);
}
inline void store_shared_32(std::uint32_t address, std::uint32_t value) {
  *at_shared<std::uint32_t>(address) = value;
}

#endif

}  // namespace kvs
