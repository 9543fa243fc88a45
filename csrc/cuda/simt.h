// What kernels say to the machine they run on: a GPU, or the emulator (emulator.h), which runs the same
// source on the host, so that every golden payload goes through the kernels where there is no GPU.
//
// The surprises first:
// - Every collective takes part of all 32 lanes of a warp, and of all threads of a block where it says so. A
// kernel
//   whose lanes part ways before one is wrong; the emulator says so and stops.
// - Shared memory is dynamic alone: one piece, cut up by the kernel.
// - Kernels are functors with `operator()` const, KVS_DEVICE, whose members are their arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define KVS_DEVICE __device__ inline
#else
#define KVS_DEVICE inline
#include "emulator.h"
#endif

namespace kvs::simt {

inline constexpr std::uint32_t kWarp = 32;

#ifdef __CUDACC__

KVS_DEVICE std::uint32_t thread() { return threadIdx.x; }
KVS_DEVICE std::uint32_t threads() { return blockDim.x; }
KVS_DEVICE std::uint32_t block() { return blockIdx.x; }
KVS_DEVICE std::uint32_t blocks() { return gridDim.x; }

// Bytes, aligned to 16.
KVS_DEVICE std::uint8_t* shared_memory() {
  extern __shared__ uint4 kvs_shared_memory[];
  return reinterpret_cast<std::uint8_t*>(kvs_shared_memory);
}

KVS_DEVICE std::uint32_t ballot(bool yes) { return __ballot_sync(0xFFFFFFFFu, yes); }
KVS_DEVICE std::uint32_t shuffle(std::uint32_t value, std::uint32_t lane) {
  return __shfl_sync(0xFFFFFFFFu, value, static_cast<int>(lane));
}
KVS_DEVICE std::uint32_t shuffle_xor(std::uint32_t value, std::uint32_t mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, static_cast<int>(mask));
}
KVS_DEVICE void sync_warp() { __syncwarp(); }
KVS_DEVICE void sync_block() { __syncthreads(); }
KVS_DEVICE std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) { return atomicAdd(to, value); }
KVS_DEVICE std::uint32_t atomic_max(std::uint32_t* to, std::uint32_t value) { return atomicMax(to, value); }
KVS_DEVICE std::uint32_t count_bits(std::uint32_t bits) { return static_cast<std::uint32_t>(__popc(bits)); }

#else

inline std::uint32_t thread() { return emulator::current().thread; }
inline std::uint32_t threads() { return emulator::current_block().threads; }
inline std::uint32_t block() { return emulator::current_block().number; }
inline std::uint32_t blocks() { return emulator::current_block().blocks; }
inline std::uint8_t* shared_memory() { return emulator::current_block().shared; }

inline std::uint32_t ballot(bool yes) {
  return emulator::meet_warp(emulator::Meeting::kBallot, yes ? 1 : 0,
                             [](const std::uint32_t* given, std::uint32_t) {
                               std::uint32_t found = 0;
                               for (std::uint32_t i = 0; i < kWarp; ++i) found |= given[i] << i;
                               return found;
                             });
}
inline std::uint32_t shuffle(std::uint32_t value, std::uint32_t lane) {
  return emulator::meet_warp(
      emulator::Meeting::kShuffle, value,
      [lane](const std::uint32_t* given, std::uint32_t) { return given[lane & (kWarp - 1)]; });
}
inline std::uint32_t shuffle_xor(std::uint32_t value, std::uint32_t mask) {
  return emulator::meet_warp(
      emulator::Meeting::kShuffleXor, value,
      [mask](const std::uint32_t* given, std::uint32_t own) { return given[(own ^ mask) & (kWarp - 1)]; });
}
inline void sync_warp() {
  emulator::meet_warp(emulator::Meeting::kSyncWarp, 0,
                      [](const std::uint32_t*, std::uint32_t) { return 0u; });
}
inline void sync_block() { emulator::meet_block(); }
inline std::uint32_t atomic_add(std::uint32_t* to, std::uint32_t value) {
  emulator::races::access_atomically(to, sizeof *to);
  const emulator::races::Pause pause;
  const std::uint32_t before = *to;
  *to += value;
  return before;
}
inline std::uint32_t atomic_max(std::uint32_t* to, std::uint32_t value) {
  emulator::races::access_atomically(to, sizeof *to);
  const emulator::races::Pause pause;
  const std::uint32_t before = *to;
  if (value > before) *to = value;
  return before;
}
inline std::uint32_t count_bits(std::uint32_t bits) {
  return static_cast<std::uint32_t>(__builtin_popcount(bits));
}

#endif

KVS_DEVICE std::uint32_t lane() { return thread() & (kWarp - 1); }
KVS_DEVICE std::uint32_t warp() { return thread() / kWarp; }
KVS_DEVICE std::uint32_t warps() { return threads() / kWarp; }
// The lanes before this one.
KVS_DEVICE std::uint32_t lanes_before() { return (1u << lane()) - 1; }

}  // namespace kvs::simt
