// Writes the corpora that the fuzzers start from: what the encoders make of a few sections.
//
//     write_seeds LOSSLESS_DIRECTORY SCALABLE_DIRECTORY

#include <cmath>
#include <random>

#include "lossless_input.h"
#include "scalable_input.h"

namespace {

using kvs::fuzz::LosslessInput;
using kvs::fuzz::Output;
using kvs::fuzz::ScalableInput;

std::mt19937 random_bits(1);

// About normal, by the sum of twelve uniform numbers.
float draw_normal() {
  float sum = -6;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random_bits() >> 8) / (1 << 24);
  return sum;
}

std::uint16_t bfloat16_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

void write_lossless(const std::string& path, const LosslessInput& shape, bool outliers) {
  const std::int64_t row = shape.section_heads * shape.dim, plane = row * shape.tokens;
  std::vector<std::uint16_t> values(static_cast<std::size_t>(plane) * shape.layers * shape.kinds);
  for (auto& value : values) {
    value = outliers && random_bits() % 20 == 0 ? static_cast<std::uint16_t>(random_bits())
                                                : bfloat16_of(draw_normal());
  }
  const kvs::SectionView<const std::uint16_t> view{
      values.data(), shape.layers,        shape.kinds, shape.tokens, shape.section_heads,
      shape.dim,     plane * shape.kinds, plane,       row,          shape.dim};
  Output seed;
  shape.put(seed);
  seed.put_bytes(kvs::encode_lossless(view, kvs::Implementation::kPortable));
  seed.write(path);
}

void write_scalable(const std::string& path, std::uint32_t which, std::uint32_t tokens, std::uint32_t count,
                    unsigned object_levels, unsigned levels, bool outliers) {
  kvs::fuzz::Input nothing(nullptr, 0);
  const auto tables = kvs::fuzz::take_tables(nothing, which);
  ScalableInput input{tokens, count, object_levels, levels, {}, {}, {}, {}};
  for (std::uint32_t i = 0; i < count; ++i) {
    input.classes.push_back(static_cast<std::uint8_t>(random_bits() % kvs::kClasses));
  }
  std::vector<float> y(std::size_t{tokens} * count);
  for (std::size_t i = 0; i < y.size(); ++i) {
    const auto k = static_cast<float>(input.classes[i % count]);
    y[i] = draw_normal() * std::exp2((k - 13) / 4) * (outliers && random_bits() % 30 == 0 ? 50.0f : 1.0f);
  }
  const auto stream = kvs::encode_scalable(*tables, input.classes, {y.data(), tokens, count}, object_levels,
                                           kvs::Implementation::kPortable);
  input.states = stream.states;
  std::copy(stream.words.begin(), stream.words.end(), input.words);
  input.escapes = stream.escapes;
  Output seed;
  seed.put_byte(which);
  input.put(seed);
  seed.write(path);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: write_seeds LOSSLESS_DIRECTORY SCALABLE_DIRECTORY\n");
    return 2;
  }
  constexpr LosslessInput kShapes[] = {{1, 1, 1, 1, 1, 0, 1, 0},   {1, 2, 16, 1, 1, 0, 1, 0},
                                       {1, 2, 20, 2, 8, 1, 1, 0},  {4, 2, 40, 1, 8, 0, 1, 0},
                                       {1, 1, 70, 1, 33, 0, 1, 0}, {2, 2, 24, 3, 20, 1, 2, 0},
                                       {1, 1, 80, 2, 64, 0, 2, 0}};
  int number = 0;
  for (const LosslessInput& shape : kShapes) {
    for (const bool outliers : {false, true}) {
      write_lossless(std::string(arguments[1]) + "/seed-" + std::to_string(number++), shape, outliers);
    }
  }
  for (const std::uint32_t dim : {1u, 16u, 40u}) {
    Output seed;
    LosslessInput{1, 2, 30, 1, dim, 0, 1, 1}.put(seed);
    seed.put_byte(100).put_byte(3).put_short(dim * 20).put_short(5);
    for (int i = 0; i < 256; ++i) seed.put_byte(random_bits() & 255);
    seed.write(std::string(arguments[1]) + "/seed-" + std::to_string(number++));
  }
  for (const std::uint32_t which : {0u, 1u}) {
    for (const unsigned object_levels : {1u, 2u, 3u}) {
      for (unsigned levels = 1; levels <= object_levels; ++levels) {
        for (const std::uint32_t components : {5u, 40u, 200u}) {
          const std::string path = std::string(arguments[2]) + "/seed-" + std::to_string(number++);
          write_scalable(path, which, 16, components, object_levels, levels, number % 2 == 0);
        }
      }
    }
  }
  return 0;
}
