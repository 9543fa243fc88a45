// The kernels as the compiler's baseline has them, and the choice between them and their twins.

#define KVS_TARGET
#include "scalable_loops.h"

namespace kvs {

const ScalableKernels kPortableKernels = kKernels;

const ScalableKernels& scalable_kernels(Implementation how) {
  switch (how) {
    case Implementation::kAvx512:
      return kAvx512Kernels;
    case Implementation::kAvx2:
      return kAvx2Kernels;
    default:
      return kPortableKernels;
  }
}

}  // namespace kvs
