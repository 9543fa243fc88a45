// Copies between arrays whose axes lie in another order in memory: pages of an engine's KV cache and the rows
// of a chunk. Nothing but strides is known of either side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvs {

// An axis of both sides; strides in bytes.
struct CopyAxis {
  std::int64_t count, to, from;
};

// How one block is copied, found out once for all blocks of a call.
class BlockCopy {
 public:
  // `axes` outermost first, in any order; values have `item_bytes`. An axis without items copies nothing.
  BlockCopy(std::vector<CopyAxis> axes, std::size_t item_bytes);

  // The sides must not overlap. Strides may be anything that stays within them.
  void run(std::byte* to, const std::byte* from) const;

 private:
  void tile(std::byte* to, const std::byte* from) const;

  std::vector<CopyAxis> outer_;  // looped over, outermost first
  CopyAxis rows_{1, 0, 0};       // dense in `from` where it can be
  CopyAxis columns_{1, 0, 0};    // dense in `to` where it can be
  std::size_t item_ = 1;         // bytes that are next to each other on both sides
  bool nothing_ = false;
};

}  // namespace kvs
