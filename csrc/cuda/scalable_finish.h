// The end of decoding codec 3 on a GPU, shared by the kernels of all spans: a tile of x, [tokens][numbers] as
// floats in shared memory with the mean in it, becomes values in pages. K is turned by its angles again,
// values are rounded and scattered, exact tokens written over them.
#pragma once

#include "pages.h"
#include "scalable_order.h"
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

// Whether any plane of a tile is.
KVS_DEVICE bool is_wanted(const KvsScalableJob& job, const Tile& tile) {
  const std::uint32_t each = 2u * job.layers;
  return job.want_begin <= (tile.last - 1) / each && tile.first / each < job.want_end;
}

// A plane of a stream in the pages, and how its rows of x become values: what all its tokens share.
template <DeviceDtype dtype>
class PlaneWriter {
 public:
  using Bits = typename DtypeBits<dtype>::Bits;

  KVS_DEVICE PlaneWriter(const KvsScalableJob& job, const KvsPages& pages, std::uint32_t plane)
      : pages_(pages),
        token_begin_(job.token_begin),
        dim_(job.dim),
        pairs_(job.pairs),
        halves_(job.style == 1) {
    const std::uint32_t head = plane / (2u * job.layers), within = plane % (2u * job.layers);
    const auto* rotated = reinterpret_cast<const std::uint8_t*>(job.rotated);
    values_ =
        find_head<Bits>(pages, job.layer_begin + within / 2, within % 2, job.head + head - job.want_begin);
    cosines_ = reinterpret_cast<const float*>(job.cosines);
    sines_ = reinterpret_cast<const float*>(job.sines);
    turned_ = job.style == 0 || within % 2 != 0 || rotated[within / 2] == 0 ? 0 : 2u * job.pairs;
  }

  // Where a token's values lie.
  KVS_DEVICE Bits* find_row(std::uint32_t token) const {
    const std::uint32_t at = token_begin_ + token;
    return values_ + find_token_run(pages_, at, at + 1).offset;
  }

  // Writes `rows` tokens from `token` on; x has them `stride` floats apart.
  KVS_DEVICE void write_rows(std::uint32_t token, std::uint32_t rows, const float* x,
                             std::uint32_t stride) const {
    const bool together = takes_fours(stride);
    std::uint64_t angles = std::uint64_t{token} * pairs_;
    TokenWalk walk(pages_, token_begin_ + token, token_begin_ + token + rows);
    while (!walk.ended()) {
      const TokenRun run = walk.next();
      Bits* to = values_ + run.offset;
      for (std::uint32_t i = 0; i < run.tokens;
           ++i, to += pages_.token_stride, x += stride, angles += pairs_) {
        if (together) {
          write_fours(to, x, cosines_ + angles, sines_ + angles);
        } else {
          write_ones(to, x, cosines_ + angles, sines_ + angles);
        }
      }
    }
  }

 private:
  struct alignas(4 * sizeof(Bits)) FourBits {
    Bits of[4];
  };
  struct alignas(16) FourFloats {
    float of[4];
  };
  struct alignas(8) TwoFloats {
    float of[2];
  };

  // Whether rows can be read and written by four numbers: all lie at multiples of four, pairs too.
  KVS_DEVICE bool takes_fours(std::uint32_t stride) const {
    const std::uint64_t distances = static_cast<std::uint64_t>(pages_.token_stride | pages_.block_stride) |
                                    stride | dim_ | turned_ | (halves_ ? turned_ / 2 : 0);
    const std::uint64_t angles = reinterpret_cast<std::uint64_t>(cosines_) |
                                 reinterpret_cast<std::uint64_t>(sines_) | (halves_ ? 4ull : 2ull) * pairs_;
    return distances % 4 == 0 && reinterpret_cast<std::uint64_t>(values_) % sizeof(FourBits) == 0 &&
           (turned_ == 0 || angles % (halves_ ? 16 : 8) == 0);
  }

  KVS_DEVICE void write_fours(Bits* to, const float* x, const float* cosines, const float* sines) const {
    for (std::uint32_t d = 4 * simt::lane(); d < dim_; d += 4 * simt::kWarp) {
      FourFloats own = *reinterpret_cast<const FourFloats*>(x + d);
      if (d < turned_) turn_four(own, x, d, cosines, sines);
      FourBits bits;
      narrow_four<dtype>(own.of, bits.of);
      *reinterpret_cast<FourBits*>(to + d) = bits;
    }
  }

