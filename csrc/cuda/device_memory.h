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

template <typename Value>
KVS_DEVICE void store_value(Value* to, Value value) {
  __builtin_assume(__isGlobal(to));
  *to = value;
}

#else

template <typename Value>
Value load_constant(const Value* from) {
  return *from;
}

template <typename Value>
void store_value(Value* to, Value value) {
  *to = value;
}

#endif

}  // namespace kvs
