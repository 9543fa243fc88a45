// The kernels compiled for AVX2.

#if defined(__x86_64__)
#define KVS_TARGET __attribute__((target("avx2")))
#else
#define KVS_TARGET
#endif
#include "scalable_loops.h"

namespace kvs {

const ScalableKernels kAvx2Kernels = kKernels;

}  // namespace kvs
