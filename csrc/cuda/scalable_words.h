// The words of a level on their way to the lanes of a warp that decodes a stream of codec 3.
#pragma once

#include "shared_memory.h"
#include "simt.h"

namespace kvs {

// Two chunks of 128 words in shared memory, and a third on its way in two registers of each lane. Behind them
// is the first of the two once more, so that four rows, 128 words at most, are read without looking where the
// ring ends; then `refill` looks.
class WordRing {
 public:
  static constexpr std::uint32_t kChunk = 4 * simt::kWarp, kChunkBytes = 2 * kChunk;
  static constexpr std::uint32_t kBytes = 3 * kChunkBytes;
  static constexpr std::uint32_t kRows = kChunk / simt::kWarp;  // between two calls of `refill`

  // `ring` is an address in shared memory. `from` is 4 bytes aligned, and has as many bytes as its words
  // rounded up to 4.
  KVS_DEVICE WordRing(std::uint32_t ring, std::uint64_t from, std::uint32_t count)
      : from_(reinterpret_cast<const std::uint32_t*>(from)),
        count_(count),
        lanes_before_(simt::lanes_before()),
        at_(ring),
        turn_at_(ring + kChunkBytes) {
    simt::sync_warp();  // whoever still reads the words of the level before
    load_ahead(0);
    store_ahead(ring);
    load_ahead(1);
    store_ahead(ring + kChunkBytes);
    load_ahead(2);
    simt::sync_warp();
  }

  // A state once it has its next word, where it is `hungry` for one; in the order of the lanes. Behind the
  // end words are of no meaning, which `ran_out` tells.
  KVS_DEVICE std::uint32_t feed(std::uint32_t state, bool hungry) {
    const std::uint32_t lanes = simt::ballot(hungry);
    const std::uint32_t word = load_shared_16(at_ + 2 * simt::count_bits(lanes & lanes_before_));
    at_ += 2 * simt::count_bits(lanes);
    return hungry ? state << 16 | word : state;
  }

  // After kRows rows at the latest: the chunk behind `at_` makes room for the one that is on its way.
  KVS_DEVICE void refill() {
    if (at_ >= turn_at_) turn_over();
  }

  KVS_DEVICE bool ran_out() const { return taken() > count_; }
  KVS_DEVICE bool read_to_the_end() const { return taken() == count_; }

 private:
  KVS_DEVICE std::uint32_t taken() const {
    return (loaded_ - 2) * kChunk + (at_ + kChunkBytes - turn_at_) / 2;
  }

  KVS_DEVICE std::uint32_t load_pair(std::uint32_t pair) const {
    return pair < count_ / 2 + count_ % 2 ? from_[pair] : 0;
  }

  // Chunk `which`; a stream has less than 2^32 bytes.
  KVS_DEVICE void load_ahead(std::uint32_t which) {
    const std::uint32_t pair = which * (kChunk / 2) + simt::lane();
    ahead_[0] = load_pair(pair);
    ahead_[1] = load_pair(pair + simt::kWarp);
    loaded_ = which;
  }

  KVS_DEVICE void store_ahead(std::uint32_t to) const {
    store_shared_32(to + 4 * simt::lane(), ahead_[0]);
    store_shared_32(to + 4 * (simt::kWarp + simt::lane()), ahead_[1]);
  }

  KVS_DEVICE void turn_over() {
    simt::sync_warp();
    const std::uint32_t gone = turn_at_ - kChunkBytes;
    store_ahead(gone);
    if (loaded_ % 2 == 0) {  // the first of the two: once more behind the second
      store_ahead(gone + 2 * kChunkBytes);
      turn_at_ += kChunkBytes;
    } else {
      at_ -= 2 * kChunkBytes;
      turn_at_ -= kChunkBytes;
    }
    load_ahead(loaded_ + 1);
    simt::sync_warp();
  }

  const std::uint32_t* from_;
  std::uint32_t count_, lanes_before_;
  std::uint32_t at_, turn_at_;       // addresses: of the next word, and of the next chunk
  std::uint32_t ahead_[2], loaded_;  // the chunk on its way, and which it is
};

}  // namespace kvs
