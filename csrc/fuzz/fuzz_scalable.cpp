// Any bytes, as a stream of any tables, classes and levels: every implementation must refuse them with the
// same fault or decode them to the same floats.

#include "scalable_input.h"

namespace {

using kvs::Fault;
using kvs::fuzz::ScalableInput;

constexpr float kUntouched = -12345.678f;

struct Decoded {
  Fault fault;
  std::vector<float> values;
};

Decoded decode(const kvs::ScalableTables& tables, const ScalableInput& stream, kvs::Implementation how) {
  Decoded decoded{Fault::kNone, std::vector<float>(std::size_t{stream.tokens} * stream.count, kUntouched)};
  std::vector<kvs::Bytes> words(stream.words, stream.words + stream.levels);
  decoded.fault =
      kvs::decode_scalable(tables, stream.classes, stream.states, words, stream.escapes,
                           {decoded.values.data(), stream.tokens, stream.count}, stream.object_levels, how);
  if (decoded.fault == Fault::kNone) {
    kvs::fuzz::expect(
        std::find(decoded.values.begin(), decoded.values.end(), kUntouched) == decoded.values.end(),
        "a value was left out");
  }
  return decoded;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

const kvs::ScalableTables& fixed_tables(std::uint32_t which) {
  kvs::fuzz::Input nothing(nullptr, 0);
  static const auto first = kvs::fuzz::take_tables(nothing, 0), second = kvs::fuzz::take_tables(nothing, 1);
  return which == 0 ? *first : *second;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvs::fuzz::Input input(data, size);
  const std::uint32_t which = input.take_byte() % 8;
  const auto own = which < 2 ? nullptr : kvs::fuzz::take_tables(input, which);
  if (which >= 2 && own == nullptr) return 0;
  const kvs::ScalableTables& tables = own ? *own : fixed_tables(which);
  const ScalableInput stream = ScalableInput::take(input);
  const Decoded first = decode(tables, stream, kvs::Implementation::kPortable);
  for (const kvs::Implementation how : kvs::fuzz::implementations()) {
    const Decoded other = decode(tables, stream, how);
    kvs::fuzz::expect(other.fault == first.fault, "implementations differ in the fault");
    if (first.fault == Fault::kNone) {
      kvs::fuzz::expect(same_bits(other.values, first.values), "implementations differ in the values");
    }
  }
  return 0;
}
