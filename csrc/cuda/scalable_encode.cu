// Encoding streams of codec 3 from pages, in six kernels, seven with a matrix.
//
// 1. PrepareTokens, a warp for each token of a stream: out of the pages, K's rotation undone, the mean off.
// 2. FitStreams (uncalibrated), a block for each stream: outliers, steps and means.
//    MultiplyTokens (a matrix): y = A x by tensor cores.
// 3. ClassStreams, a block for each stream: numbers, what does not fit, classes, the order of coding.
// 4. OrderNumbers, a warp for each token: numbers in that order.
// 5. CodeLevels, a warp for each stream: rANS, from the last level to the first.
// 6. AssembleStreams: how long the streams are is known now, so they are put side by side into the payloads.
//
// Without a matrix all is in the host's order of operations, rounded as there: the same bytes. What the host
// takes from functions that differ between machines (logarithms, powers) comes from it as tables.
//
// Instructions a row (32 values), in the machine code for compute capability 9.0, three levels, uncalibrated:
// 30 and 34 for what is turned (1), 24 for each round of outliers, of which there is one (2), 45 (3), 33 (4),
// 37 for level 0 and 35 for each other (5), 2 (6): 243. 132 multiprocessors of 4 schedulers at 1.75 GHz do at
// most 3.8 G rows a second, 240 GB/s of bf16; at 0.65 of it 157. The base level alone: 173, and 220 GB/s.
//
// Bytes moved for each value of 2 bytes: x 6 (read 2, write 4), its fit 8, numbers 4 + 2, their order 4,
// levels 2 each, words some 2.4: 32, so that 3.35 TB/s of device memory carry 209 GB/s at most. Neither bound
// hides behind the other: 300 GB/s take fewer instructions in (3) and (5), and x read from pages anew instead
// of kept as floats.
//
// With a matrix, dimension n: (1) takes 90, for it goes through the pages twice, (2) instead of the fit for
// each 32 of n some 410 instructions for 64 rows of results, of which 64 are tensor products of 6 cycles
// each: n = 1,024 is 200 cycles of a scheduler a row, in all some 560 at 0.65: 0.1 TB/s.
//
// A stream is serial in (5): levels x blocks x tokens rows of some 50 cycles, 0.7 ms for 3 levels of 1,024
// components and 256 tokens however few streams there are; 4,224 streams at once (64 chunks of an 8B model)
// fill the GPU.
#include <algorithm>

#include "api.h"
#include "launch.h"
#include "scalable_encode.h"
#include "scalable_encode_assemble.h"
#include "scalable_encode_classes.h"
#include "scalable_encode_fit.h"
#include "scalable_encode_floats.h"
#include "scalable_encode_levels.h"
#include "scalable_encode_order.h"
#include "scalable_encode_prepare.h"
#include "scalable_encode_product.h"

namespace kvs {
namespace {

struct Call {
  const KvsScalableEncodeJob* jobs;
  const KvsScalableEncodeTotals& totals;
  const KvsPages& pages;
  std::uint32_t multiprocessors;
  void* stream;

  // Blocks take pieces in turn.
  template <typename Kernel>
  int spread_blocks(const Kernel& kernel, std::uint64_t pieces) const {
    const std::uint64_t most = std::uint64_t{multiprocessors} * Kernel::kResident;
    const auto blocks = static_cast<std::uint32_t>(std::min(pieces, most));
    return launch(kernel, blocks, Kernel::kThreads, Kernel::kSharedBytes, stream);
  }

