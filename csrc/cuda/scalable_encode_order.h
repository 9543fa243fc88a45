// Encoding codec 3: numbers from the order of components into that in which they are coded.
// scalable_encode.cu has the whole.
#pragma once

#include "device_memory.h"
#include "launch.h"
#include "scalable_encode.h"

namespace kvs {

// Numbers in coding order, [block][token][32 lanes], each cut to what its class can say: a warp for each
// token of a stream. No shared memory: a token's numbers stay in L1 while they are picked from it.
struct OrderNumbers {
  static constexpr std::uint32_t kThreads = 256, kResident = 8;
  static constexpr std::uint32_t kSharedBytes = 0;

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count, tokens;  // tokens: the most
  const PackedPushes* tables;
  KvsPages pages;
  std::uint32_t item_bytes;

  KVS_DEVICE void operator()() const {
    each_token(jobs, count, tokens,
               [this](const KvsScalableEncodeJob& job, std::uint32_t token) { order(job, token); });
  }

 private:
  KVS_DEVICE void order(const KvsScalableEncodeJob& job, std::uint32_t token) const {
    const EncodeSize size = EncodeSize::of(job, pages.dim, item_bytes);
    const EncodeScratch scratch = scratch_of(job, size);
    const EncodedStream found = scratch.stream();
    if (found.raw != 0) return;
    const bool exact = scratch.exact()[token] != 0;
    std::int16_t* from = scratch.rounded() + std::uint64_t{token} * size.components;
    for (std::uint32_t c = simt::lane(); c < size.components && exact; c += kLanes) from[c] = 0;
    std::uint16_t* to = scratch.rows() + std::uint64_t{token} * kLanes + simt::lane();
    const std::uint64_t stride = std::uint64_t{size.tokens} * kLanes;
    const std::uint32_t coded = found.last(size.levels), of_base = found.coded[0], of_middle = found.coded[1];
    const std::uint16_t* order = scratch.order();
    for (std::uint32_t c = simt::lane(); c < round_up(coded, kLanes); c += kLanes, to += stride) {
      std::int32_t number = c < coded && !exact ? from[load_constant(order + c)] : 0;
      // Beyond these, coarser levels would not be 0.
      const std::int32_t most = c < of_base ? 9 * kMostBase + 4 : c < of_middle ? 4 : 1;
      number = number < -most ? -most : number;
      number = number > most ? most : number;
      store_value(to, load_constant(tables->symbols + static_cast<std::uint16_t>(number)));
    }
  }
};

}  // namespace kvs
