// What the emulation has beside the GPU library's functions.
#include "emulator.h"

#include "api.h"

// The order of turns in launches from now on (emulator.h, order_seed).
extern "C" KVS_EXPORT int kvs_emulator_order(std::uint32_t seed) {
  kvs::emulator::order_seed = seed;
  return 0;
}