  // Numbers d to d + 3, as `turn` does it.
  KVS_DEVICE void turn_four(FourFloats& own, const float* x, std::uint32_t d, const float* cosines,
                            const float* sines) const {
    if (halves_) {
      const std::uint32_t apart = turned_ / 2;
      const bool second = d >= apart;
      const std::uint32_t pair = second ? d - apart : d;
      const FourFloats other = *reinterpret_cast<const FourFloats*>(x + (second ? pair : d + apart));
      const FourFloats cosine = *reinterpret_cast<const FourFloats*>(cosines + pair);
      const FourFloats sine = *reinterpret_cast<const FourFloats*>(sines + pair);
      KVS_UNROLL
      for (std::uint32_t i = 0; i < 4; ++i) {
        const float across = other.of[i] * sine.of[i];
        own.of[i] = own.of[i] * cosine.of[i] + (second ? across : -across);
      }
    } else {
      const TwoFloats cosine = *reinterpret_cast<const TwoFloats*>(cosines + d / 2);
      const TwoFloats sine = *reinterpret_cast<const TwoFloats*>(sines + d / 2);
      KVS_UNROLL
      for (std::uint32_t i = 0; i < 2; ++i) {
        const float first = own.of[2 * i], second = own.of[2 * i + 1];
        own.of[2 * i] = first * cosine.of[i] - second * sine.of[i];
        own.of[2 * i + 1] = second * cosine.of[i] + first * sine.of[i];
      }
    }
  }

  KVS_DEVICE void write_ones(Bits* to, const float* x, const float* cosines, const float* sines) const {
    for (std::uint32_t d = simt::lane(); d < dim_; d += simt::kWarp)
      to[d] = narrow_value<dtype>(turn(x, d, cosines, sines));
  }

  // Number `d` of x, K with its rotation.
  KVS_DEVICE float turn(const float* x, std::uint32_t d, const float* cosines, const float* sines) const {
    if (d >= turned_) return x[d];
    const std::uint32_t apart = halves_ ? turned_ / 2 : 1;
    const bool second = halves_ ? d >= apart : d % 2 != 0;
    const std::uint32_t pair = !halves_ ? d / 2 : second ? d - apart : d;
    const float own = x[d] * cosines[pair];
    return second ? own + x[d - apart] * sines[pair] : own - x[d + apart] * sines[pair];
  }

  // Copies of what the job says: it would be read again after each store.
  const KvsPages& pages_;
  Bits* values_;
  const float* cosines_;
  const float* sines_;
  std::uint32_t token_begin_, dim_, pairs_;
  std::uint32_t turned_;  // the first of a head's numbers, as many as are turned
  bool halves_;
};

// Writes x of the tile: row `token - begin` of `x`, planes side by side from the tile's first on. A warp has
// neighbouring rows of one plane after the other, for which it finds the plane once.
template <DeviceDtype dtype>
KVS_DEVICE void write_tile(const KvsScalableJob& job, const KvsPages& pages, const Tile& tile, const float* x,
                           std::uint32_t stride) {
  const std::uint32_t rows = tile.end - tile.begin, all = rows * (tile.last - tile.first);
  const std::uint32_t each = (all + simt::warps() - 1) / simt::warps(), begin = simt::warp() * each;
  const std::uint32_t end = begin + each < all ? begin + each : all;
  std::uint32_t plane = begin / rows, row = begin % rows;
  for (std::uint32_t at = begin; at < end; ++plane, row = 0) {
    const std::uint32_t last = rows - row < end - at ? rows : row + end - at;
    at += last - row;
    if (!is_wanted(job, tile.first + plane)) continue;
    const PlaneWriter<dtype> writer(job, pages, tile.first + plane);
    writer.write_rows(tile.begin + row, last - row, x + row * stride + plane * job.dim, stride);
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
  for (std::uint32_t item = simt::warp(); item < (end - begin) * planes; item += simt::warps()) {
    const std::uint32_t plane = tile.first + item % planes, exact = begin + item / planes;
    if (!is_wanted(job, plane)) continue;
    const std::uint16_t* from = stored + (exact * n + std::uint64_t{plane} * dim) * kHalves;
    Bits* to = PlaneWriter<dtype>(job, pages, plane).find_row(raw ? exact : tokens[exact]);
    for (std::uint32_t d = simt::lane(); d < dim; d += simt::kWarp) {
      Bits bits = from[d * kHalves];
      if constexpr (kHalves == 2) bits |= static_cast<std::uint32_t>(from[d * kHalves + 1]) << 16;
      to[d] = bits;
    }
  }
}

// A component of the coding order: what one of its numbers stands for.
struct Component {
  std::uint32_t number;  // in x or y
  float shift, scale;    // of a level

  KVS_DEVICE Component(const KvsScalableJob& job, const std::uint32_t* order, std::uint32_t c) {
    const auto* tables = reinterpret_cast<const PackedTables*>(job.tables);
    const std::uint32_t packed = order[job.order + c];
    number = number_of(packed);
    shift = tables->shift[job.levels - 1][class_of(packed)];
    scale = level_scale(job.levels - 1u);
  }

  KVS_DEVICE float value(std::int32_t q) const { return reconstruct(q, shift, scale); }
};

}  // namespace kvs
