// How the fuzzers' inputs are cut into arguments, and how seeds are put together from them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "../lossless.h"

namespace kvs::fuzz {

// Takes numbers from the front; beyond the end there are zeros.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint32_t take_byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  std::uint32_t take_short() {
    const std::uint32_t low = take_byte();
    return low | take_byte() << 8;
  }
  // Bytes in a place of their own, so that the sanitizer sees a read beyond their end.
  std::vector<std::uint8_t> take_bytes(std::size_t count) {
    count = std::min(count, size_);
    std::vector<std::uint8_t> taken(data_, data_ + count);
    data_ += count;
    size_ -= count;
    return taken;
  }
  std::vector<std::uint8_t> take_rest() { return take_bytes(size_); }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

// What Input takes, put together.
class Output {
 public:
  Output& put_byte(std::uint32_t value) {
    bytes_.push_back(static_cast<std::uint8_t>(value));
    return *this;
  }
  Output& put_short(std::uint32_t value) { return put_byte(value & 255).put_byte(value >> 8); }
  Output& put_bytes(std::span<const std::uint8_t> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  void write(const std::string& path) const {
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (file == nullptr || std::fwrite(bytes_.data(), 1, bytes_.size(), file) != bytes_.size() ||
        std::fclose(file) != 0) {
      std::perror(path.c_str());
      std::exit(1);
    }
  }

 private:
  std::vector<std::uint8_t> bytes_;
};

inline std::vector<Implementation> implementations() {
  std::vector<Implementation> all{Implementation::kPortable};
  if (has_avx2()) all.push_back(Implementation::kAvx2);
  if (has_avx512()) all.push_back(Implementation::kAvx512);
  return all;
}

// A finding: the fuzzer keeps the input that led here.
inline void expect(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "finding: %s\n", what);
  std::abort();
}

}  // namespace kvs::fuzz
