#include "api.h"
#include "launch.h"

extern "C" int kvs_limit_multiprocessors(std::uint32_t most) {
  kvs::most_multiprocessors = most;
  return 0;
}

extern "C" int kvs_probe() {
  for (const auto prepare : kvs::all_kernels()) {
    if (const int error = prepare(); error != 0) return error;
  }
  return 0;
}

extern "C" std::uint32_t kvs_count_kernels() { return static_cast<std::uint32_t>(kvs::all_kernels().size()); }

#ifndef __CUDACC__
// For tests: another device's shared memory.
extern "C" KVS_EXPORT int kvs_emulator_limit_shared(std::uint32_t bytes) {
  kvs::most_shared_memory = bytes;
  return 0;
}

// For tests of what is queued: launches on streams go to `defer` (null: they run at once).
extern "C" KVS_EXPORT void kvs_emulator_defer(kvs::Defer defer) { kvs::defer = defer; }
#endif
