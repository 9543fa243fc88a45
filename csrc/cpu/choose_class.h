// Which class codes a component in the fewest bits: integers alone, so that every machine chooses the same.
#pragma once

#include "head_stream.h"

namespace kvs {

// `values`: [token][32 lanes]. At most the first 32,767 tokens are counted.
Class choose_class(const std::uint16_t* values, std::uint32_t lane, std::uint64_t tokens);

}  // namespace kvs
