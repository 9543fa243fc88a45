// Starting kernels: the same call queues one on a GPU's stream and runs one on the host.
//
// A kernel is a functor (simt.h) that also says how it is compiled:
//   static constexpr std::uint32_t kThreads;   // threads of its largest block
//   static constexpr std::uint32_t kResident;  // blocks that a multiprocessor shall hold at once: with
//   kThreads, what
//                                              // bounds its registers (65536 / (kThreads * kResident))
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "simt.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
#include <memory>
#endif

// Constants that kernels index at run time.
#ifdef __CUDACC__
#define KVS_DEVICE_TABLE static __device__ constexpr
#else
#define KVS_DEVICE_TABLE static constexpr
#endif

// Loops over arrays that shall be registers.
#ifdef __CUDACC__
#define KVS_UNROLL _Pragma("unroll")
#else
#define KVS_UNROLL
#endif

namespace kvs {

inline constexpr std::size_t kSharedWithoutAsking = 48 * 1024;  // of a block; more must be asked for

// Makes a kernel ready to be launched on the current device. Answers 0 or a cudaError_t.
template <typename Kernel>
int prepare();

// `prepare` of each kernel that the library launches anywhere, complete once the library is loaded.
inline std::vector<int (*)()>& all_kernels() {
  static std::vector<int (*)()> kernels;
  return kernels;
}

template <typename Kernel>
inline const bool is_known = (all_kernels().push_back(prepare<Kernel>), true);

#ifdef __CUDACC__

// The arguments stay in constant memory: arrays among them may be indexed by a number known at run time only.
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResident)
    run_kernel(const __grid_constant__ Kernel kernel) {
  kernel();
}

// The most shared memory that a block on the current device may have. Answers 0 or a cudaError_t.
inline int find_shared_memory(std::uint32_t* bytes) {
  int device = 0, found = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const cudaError_t error = cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = static_cast<std::uint32_t>(found);
  return error;
}

// Lets blocks of a kernel have the most shared memory that the current device gives one: once for each
// device, since the call may wait for copies that are under way, and always the same, since launches by other
// threads may rely on it. Answers 0 or a cudaError_t.
template <typename Kernel>
int raise_shared_memory() {
  static std::atomic<std::uint64_t> raised = 0;  // a bit for each of the first devices
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::uint64_t own = device < 64 ? std::uint64_t{1} << device : 0;
  if ((raised & own) != 0) return cudaSuccess;
  std::uint32_t most = 0;
  if (const int error = find_shared_memory(&most)) return error;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(&run_kernel<Kernel>),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
  if (error == cudaSuccess) raised |= own;
  return error;
}

// Loads a kernel, which CUDA does at its first use else, where it may wait for what the device does (CUDA
// programming guide, "Lazy Loading"): then that is not in an engine's step.
template <typename Kernel>
int prepare() {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(&run_kernel<Kernel>));
  if (error != cudaSuccess || found.sharedSizeBytes != 0) return error;
  return raise_shared_memory<Kernel>();
}

// Queues `kernel` in `blocks` blocks of `threads` threads; no blocks are no launch. Answers 0 or a
// cudaError_t of this call: errors that others left behind are neither reported nor cleared.
template <typename Kernel>
int launch(const Kernel& kernel, std::uint32_t blocks, std::uint32_t threads, std::size_t shared_bytes,
           void* stream) {
  [[maybe_unused]] const bool& known = is_known<Kernel>;
  if (blocks == 0) return cudaSuccess;
  const void* entry = reinterpret_cast<const void*>(&run_kernel<Kernel>);
  if (shared_bytes > kSharedWithoutAsking) {
    if (const int error = raise_shared_memory<Kernel>()) return error;
  }
  void* arguments[] = {const_cast<Kernel*>(&kernel)};
  return cudaLaunchKernel(entry, dim3(blocks), dim3(threads), arguments, shared_bytes,
                          static_cast<cudaStream_t>(stream));
}

