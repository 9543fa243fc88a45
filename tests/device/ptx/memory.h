// Addresses: where they lead, and whether the launch may go there.
#pragma once

#include "forms.h"

namespace ptx {

// The host's address of `bytes` at `address` of the instruction's space; stops where there is nothing, or
// where the address is not a multiple of `bytes`.
std::uint8_t* find_bytes(Warp& warp, const Instruction& i, std::uint32_t lane, std::uint64_t address,
                         std::uint32_t bytes, bool write);

// In shared memory, likewise.
std::uint8_t* find_shared(Warp& warp, std::uint32_t lane, std::uint64_t address, std::uint32_t bytes);

// In the memory of the device.
std::uint8_t* find_global(Warp& warp, const Instruction& i, std::uint32_t lane, std::uint64_t address,
                          std::uint32_t bytes, bool write);

}  // namespace ptx
