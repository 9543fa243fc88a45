// Encoding codec 3, first kernel: values out of pages, K's rotation undone, the mean off: a warp for each
// token of a stream. scalable_encode.cu has the whole.
#pragma once

#include "device_memory.h"
#include "launch.h"
#include "scalable_encode.h"

namespace kvs {

// A value's bits as a float; `unfit` where it is not finite or has the dtype's largest exponent: turned or
// rounded, it could become infinite.
template <DeviceDtype dtype>
KVS_DEVICE float widen_value(typename DtypeBits<dtype>::Bits bits, bool& unfit) {
  if constexpr (dtype == DeviceDtype::kBfloat16) {
    unfit |= (bits & 0x7F80) >= 0x7F00;
    return std::bit_cast<float>(std::uint32_t{bits} << 16);
  } else if constexpr (dtype == DeviceDtype::kFloat16) {
    unfit |= (bits & 0x7FFF) >= 0x7800;
    return widen_float16_bits(bits);
  } else {
    unfit |= (bits & 0x7F800000) >= 0x7F000000;
    return std::bit_cast<float>(bits);
  }
}

// No shared memory.
template <DeviceDtype dtype>
struct PrepareTokens {
  static constexpr std::uint32_t kThreads = 256, kResident = 4;
  static constexpr std::uint32_t kSharedBytes = 0;
  using Bits = typename DtypeBits<dtype>::Bits;

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count, tokens;  // tokens: the most
  KvsPages pages;

  KVS_DEVICE void operator()() const {
    each_token(jobs, count, tokens,
               [this](const KvsScalableEncodeJob& job, std::uint32_t token) { prepare(job, token); });
  }

 private:
  // What a token of a stream is made from, and what was seen of it.
  struct Token {
    const KvsScalableEncodeJob& job;
    std::uint32_t number;
    std::int64_t offset;
    bool unfit = false;
  };

  KVS_DEVICE void prepare(const KvsScalableEncodeJob& job, std::uint32_t number) const {
    const EncodeSize size = EncodeSize::of(job, pages.dim, sizeof(Bits));
    const EncodeScratch scratch = scratch_of(job, size);
    const std::uint32_t place = job.token_begin + number;
    Token token{job, number, find_token_run(pages, place, place + 1).offset};
    const std::uint64_t row = std::uint64_t{number} * size.numbers;
    std::uint32_t most = 0;
    if (job.matrix_bytes == 2) {
      each(token, [&most](std::uint32_t, float value) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
      });
    } else {
      float* x = scratch.x() + row;
      each(token, [x](std::uint32_t i, float value) { store_value(x + i, value); });
    }
    const bool exact = simt::ballot(token.unfit) != 0 || (number == 0 && job.first_is_exact != 0);
    if (simt::lane() == 0) scratch.exact()[number] = exact ? 1 : 0;
    if (job.matrix_bytes != 2) return;
    for (std::uint32_t mask = 16; mask != 0; mask /= 2) {
      const std::uint32_t other = simt::shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    // The largest becomes 2^14 to 2^15, where float16 has room; what makes it that is no larger than 2^126.
    const std::uint32_t exponent = most >> 23, most_grow = 127 + 126;
    std::uint32_t grow = 127 + 14 + 127 - exponent;
    grow = grow < most_grow ? grow : most_grow;
    if (simt::lane() == 0) scratch.shrink()[number] = std::bit_cast<float>((254 - grow) << 23);
    split(token, exact ? 0.0f : std::bit_cast<float>(grow << 23), scratch.x_high() + row,
          scratch.x_low() + row);
  }

  // All numbers times `grow`, each as the sum of two float16: 22 bits of it. 0 for an exact token.
  KVS_DEVICE void split(Token& token, float grow, std::uint16_t* high, std::uint16_t* low) const {
    each(token, [=](std::uint32_t i, float value) {
      const float grown = grow != 0 ? value * grow : 0;
      const std::uint32_t rounded = round_to_float16(grown);
      const std::uint32_t left = round_to_float16(grown - widen_float16_bits(rounded));
      store_value(high + i, static_cast<std::uint16_t>(rounded));
      store_value(low + i, static_cast<std::uint16_t>(left));
    });
  }

