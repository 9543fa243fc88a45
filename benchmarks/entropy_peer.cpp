// The rANS loops of the scalable codec's base level beside htscodecs' rANS 32x16, order 0, on the same
// symbols in the same run. Prints a JSON array. benchmarks/entropy.py builds and runs it.

#include <htscodecs/rANS_static4x16.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../csrc/cpu/scalable_decode_rows.h"
#include "../csrc/cpu/scalable_encode_rows.h"
#include "../csrc/lossless.h"
#include "../csrc/scalable_tables.h"

namespace {

using namespace kvs;

constexpr std::uint64_t kTokens = 256, kBlocks = 128, kCount = kTokens * kBlocks * kLanes;
constexpr int kRounds = 15;
constexpr std::uint32_t kClass = 47;

void expect(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

double seconds_of(const std::function<void()>& work) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double begin = now();
  work();
  return now() - begin;
}

// Numbers around 0, 127 at most, in coding order: [block][token][lane].
std::vector<std::int16_t> draw(bool laplace, double scale) {
  std::mt19937_64 bits(7);
  std::normal_distribution<double> normal(0, scale);
  std::exponential_distribution<double> one_sided(1 / scale);
  std::vector<std::int16_t> numbers(kCount);
  for (auto& number : numbers) {
    const double value = laplace ? (bits() & 1 ? 1 : -1) * one_sided(bits) : normal(bits);
    number = static_cast<std::int16_t>(std::lround(std::clamp(value, -120.0, 120.0)));
  }
  return numbers;
}

std::vector<double> histogram_of(const std::vector<std::int16_t>& numbers) {
  std::vector<double> counts(kBaseSymbols);
  for (const auto number : numbers) ++counts[static_cast<std::size_t>(number + kBaseOffset)];
  return counts;
}

double entropy_of(const std::vector<std::int16_t>& numbers) {
  double bits = 0;
  for (const double count : histogram_of(numbers)) {
    if (count > 0) bits -= count / kCount * std::log2(count / kCount);
  }
  return bits;
}

// The scale whose numbers have that entropy, by bisection.
std::vector<std::int16_t> draw_with_entropy(bool laplace, double bits) {
  double low = 0.05, high = 40;
  for (int i = 0; i < 12; ++i) {
    const double middle = std::sqrt(low * high);
    (entropy_of(draw(laplace, middle)) < bits ? low : high) = middle;
  }
  return draw(laplace, low);
}

// Every symbol that occurs gets at least 1, the most frequent one what is left.
ScalableTables tables_for(const std::vector<std::int16_t>& numbers) {
  const std::vector<double> counts = histogram_of(numbers);
  std::vector<std::uint16_t> base(kClasses * kBaseSymbols), refine(2 * kClasses * kContexts * 2);
  const std::vector<float> shift(kLevels * kClasses);
  const std::uint8_t first[] = {kClass, kClass, kClass};
  std::uint16_t* frequencies = base.data() + kClass * kBaseSymbols;
  std::uint32_t sum = frequencies[kBaseEscape] = 1;
  for (std::uint32_t s = 0; s < kBaseEscape; ++s) {
    if (counts[s] > 0) frequencies[s] = static_cast<std::uint16_t>(1 + counts[s] / kCount * (kSlots - 256));
    sum += frequencies[s];
  }
  *std::max_element(frequencies, frequencies + kBaseSymbols) += static_cast<std::uint16_t>(kSlots - sum);
  for (std::size_t i = 0; i < refine.size(); i += 2) refine[i] = 1000, refine[i + 1] = 3000;
  return ScalableTables({first, base.data(), refine.data(), shift.data()});
}

struct Coder {
  std::string name;
  std::function<void()> encode, decode;
  std::function<std::size_t()> size;
  double encode_seconds = 1e9, decode_seconds = 1e9;
};

// The row loops of one implementation, block after block, into one stream of words.
class OurCoder {
 public:
  OurCoder(const std::vector<std::int16_t>& numbers, PushBase* push, BaseRows* pop)
      : tables_(tables_for(numbers)),
        push_(push),
        pop_(pop),
        finest_(numbers),
        decoded_(kCount),
        buffer_(LevelSink::kWideStore + 2 * kCount) {
    for (auto& number : finest_) number = static_cast<std::int16_t>(9 * number);
  }

  void encode() {
    LevelSink to{buffer_.data() + buffer_.size(), nullptr};
    std::fill_n(first_.state, kLanes, kStateMin);
    BasePushes block{};
    block.pushes = tables_.base_pushes();
    block.lanes = kLanes;
    std::fill_n(block.table, kLanes, tables_.base_pushes_of(kClass));
    for (std::uint64_t index = kBlocks; index-- > 0;) {
      block.numbers = finest_.data() + index * kTokens * kLanes;
      push_(to, first_, block, kTokens);
    }
    words_ = to.words;
  }

  void decode() {
    LevelSource from(words_, buffer_.data() + buffer_.size(), nullptr, nullptr);
    LaneStates states;
    std::copy_n(first_.state, kLanes, states.state);
    BaseBlock block{};
    block.slots = tables_.slots();
    block.lanes = kLanes;
    std::fill_n(block.table, kLanes, tables_.slots_of(kClass));
    set_bounds(block);
    for (std::uint64_t index = 0; index < kBlocks; ++index) {
      block.numbers = decoded_.data() + index * kTokens * kLanes;
      std::uint64_t done = pop_(from, states, block, 0, kTokens);
      if (done < kTokens && !from.padded) {
        from.pad();
        done = pop_(from, states, block, done, kTokens);
      }
      if (done < kTokens) decode_base_portable(from, states, block, done, kTokens);
    }
    expect(!from.failed && from.read_to_the_end(), "our decoder did not end where the words end");
  }

