// The end of decoding codec 3 on a GPU, shared by the kernels of all spans: a tile of x, [tokens][numbers] as
// floats in shared memory with the mean in it, becomes values in pages. K is turned by its angles again,
// values are rounded and scattered, exact tokens written over them.
#pragma once

#include "api.h"
#include "pages.h"
#include "scalable_levels.h"
#include "scalable_values.h"

namespace kvs {

// Tokens [begin, end) of planes [first, last) of a stream's x, numbered [head][layer][kind].
struct Tile {
  std::uint32_t begin, end;
  std::uint32_t first, last;
};

KVS_DEVICE bool is_wanted(const KvsScalableJob& job, std::uint32_t plane) {
  const std::uint32_t head = plane / (2u * job.layers);
  return job.want_begin <= head && head < job.want_end;
}

// Where a token's values of a plane lie.
template <typename Bits>
KVS_DEVICE Bits* find_row(const KvsScalableJob& job, const KvsPages& pages, std::uint32_t plane,
                          std::uint32_t token) {
  const std::uint32_t head = plane / (2u * job.layers), within = plane % (2u * job.layers);
  const std::uint32_t at = job.token_begin + token;
  return find_head<Bits>(pages, job.layer_begin + within / 2, within % 2, job.head + head - job.want_begin) +
         find_token_run(pages, at, at + 1).offset;
}

// The angles that a token's K of a plane is turned by; `pairs` 0: not turned.
struct Turn {
  const float* cosines;
  const float* sines;
  std::uint32_t pairs;
  bool halves;

  KVS_DEVICE Turn(const KvsScalableJob& job, std::uint32_t plane, std::uint32_t token)
      : halves(job.style == 1) {
    const std::uint32_t within = plane % (2u * job.layers);
    const auto* rotated = reinterpret_cast<const std::uint8_t*>(job.rotated);
    const bool turned = job.style != 0 && within % 2 == 0 && rotated[within / 2] != 0;
    const std::uint64_t row = static_cast<std::uint64_t>(token) * job.pairs;
    pairs = turned ? job.pairs : 0;
    cosines = reinterpret_cast<const float*>(job.cosines) + row;
    sines = reinterpret_cast<const float*>(job.sines) + row;
  }

  // Number `d` of a head's x after turning.
  KVS_DEVICE float operator()(const float* x, std::uint32_t d) const {
    if (d >= 2 * pairs) return x[d];
    const std::uint32_t pair = halves ? d % pairs : d / 2;
    const bool second = halves ? d >= pairs : d % 2 != 0;
    const float own = x[d] * cosines[pair];
    return second ? own + x[halves ? d - pairs : d - 1] * sines[pair]
                  : own - x[halves ? d + pairs : d + 1] * sines[pair];
  }
};

// Writes x of the tile: row `token - begin` of `x`, planes side by side from the tile's first on. Two numbers
// of one head go with one thread, and with one store where they may.
template <DeviceDtype dtype>
KVS_DEVICE void write_tile(const KvsScalableJob& job, const KvsPages& pages, const Tile& tile, const float* x,
                           std::uint32_t stride) {
  using Bits = typename DtypeBits<dtype>::Bits;
  struct alignas(2 * sizeof(Bits)) Two {
    Bits first, second;
  };
  const std::uint32_t dim = job.dim, twos = (dim + 1) / 2, planes = tile.last - tile.first;
  const std::uint32_t items = (tile.end - tile.begin) * planes * twos;
  for (std::uint32_t item = simt::thread(); item < items; item += simt::threads()) {
    const std::uint32_t d = item % twos * 2, plane = item / twos % planes, row = item / twos / planes;
    if (!is_wanted(job, tile.first + plane)) continue;
    const float* values = x + row * stride + plane * dim;
    const Turn turn(job, tile.first + plane, tile.begin + row);
    Bits* to = find_row<Bits>(job, pages, tile.first + plane, tile.begin + row) + d;
    const Bits first = narrow_value<dtype>(turn(values, d));
    if (d + 1 == dim) {
      *to = first;
      continue;
    }
    const Two both{first, narrow_value<dtype>(turn(values, d + 1))};
    if (reinterpret_cast<std::uint64_t>(to) % sizeof(Two) == 0) {
      *reinterpret_cast<Two*>(to) = both;
    } else {
      to[0] = both.first;
      to[1] = both.second;
    }
  }
}

// The first of the exact tokens that is not below `token`.
KVS_DEVICE std::uint32_t find_exact(const KvsScalableJob& job, std::uint32_t token) {
  if (job.exact_count == kRawStream) return token;
  const auto* tokens = reinterpret_cast<const std::uint16_t*>(job.exact_tokens);
  std::uint32_t begin = 0, end = job.exact_count;
  while (begin < end) {
    const std::uint32_t middle = (begin + end) / 2;
    if (tokens[middle] < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Writes the tile's exact tokens. Values of streams are 2 bytes aligned.
template <DeviceDtype dtype>
KVS_DEVICE void write_exact(const KvsScalableJob& job, const KvsPages& pages, const Tile& tile) {
  using Bits = typename DtypeBits<dtype>::Bits;
  constexpr std::uint32_t kHalves = sizeof(Bits) / 2;
  const auto* tokens = reinterpret_cast<const std::uint16_t*>(job.exact_tokens);
  const auto* stored = reinterpret_cast<const std::uint16_t*>(job.exact_values);
  const bool raw = job.exact_count == kRawStream;
  const std::uint32_t begin = find_exact(job, tile.begin), end = find_exact(job, tile.end);
  const std::uint32_t dim = job.dim, planes = tile.last - tile.first;
  const std::uint64_t n = 2ull * job.layers * job.heads * dim;
  for (std::uint32_t item = simt::thread(); item < (end - begin) * planes * dim; item += simt::threads()) {
    const std::uint32_t d = item % dim, plane = tile.first + item / dim % planes,
                        exact = begin + item / dim / planes;
    if (!is_wanted(job, plane)) continue;
    const std::uint16_t* from = stored + (exact * n + std::uint64_t{plane} * dim + d) * kHalves;
    Bits bits = from[0];
    if constexpr (kHalves == 2) bits |= static_cast<std::uint32_t>(from[1]) << 16;
    find_row<Bits>(job, pages, plane, raw ? exact : tokens[exact])[d] = bits;
  }
}

// A component of the coding order: what one of its numbers stands for.
struct Component {
  std::uint32_t number;  // in x or y
  float shift, scale;    // of a level

  KVS_DEVICE Component(const KvsScalableJob& job, const std::uint32_t* order, std::uint32_t c) {
    const auto* tables = reinterpret_cast<const PackedTables*>(job.tables);
    number = order[job.order + c];
    shift = tables->shift[job.levels - 1][reinterpret_cast<const std::uint8_t*>(job.classes)[number]];
    scale = level_scale(job.levels - 1u);
  }

  KVS_DEVICE float value(std::int32_t q) const { return reconstruct(q, shift, scale); }
};

// Where the numbers of component `c` of the coding order begin; tokens are kLanes apart.
KVS_DEVICE const std::int16_t* find_numbers(const KvsScalableJob& job, const std::int16_t* numbers,
                                            std::uint32_t c) {
  return numbers + job.numbers + static_cast<std::uint64_t>(c / kLanes) * kLanes * job.tokens + c % kLanes;
}

}  // namespace kvs