  // Warps do.
  template <typename Kernel>
  int spread_warps(const Kernel& kernel, std::uint64_t pieces) const {
    const auto known = static_cast<std::uint32_t>(std::min<std::uint64_t>(pieces, 1u << 30));
    const Grid grid = spread<Kernel>(known, multiprocessors, 1);
    return launch(kernel, grid.blocks, grid.threads, Kernel::kSharedBytes, stream);
  }
};

template <typename Multiply>
int multiply(const Call& call, std::uint32_t item_bytes) {
  const KvsScalableEncodeTotals& totals = call.totals;
  const auto tiles = [](std::uint32_t extent) { return (extent + Multiply::kTile - 1) / Multiply::kTile; };
  const ProductTiles of_job{totals.products, tiles(totals.tokens), tiles(totals.components)};
  const Multiply kernel{call.jobs, totals.jobs, of_job, call.pages, item_bytes};
  return call.spread_blocks(kernel, totals.jobs * of_job.count());
}

template <DeviceDtype dtype>
int encode(const Call& call, std::uint32_t* lengths) {
  using Prepare = PrepareTokens<dtype>;
  constexpr std::uint32_t kItem = sizeof(typename Prepare::Bits);
  const KvsScalableEncodeTotals& totals = call.totals;
  const std::uint64_t rows = std::uint64_t{totals.jobs} * totals.tokens;
  const auto* tables = reinterpret_cast<const PackedPushes*>(totals.tables);
  const Prepare prepare{call.jobs, totals.jobs, totals.tokens, call.pages};
  if (const int error = call.spread_warps(prepare, rows); error != 0) return error;
  if (totals.uncalibrated != 0) {
    const FitStreams fit{call.jobs, totals.jobs, call.pages, kItem};
    if (const int error = call.spread_blocks(fit, totals.jobs); error != 0) return error;
  }
  if (totals.halves != 0) {
    if (const int error = multiply<MultiplyTokens>(call, kItem); error != 0) return error;
  }
  if (totals.floats != 0) {
    if (const int error = multiply<MultiplyFloats>(call, kItem); error != 0) return error;
  }
  const ClassStreams classes{call.jobs, totals.jobs, tables, call.pages, kItem};
  if (const int error = call.spread_blocks(classes, totals.jobs); error != 0) return error;
  const OrderNumbers order{call.jobs, totals.jobs, totals.tokens, tables, call.pages, kItem};
  if (const int error = call.spread_warps(order, rows); error != 0) return error;
  const CodeLevels code{call.jobs, totals.jobs, tables, call.pages, kItem, lengths};
  if (const int error = call.spread_warps(code, totals.jobs); error != 0) return error;
  const AssembleStreams assemble{call.jobs, totals.jobs, call.pages, kItem, lengths};
  return call.spread_blocks(assemble, std::uint64_t{totals.jobs} * AssembleStreams::kParts);
}

bool is_sound(const KvsScalableEncodeJob& job, std::uint32_t dim, std::uint32_t item_bytes) {
  constexpr std::uint32_t kMostNumbers = 1u << 16, kMostTokens = 1u << 16, kMostDim = 256;
  constexpr std::uint64_t kMostBytes = 1ull << 30;
  if (item_bytes != 2 && item_bytes != 4) return false;
  if (dim == 0 || dim > kMostDim || job.tokens == 0 || job.tokens > kMostTokens) return false;
  if (job.layers == 0 || job.levels == 0 || job.levels > kLevels) return false;
  if (job.streams == 0 || job.index >= job.streams || job.header_bytes % 4 != 0) return false;
  const bool all = job.calibrated != 0 && job.span == 3;
  if (job.heads == 0 || job.heads > kMostNumbers || (!all && job.heads != 1)) return false;
  const std::uint64_t numbers = std::uint64_t{job.heads} * job.layers * 2 * dim;
  if (numbers > kMostNumbers || numbers * job.tokens * item_bytes >= kMostBytes) return false;
  if (job.style > 2 || (job.style == 0) != (job.pairs == 0) || 2u * job.pairs > dim) return false;
  if (job.calibrated > 1 || job.span > (job.calibrated ? 3 : 0)) return false;
  const bool wide = job.span > 1;
  if (job.components == 0 || job.components > numbers || (!wide && job.components != numbers)) return false;
  return job.matrix_bytes == 0 ? job.span == 0
                               : job.span != 0 && (job.matrix_bytes == 2 || job.matrix_bytes == 4);
}

}  // namespace
}  // namespace kvs

extern "C" {

std::uint64_t kvs_scalable_encode_scratch(const KvsScalableEncodeJob* job, std::uint32_t dim,
                                          std::uint32_t item_bytes) {
  using namespace kvs;
  if (!is_sound(*job, dim, item_bytes)) return 0;
  const EncodeSize size = EncodeSize::of(*job, dim, item_bytes);
  return EncodeScratch(size, job->calibrated != 0, job->matrix_bytes != 0, 0).bytes();
}

std::uint64_t kvs_scalable_encode_room(const KvsScalableEncodeJob* job, std::uint32_t dim,
                                       std::uint32_t item_bytes) {
  const kvs::EncodeSize size = kvs::EncodeSize::of(*job, dim, item_bytes);
  return 4 * kvs::kLevels + size.raw_stream();
}

std::size_t kvs_scalable_encode_struct_bytes(int which) {
  return which == 0 ? sizeof(KvsScalableEncodeJob) : sizeof(KvsScalableEncodeTotals);
}

int kvs_scalable_encode(const KvsScalableEncodeJob* jobs, const KvsScalableEncodeTotals* totals,
                        const KvsPages* pages, int dtype, std::uint32_t* lengths, void* stream) {
  using namespace kvs;
  if (totals->jobs == 0) return 0;
  std::uint32_t multiprocessors = 0;
  if (const int error = allow_multiprocessors(&multiprocessors); error != 0) return error;
  const Call call{jobs, *totals, *pages, multiprocessors, stream};
  if (dtype == 1) return encode<DeviceDtype::kBfloat16>(call, lengths);
  if (dtype == 2) return encode<DeviceDtype::kFloat16>(call, lengths);
  return encode<DeviceDtype::kFloat32>(call, lengths);
}

}  // extern "C"