  // see(i, x[i]) for all numbers, each by one lane.
  template <typename See>
  KVS_DEVICE void each(Token& token, See see) const {
    const KvsScalableEncodeJob& job = token.job;
    const auto* mean = reinterpret_cast<const float*>(job.mean);
    const auto* rotated = reinterpret_cast<const std::uint8_t*>(job.rotated);
    const auto less_mean = [mean, see](std::uint32_t i, float value) {
      see(i, mean != nullptr ? value - load_constant(mean + i) : value);
    };
    std::uint32_t begin = 0;
    for (std::uint32_t head = 0; head < job.heads; ++head) {
      for (std::uint32_t layer = 0; layer < job.layers; ++layer) {
        for (std::uint32_t kind = 0; kind < 2; ++kind, begin += pages.dim) {
          const Bits* from = find_head<const Bits>(pages, job.layer_begin + layer, kind, job.head + head);
          from += token.offset;
          const bool turned = job.style != 0 && kind == 0 && load_constant(rotated + layer) != 0;
          const std::uint32_t plain = turned ? 2u * job.pairs : 0;
          if (turned) unrotate(token, from, begin, less_mean);
          widen(token, from, plain, pages.dim, begin, less_mean);
        }
      }
    }
  }

  // Numbers [first, end) of a plane as they are. Several loads at once, here and where K is turned: a row
  // takes longer to come than to work on.
  template <typename See>
  KVS_DEVICE static void widen(Token& token, const Bits* from, std::uint32_t first, std::uint32_t end,
                               std::uint32_t begin, See see) {
    constexpr std::uint32_t kAtOnce = 4;
    for (std::uint32_t i = first + simt::lane(); i < end; i += kAtOnce * simt::kWarp) {
      Bits bits[kAtOnce];
      KVS_UNROLL for (std::uint32_t u = 0; u < kAtOnce; ++u) {
        const std::uint32_t at = i + u * simt::kWarp;
        bits[u] = at < end ? load_constant(from + at) : Bits{0};
      }
      KVS_UNROLL for (std::uint32_t u = 0; u < kAtOnce; ++u) {
        const std::uint32_t at = i + u * simt::kWarp;
        if (at < end) see(begin + at, widen_value<dtype>(bits[u], token.unfit));
      }
    }
  }

  // The host's operations: its angles are turned against, and nothing is fused.
  template <typename See>
  KVS_DEVICE static void unrotate(Token& token, const Bits* from, std::uint32_t begin, See see) {
    const KvsScalableEncodeJob& job = token.job;
    const std::uint64_t row = std::uint64_t{token.number} * job.pairs;
    const auto* cosines = reinterpret_cast<const float*>(job.cosines) + row;
    const auto* sines = reinterpret_cast<const float*>(job.sines) + row;
    constexpr std::uint32_t kAtOnce = 2;
    const std::uint32_t apart = job.style == 1 ? 1 : 2, partner = job.style == 1 ? job.pairs : 1;
    for (std::uint32_t j = simt::lane(); j < job.pairs; j += kAtOnce * simt::kWarp) {
      Bits bits[kAtOnce][2];
      float angles[kAtOnce][2];
      KVS_UNROLL for (std::uint32_t u = 0; u < kAtOnce; ++u) {
        const std::uint32_t pair = j + u * simt::kWarp < job.pairs ? j + u * simt::kWarp : j;
        bits[u][0] = load_constant(from + apart * pair);
        bits[u][1] = load_constant(from + apart * pair + partner);
        angles[u][0] = load_constant(cosines + pair);
        angles[u][1] = load_constant(sines + pair);
      }
      KVS_UNROLL for (std::uint32_t u = 0; u < kAtOnce; ++u) {
        const std::uint32_t pair = j + u * simt::kWarp;
        if (pair >= job.pairs) break;
        const float first = widen_value<dtype>(bits[u][0], token.unfit);
        const float second = widen_value<dtype>(bits[u][1], token.unfit);
        const float cosine = angles[u][0], sine = -angles[u][1];
        see(begin + apart * pair, first * cosine - second * sine);
        see(begin + apart * pair + partner, second * cosine + first * sine);
      }
    }
  }
};

}  // namespace kvs
