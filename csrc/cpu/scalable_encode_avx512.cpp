#include "scalable_encode_rows.h"
namespace kvs {
void encode_base_avx512(LevelSink& to, PushStates& states, const BasePushes& block, std::uint64_t tokens) {
  encode_base_portable(to, states, block, tokens);
}
void encode_refine_avx512(LevelSink& to, PushStates& states, const RefinePushes& block,
                          std::uint64_t tokens) {
  encode_refine_portable(to, states, block, tokens);
}
}  // namespace kvs
