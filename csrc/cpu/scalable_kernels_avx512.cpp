// The kernels compiled for AVX-512.

#if defined(__x86_64__)
#define KVS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define KVS_TARGET
#endif
#include "scalable_loops.h"

namespace kvs {

const ScalableKernels kAvx512Kernels = kKernels;

}  // namespace kvs