  // As the codec does it: tables of few symbols are compared with, others looked up.
  void set_bounds(BaseBlock& block) const {
    const BaseBounds& bounds = tables_.bounds_of(kClass);
    block.bound_count = bounds.count;
    if (bounds.count > kMostBounds) return;
    std::fill_n(block.first, kLanes, bounds.first);
    for (std::uint32_t i = 0; i <= kMostBounds; ++i) {
      const std::uint32_t from = i < bounds.count ? i : kMostBounds;
      std::fill_n(block.bounds[i], kLanes, bounds.bounds[from]);
      std::fill_n(block.entries[i], kLanes, bounds.entries[from]);
    }
  }

  std::size_t size() const { return buffer_.data() + buffer_.size() - words_ + sizeof first_; }
  const std::vector<std::int16_t>& decoded() const { return decoded_; }

 private:
  ScalableTables tables_;
  PushBase* push_;
  BaseRows* pop_;
  std::vector<std::int16_t> finest_, decoded_;
  std::vector<std::uint8_t> buffer_;
  const std::uint8_t* words_ = nullptr;
  PushStates first_;
};

class PeerCoder {
 public:
  PeerCoder(const std::vector<std::int16_t>& numbers, int cpu)
      : cpu_(cpu),
        symbols_(kCount),
        decoded_(kCount),
        coded_(rans_compress_bound_4x16(kCount, RANS_ORDER_X32)) {
    std::transform(numbers.begin(), numbers.end(), symbols_.begin(),
                   [](std::int16_t number) { return static_cast<unsigned char>(number + kBaseOffset); });
  }

  void encode() {
    rans_set_cpu(cpu_);
    size_ = static_cast<unsigned>(coded_.size());
    expect(rans_compress_to_4x16(symbols_.data(), kCount, coded_.data(), &size_, RANS_ORDER_X32) != nullptr,
           "htscodecs did not encode");
  }

  void decode() {
    rans_set_cpu(cpu_);
    unsigned size = kCount;
    expect(rans_uncompress_to_4x16(coded_.data(), size_, decoded_.data(), &size) != nullptr && size == kCount,
           "htscodecs did not decode");
  }

  std::size_t size() const { return size_; }
  bool sound() const { return decoded_ == symbols_; }

 private:
  int cpu_;
  std::vector<unsigned char> symbols_, decoded_, coded_;
  unsigned size_ = 0;
};

template <typename Any>
Coder coder_of(const char* name, Any& any) {
  return {name, [&any] { any.encode(); }, [&any] { any.decode(); }, [&any] { return any.size(); }};
}

void measure(const char* shape, double bits, bool last) {
  const std::vector<std::int16_t> numbers = draw_with_entropy(shape[0] == 'L', bits);
  OurCoder portable(numbers, encode_base_portable, decode_base_portable);
  OurCoder avx2(numbers, encode_base_avx2, decode_base_avx2);
  OurCoder avx512(numbers, encode_base_avx512, decode_base_avx512);
  PeerCoder peer_avx2(numbers, RANS_CPU_ENC_AVX2 | RANS_CPU_DEC_AVX2);
  PeerCoder peer_avx512(numbers, RANS_CPU_ENC_AVX512 | RANS_CPU_DEC_AVX512);
  std::vector<Coder> coders{coder_of("ours portable", portable)};
  if (has_avx2()) {
    coders.push_back(coder_of("ours avx2", avx2));
    coders.push_back(coder_of("htscodecs 32x16 avx2", peer_avx2));
  }
  if (has_avx512()) {
    coders.push_back(coder_of("ours avx512", avx512));
    coders.push_back(coder_of("htscodecs 32x16 avx512", peer_avx512));
  }
  for (int round = 0; round < kRounds; ++round) {
    for (Coder& coder : coders) {
      coder.encode_seconds = std::min(coder.encode_seconds, seconds_of(coder.encode));
      coder.decode_seconds = std::min(coder.decode_seconds, seconds_of(coder.decode));
    }
  }
  expect(portable.decoded() == numbers, "the portable loops did not give the symbols back");
  expect(!has_avx2() || (avx2.decoded() == numbers && peer_avx2.sound()),
         "AVX2 did not give the symbols back");
  expect(!has_avx512() || (avx512.decoded() == numbers && peer_avx512.sound()),
         "AVX-512 did not give the symbols back");
  std::printf("{\"shape\": \"%s\", \"entropy\": %.3f, \"symbols\": %llu, \"coders\": {", shape,
              entropy_of(numbers), static_cast<unsigned long long>(kCount));
  for (const Coder& coder : coders) {
    std::printf("%s\"%s\": {\"bits\": %.4f, \"encode_gsym_s\": %.4f, \"decode_gsym_s\": %.4f}",
                &coder == &coders[0] ? "" : ", ", coder.name.c_str(), 8.0 * coder.size() / kCount,
                1e-9 * kCount / coder.encode_seconds, 1e-9 * kCount / coder.decode_seconds);
  }
  std::printf("}}%s\n", last ? "" : ",");
}

}  // namespace

int main() {
  std::printf("[");
  for (const double bits : {1.0, 2.0, 4.0}) {
    measure("Laplace", bits, false);
    measure("Gauss", bits, bits == 4.0);
  }
  std::printf("]\n");
  return 0;
}
