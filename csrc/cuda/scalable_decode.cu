// Decoding codec 3: numbers of all streams, then values by span. What the arithmetic predicts: docs/gpu.md.

#include "api.h"
#include "launch.h"
#include "scalable_levels.h"
#include "scalable_rows.h"
#include "scalable_wide.h"

namespace {

using namespace kvs;

struct Call {
  const KvsScalableJob* jobs;
  const KvsScalableTotals& totals;
  const KvsPages& pages;
  std::int16_t* numbers;
  std::uint32_t* order;
  std::uint32_t* faults;
  std::uint32_t multiprocessors;
  void* stream;

  // Blocks of a kernel for so many pieces of work.
  std::uint32_t blocks(std::uint64_t pieces, std::uint32_t resident) const {
    return static_cast<std::uint32_t>(std::min(pieces, std::uint64_t{multiprocessors} * resident));
  }
};

std::uint64_t parts(std::uint64_t whole, std::uint64_t part) { return (whole + part - 1) / part; }

int decode_levels(const Call& call) {
  const KvsScalableTotals& totals = call.totals;
  std::uint32_t most_bytes = 0;
  if (const int error = find_shared_memory(&most_bytes)) return error;
  const Grid grid = spread<DecodeLevels>(totals.jobs, call.multiprocessors, 4);
  const std::uint32_t warps = grid.threads / simt::kWarp, room = DecodeLevels::find_room(most_bytes, warps);
  const DecodeLevels kernel{
      call.jobs,          totals.jobs, reinterpret_cast<const PackedTables*>(totals.tables),
      totals.classes_end, room,        call.numbers,
      call.order,         call.faults};
  const std::uint32_t bytes = DecodeLevels::shared_bytes(
      DecodeLevels::shared_classes(totals.first_class, totals.classes_end, room), warps);
  return launch(kernel, grid.blocks, grid.threads, bytes, call.stream);
}

template <DeviceDtype dtype>
int finish_narrow(const Call& call) {
  using Kernel = FinishRows<dtype>;
  const KvsScalableTotals& totals = call.totals;
  const std::uint32_t tile = Kernel::choose_tile(totals.components);
  const auto tiles = static_cast<std::uint32_t>(parts(totals.tokens, tile));
  const Kernel kernel{call.jobs,  totals.jobs,  tile,       tiles,      totals.components,
                      call.pages, call.numbers, call.order, call.faults};
  const std::uint32_t blocks = call.blocks(std::uint64_t{totals.jobs} * tiles, Kernel::kResident);
  const std::uint32_t bytes = Kernel::shared_bytes(tile, totals.components, totals.dim);
  return launch(kernel, blocks, Kernel::kThreads, bytes, call.stream);
}

template <DeviceDtype dtype>
int finish_tiles(const Call& call) {
  using Kernel = MultiplyTiles<dtype>;
  const KvsScalableTotals& totals = call.totals;
  const auto tiles = static_cast<std::uint32_t>(parts(totals.tokens, TileProduct::kTokens));
  const std::uint32_t columns = Kernel::count_columns(totals.planes, totals.dim);
  const Kernel kernel{call.jobs,  totals.jobs,  tiles,      columns,
                      call.pages, call.numbers, call.order, call.faults};
  const std::uint64_t pieces = std::uint64_t{totals.jobs} * tiles * columns;
  const std::uint32_t blocks = call.blocks(pieces, Kernel::kResident);
  return launch(kernel, blocks, Kernel::kThreads, Kernel::kSharedBytes, call.stream);
}

template <DeviceDtype dtype>
int finish_wide(const Call& call) {
  using Kernel = MultiplyWide<dtype>;
  const KvsScalableTotals& totals = call.totals;
  const auto tiles = static_cast<std::uint32_t>(parts(totals.tokens, kTileTokens));
  const Kernel kernel{call.jobs,  totals.jobs,  tiles,      totals.planes,
                      call.pages, call.numbers, call.order, call.faults};
  const std::uint64_t pieces = std::uint64_t{totals.jobs} * tiles * totals.planes;
  const std::uint32_t blocks = call.blocks(pieces, Kernel::kResident);
  return launch(kernel, blocks, Kernel::kThreads, Kernel::shared_bytes(totals.dim), call.stream);
}

template <DeviceDtype dtype>
int decode(const Call& call) {
  if (const int error = decode_levels(call)) return error;
  if (call.totals.narrow != 0) {
    if (const int error = finish_narrow<dtype>(call)) return error;
  }
  if (call.totals.wide != 0) {
    if (const int error = finish_tiles<dtype>(call)) return error;
  }
  return call.totals.wide_float != 0 ? finish_wide<dtype>(call) : 0;
}

}  // namespace

int kvs_scalable_decode(const KvsScalableJob* jobs, const KvsScalableTotals* totals, const KvsPages* pages,
                        int dtype, std::int16_t* numbers, std::uint32_t* order, std::uint32_t* faults,
                        void* stream) {
  if (totals->jobs == 0) return 0;
  std::uint32_t multiprocessors = 0;
  if (const int error = allow_multiprocessors(&multiprocessors)) return error;
  const Call call{jobs, *totals, *pages, numbers, order, faults, multiprocessors, stream};
  switch (dtype) {
    case static_cast<int>(DeviceDtype::kBfloat16):
      return decode<DeviceDtype::kBfloat16>(call);
    case static_cast<int>(DeviceDtype::kFloat16):
      return decode<DeviceDtype::kFloat16>(call);
    case static_cast<int>(DeviceDtype::kFloat32):
      return decode<DeviceDtype::kFloat32>(call);
    default:
      return 1;  // cudaErrorInvalidValue
  }
}
