// Reads and writes of device memory through addresses that came as numbers: the compiler cannot see that they
// are not of shared memory, and would let each access find out.
#pragma once

#include "simt.h"

namespace kvs {

#ifdef __CUDACC__

// What nobody writes while the kernel runs.
template <typename Value>
KVS_DEVICE Value load_constant(const Value* from) {
  return __ldg(from);
}

// What this kernel does not read again.
template <typename Value>
KVS_DEVICE void store_away(Value* to, Value value) {
  __stcg(to, value);
}

#else

template <typename Value>
Value load_constant(const Value* from) {
  return *from;
}

template <typename Value>
void store_away(Value* to, Value value) {
  *to = value;
}

#endif

}  // namespace kvs
