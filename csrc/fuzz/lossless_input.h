// The lossless fuzzer's input: eight bytes of shape, head range and kind, then a payload: as it is, or coded
// streams whose lengths are made to fit, so that the decoders' loops are reached however the bytes were
// changed.
#pragma once

#include "../cpu/head_stream.h"
#include "fuzz_input.h"

namespace kvs::fuzz {

struct LosslessInput {
  std::uint32_t layers, kinds, tokens, section_heads, dim, head_begin, heads, fitted;

  static LosslessInput take(Input& input) {
    LosslessInput shape{};
    shape.layers = 1 + input.take_byte() % 4;
    shape.kinds = 1 + input.take_byte() % 2;
    shape.tokens = 1 + input.take_byte() % 80;
    shape.section_heads = 1 + input.take_byte() % 3;
    shape.dim = 1 + input.take_byte() % 80;
    shape.head_begin = input.take_byte() % shape.section_heads;
    shape.heads = 1 + input.take_byte() % (shape.section_heads - shape.head_begin);
    shape.fitted = input.take_byte() % 2;
    return shape;
  }

  void put(Output& output) const {
    output.put_byte(layers - 1).put_byte(kinds - 1).put_byte(tokens - 1).put_byte(section_heads - 1);
    output.put_byte(dim - 1).put_byte(head_begin).put_byte(heads - 1);
    output.put_byte(fitted);
  }

  std::vector<std::uint8_t> take_payload(Input& input) const {
    if (fitted == 0) return input.take_rest();
    std::vector<std::uint8_t> payload(4ull * section_heads);
    for (std::uint32_t head = 0; head < section_heads; ++head) {
      const std::vector<std::uint8_t> stream = take_stream(input);
      store(payload.data() + 4ull * head, static_cast<std::uint32_t>(stream.size()));
      payload.insert(payload.end(), stream.begin(), stream.end());
    }
    return payload;
  }

 private:
  // Six bytes say top_min, top_bits, words and escapes; the others fill the stream, over and over.
  std::vector<std::uint8_t> take_stream(Input& input) const {
    const HeadShape shape{std::uint64_t{layers} * kinds * dim, tokens};
    const std::uint32_t top_min = input.take_byte(), top_bits = input.take_byte() % 9;
    const std::uint32_t words = input.take_short(), escapes = input.take_short();
    std::vector<std::uint8_t> fill = input.take_bytes(256);
    if (fill.empty()) fill.push_back(0);
    const StreamParts parts = lay_out(shape, words, escapes, top_bits);
    std::vector<std::uint8_t> stream(parts.end);
    for (std::size_t i = 0; i < stream.size(); ++i) stream[i] = fill[i % fill.size()];
    stream[0] = kModeCoded;
    stream[1] = static_cast<std::uint8_t>(top_min);
    stream[2] = static_cast<std::uint8_t>(top_bits);
    stream[3] = 0;
    store(stream.data() + 4, words);
    store(stream.data() + 8, escapes);
    for (std::uint32_t lane = 0; lane < shape.states(); ++lane) {
      std::uint8_t* state = stream.data() + parts.states + 4 * lane;
      store(state, (load<std::uint32_t>(state) & 0x7FFFFFFF) | kStateMin);
    }
    return stream;
  }
};

}  // namespace kvs::fuzz
