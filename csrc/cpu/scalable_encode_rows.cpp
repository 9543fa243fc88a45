// The portable loops.

#include "scalable_encode_rows.h"

namespace kvs {

void encode_base_portable(LevelSink& to, PushStates& states, const BasePushes& block, std::uint64_t tokens) {
  for (std::uint64_t token = tokens; token-- > 0;) {
    encode_base_row(to, states, block, block.numbers + token * kLanes);
  }
}

void encode_refine_portable(LevelSink& to, PushStates& states, const RefinePushes& block,
                            std::uint64_t tokens) {
  for (std::uint64_t token = tokens; token-- > 0;) {
    const std::int16_t* row = block.numbers + token * kLanes;
    for (std::uint32_t lane = block.lanes; lane-- > 0;) {
      const std::int32_t fine = block.level == 2 ? row[lane] : coarsen_number(row[lane]);
      const std::int32_t coarse = coarsen_number(fine);
      const Push& push = block.pushes[lane][3 * context_of(coarse) + ternary_symbol(coarse, fine)];
      push_lane(to, states.state[lane], push);
    }
  }
}

}  // namespace kvs
