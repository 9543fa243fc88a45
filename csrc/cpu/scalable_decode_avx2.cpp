#include "scalable_decode_rows.h"
namespace kvs {
std::uint64_t decode_base_avx2(LevelSource& a, LaneStates& b, const BaseBlock& c, std::uint64_t begin,
                               std::uint64_t n) {
  return decode_base_portable(a, b, c, begin, n);
}
std::uint64_t decode_refine_avx2(LevelSource& a, LaneStates& b, const RefineBlock& c, std::uint64_t begin,
                                 std::uint64_t n) {
  return decode_refine_portable(a, b, c, begin, n);
}
}  // namespace kvs
