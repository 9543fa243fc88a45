// Where a value lies in pages: the arithmetic of KvsPages (api.h), for kernels that scatter and that gather.
#pragma once

#include "api.h"
#include "simt.h"

namespace kvs {

// Tokens in a row whose values are token_stride apart: `offset` elements from the head's first value in its
// plane to the first token.
struct TokenRun {
  std::int64_t offset;
  std::uint32_t tokens;
};

// The run that starts with `token` and ends with its block, or before `end`.
KVS_DEVICE TokenRun find_token_run(const KvsPages& pages, std::uint32_t token, std::uint32_t end) {
  if (pages.block_table == nullptr) return {token * pages.token_stride, end - token};
  const std::uint32_t within = token % pages.block_tokens;
  const std::uint32_t left = pages.block_tokens - within;
  const std::int64_t block = pages.block_table[token / pages.block_tokens];
  return {block * pages.block_stride + within * pages.token_stride, left < end - token ? left : end - token};
}

// Goes through the runs of tokens [token, end), and divides only once.
class TokenWalk {
 public:
  KVS_DEVICE TokenWalk(const KvsPages& pages, std::uint32_t token, std::uint32_t end)
      : pages_(pages), token_(token), left_(end - token) {
    if (pages.block_table == nullptr) return;
    block_ = token / pages.block_tokens;
    token_ = token % pages.block_tokens;
  }

  KVS_DEVICE bool ended() const { return left_ == 0; }

  KVS_DEVICE TokenRun next() {
    TokenRun run{token_ * pages_.token_stride, left_};
    if (pages_.block_table != nullptr) {
      run.offset += pages_.block_table[block_] * pages_.block_stride;
      const std::uint32_t within = pages_.block_tokens - token_;
      run.tokens = within < left_ ? within : left_;
      ++block_;
      token_ = 0;
    }
    left_ -= run.tokens;
    return run;
  }

 private:
  const KvsPages& pages_;
  std::uint32_t token_, left_, block_ = 0;  // token_: within its block
};

// The head's values of a layer's K or V, of the first token of the first block.
template <typename Value>
KVS_DEVICE Value* find_head(const KvsPages& pages, std::uint32_t layer, std::uint32_t kind,
                            std::uint32_t head) {
  return reinterpret_cast<Value*>(pages.planes[2 * std::uint64_t{layer} + kind]) + head * pages.head_stride;
}

}  // namespace kvs
