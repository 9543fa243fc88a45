// Any bytes, as a payload of any shape: every implementation must refuse them with the same fault or decode
// them to the same values, and touch nothing beside them.

#include "lossless_input.h"

namespace {

using kvs::Fault;
using kvs::fuzz::LosslessInput;

constexpr std::uint32_t kGap = 3;  // values between two tokens, which must stay as they are
constexpr std::uint16_t kUntouched = 0xA5C3;

struct Decoded {
  Fault fault;
  std::vector<std::uint16_t> values;
};

Decoded decode(const LosslessInput& shape, std::span<const std::uint8_t> payload, kvs::Implementation how) {
  const std::int64_t row = shape.heads * shape.dim, stride = row + kGap, plane = stride * shape.tokens;
  const std::size_t size = static_cast<std::size_t>(plane) * shape.layers * shape.kinds - kGap;
  Decoded decoded{Fault::kNone, std::vector<std::uint16_t>(size, kUntouched)};
  const kvs::SectionView<std::uint16_t> view{
      decoded.values.data(), shape.layers, shape.kinds, shape.tokens, shape.heads, shape.dim,
      plane * shape.kinds,   plane,        stride,      shape.dim};
  decoded.fault = kvs::decode_lossless(payload, view, shape.head_begin, shape.section_heads, how);
  for (std::size_t i = static_cast<std::size_t>(row); i < size; i += static_cast<std::size_t>(stride)) {
    for (std::size_t gap = i; gap < i + kGap; ++gap) {
      kvs::fuzz::expect(decoded.values[gap] == kUntouched, "a value outside of the section was written");
    }
  }
  return decoded;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvs::fuzz::Input input(data, size);
  const LosslessInput shape = LosslessInput::take(input);
  const std::vector<std::uint8_t> payload = shape.take_payload(input);
  const Decoded first = decode(shape, payload, kvs::Implementation::kPortable);
  for (const kvs::Implementation how : kvs::fuzz::implementations()) {
    const Decoded other = decode(shape, payload, how);
    kvs::fuzz::expect(other.fault == first.fault, "implementations differ in the fault");
    if (first.fault == Fault::kNone) {
      kvs::fuzz::expect(other.values == first.values, "implementations differ in the values");
    }
  }
  return 0;
}