// How many multiprocessors the current device has. Answers 0 or a cudaError_t.
inline int count_multiprocessors(std::uint32_t* count) {
  int device = 0, found = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const cudaError_t error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  *count = static_cast<std::uint32_t>(found);
  return error;
}

#else

// Of the emulated device, as 9.0 has it; kvs_emulator_limit_shared makes it another.
inline std::atomic<std::uint32_t> most_shared_memory = 227 * 1024;

inline int find_shared_memory(std::uint32_t* bytes) {
  *bytes = most_shared_memory;
  return 0;
}

// Takes over a launch on a stream (not the default one), to call `end(launch, true)` when the stream has come
// to it, which runs the kernel, or `end(launch, false)`, which forgets it; once.
using Defer = void (*)(void* stream, void* launch, void (*end)(void* launch, bool run));

// What kvs_emulator_defer was told; null: launches run at once.
inline std::atomic<Defer> defer = nullptr;

template <typename Kernel>
struct Launch {
  Kernel kernel;
  std::uint32_t blocks, threads;
  std::size_t shared_bytes;

  static void end(void* launch, bool run) {
    const std::unique_ptr<Launch> own{static_cast<Launch*>(launch)};
    if (run) emulator::launch(own->kernel, own->blocks, own->threads, own->shared_bytes);
  }
};

template <typename Kernel>
int prepare() {
  return 0;
}

template <typename Kernel>
int launch(const Kernel& kernel, std::uint32_t blocks, std::uint32_t threads, std::size_t shared_bytes,
           void* stream) {
  [[maybe_unused]] const bool& known = is_known<Kernel>;
  if (threads > Kernel::kThreads) {
    std::fprintf(stderr, "kernel emulator: %u threads in a block that is compiled for %u\n", threads,
                 Kernel::kThreads);
    std::abort();
  }
  if (shared_bytes > most_shared_memory) return 1;  // cudaErrorInvalidValue, as cudaFuncSetAttribute has it
  const Defer later = defer;
  if (later != nullptr && stream != nullptr) {
    later(stream, new Launch<Kernel>{kernel, blocks, threads, shared_bytes}, Launch<Kernel>::end);
  } else {
    emulator::launch(kernel, blocks, threads, shared_bytes);
  }
  return 0;
}

// Few, so that small tests too have more work than blocks.
inline int count_multiprocessors(std::uint32_t* count) {
  *count = 2;
  return 0;
}

#endif

// What kvs_limit_multiprocessors was told; 0: no limit.
inline std::atomic<std::uint32_t> most_multiprocessors = 0;

// A number that stays in a register: without this, compilers compute it again where it is used.
KVS_DEVICE std::uint32_t keep(std::uint32_t number) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// How many multiprocessors a persistent grid may fill. Answers 0 or a cudaError_t.
inline int allow_multiprocessors(std::uint32_t* count) {
  const int error = count_multiprocessors(count);
  const std::uint32_t most = most_multiprocessors;
  if (most != 0) *count = std::min(*count, most);
  return error;
}

// A persistent grid: its warps take pieces of work in turn, each piece one warp's.
struct Grid {
  std::uint32_t blocks, threads;
};

// Spreads `pieces` over all multiprocessors before it fills any: a warp that computes alone is faster than
// one of many. Blocks have between `least_warps` (what a block builds for itself must not take long) and
// kThreads / 32 warps, and no multiprocessor more than kResident of them.
template <typename Kernel>
Grid spread(std::uint32_t pieces, std::uint32_t multiprocessors, std::uint32_t least_warps) {
  const auto parts = [](std::uint32_t whole, std::uint32_t part) {
    return whole / part + (whole % part != 0);
  };
  const std::uint32_t warps =
      std::clamp(parts(pieces, multiprocessors), least_warps, Kernel::kThreads / simt::kWarp);
  const std::uint32_t blocks = std::min(parts(pieces, warps), multiprocessors * Kernel::kResident);
  return {blocks, warps * simt::kWarp};
}

}  // namespace kvs
