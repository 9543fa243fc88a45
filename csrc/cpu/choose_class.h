// Which class codes a component in the fewest bits: integers alone, so that every machine chooses the same.
#pragma once

#include "head_stream.h"

namespace kvs {

// The classes of a block's lanes. `values`: [token][32 lanes]. At most the first 32,767 tokens are counted.
void choose_classes(const std::uint16_t* values, std::uint32_t lanes, std::uint64_t tokens, Class* chosen);

}  // namespace kvs
