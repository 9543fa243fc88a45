// Encoding codec 3: components rounded to numbers, their classes, and the order in which they are coded: a
// block for each stream. scalable_encode.cu has the whole.
//
// What decides is what kvstore_s3/codec/tables.py (`classes_of`) and stream_map.py (`_worth_giving`) compute,
// in the same order; logarithms and powers come as tables from the host.
#pragma once

#include "class_sort.h"
#include "device_memory.h"
#include "launch.h"
#include "scalable_encode.h"
#include "scalable_encode_sums.h"

namespace kvs {

// A component's y over all tokens.
class ComponentValues {
 public:
  KVS_DEVICE ComponentValues(const KvsScalableEncodeJob& job, const EncodeSize& size,
                             const EncodeScratch& scratch, std::uint32_t c)
      : from_((job.matrix_bytes != 0 ? scratch.y() : scratch.x()) + c),
        stride_(job.matrix_bytes != 0 ? size.components : size.numbers),
        uncalibrated_(job.calibrated == 0) {
    if (uncalibrated_) {
      scale_ = scratch.steps()[c / size.dim];
      shift_ = 9.0f * static_cast<float>(scratch.means()[c]);
    } else if (job.matrix_bytes == 0) {
      scale_ = reinterpret_cast<const float*>(job.scale)[c];
    }
  }

  KVS_DEVICE float operator()(std::uint32_t token) const {
    const float x = load_constant(from_ + token * stride_);
    return uncalibrated_ ? x / scale_ - shift_ : x * scale_;
  }

 private:
  const float* from_;
  std::uint64_t stride_;
  bool uncalibrated_;
  float scale_ = 1, shift_ = 0;
};

// Shared memory: counters of classes, and what the block agrees on.
struct ClassStreams {
  static constexpr std::uint32_t kThreads = 256, kResident = 4;
  static constexpr std::uint32_t kSharedBytes = 4 * kClasses + 16;

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count;
  const PackedPushes* tables;
  KvsPages pages;
  std::uint32_t item_bytes;

  KVS_DEVICE void operator()() const {
    for (std::uint32_t i = simt::block(); i < count; i += simt::blocks()) find(jobs[i]);
  }

 private:
  struct Stream {
    const KvsScalableEncodeJob& job;
    EncodeSize size;
    EncodeScratch scratch;
    std::uint32_t kept;
  };

  struct Seen {
    double squares;
    float most;
    bool beyond;
  };

  KVS_DEVICE static std::uint32_t* counters() {
    return reinterpret_cast<std::uint32_t*>(simt::shared_memory());
  }
  KVS_DEVICE static std::uint32_t* agreed() { return counters() + kClasses; }

  KVS_DEVICE void find(const KvsScalableEncodeJob& job) const {
    const EncodeSize size = EncodeSize::of(job, pages.dim, item_bytes);
    Stream stream{job, size, scratch_of(job, size), 0};
    stream.kept = settle_tokens(stream, false);
    if (stream.kept != 0) {
      // Components beyond the quantiser make their tokens exact, which then count for no class: once more.
      if (!round_and_class(stream)) {
        stream.kept = settle_tokens(stream, true);
        if (stream.kept != 0) round_and_class(stream);
      }
    }
    EncodedStream found{};
    found.exact = size.tokens - stream.kept;
    found.raw = stream.kept == 0 || found.exact > kMostExact ? 1 : 0;
    if (found.raw == 0) {
      simt::sync_block();  // classes are there
      found.explicit_classes = choose_classes(stream) ? 1 : 0;
      simt::sync_block();
      if (simt::warp() == 0) sort(stream, found);
      if (simt::warp() == simt::warps() - 1) list_exact(stream);
    }
    if (simt::thread() == 0) stream.scratch.stream() = found;
    simt::sync_block();  // before the next stream's counters
  }

  // How many tokens are coded. `marked`: those that were marked become exact first.
  KVS_DEVICE static std::uint32_t settle_tokens(const Stream& stream, bool marked) {
    std::uint8_t* exact = stream.scratch.exact();
    std::uint32_t* marks = stream.scratch.marks();
    simt::sync_block();
    if (simt::thread() == 0) agreed()[0] = agreed()[1] = 0;
    simt::sync_block();
    std::uint32_t own = 0;
    for (std::uint32_t t = simt::thread(); t < stream.size.tokens; t += simt::threads()) {
      if (marked && marks[t] != 0) exact[t] = 1;
      if (!marked) marks[t] = 0;
      own += exact[t] == 0 ? 1 : 0;
    }
    if (own != 0) simt::atomic_add(agreed(), own);
    simt::sync_block();
    return *agreed();
  }

  // Numbers and classes of all components; false where a component was beyond what can be coded: its tokens
  // are marked, and classes not to be used.
  KVS_DEVICE bool round_and_class(const Stream& stream) const {
    bool beyond = false;
    for (std::uint32_t c = simt::thread(); c < stream.size.components; c += simt::threads()) {
      const ComponentValues values(stream.job, stream.size, stream.scratch, c);
      const Seen seen = round(stream, values, c);
      beyond |= seen.beyond;
      stream.scratch.classes()[c] = static_cast<std::uint8_t>(class_of(stream, values, seen));
    }
    if (beyond) simt::atomic_max(agreed() + 1, 1);
    simt::sync_block();
    return agreed()[1] == 0;
  }

  // What is added to this is rounded to an integer, ties to even, and stands in the low bits.
  static constexpr float kRounder = 12582912.0f;

  KVS_DEVICE static Seen round(const Stream& stream, const ComponentValues& values, std::uint32_t c) {
    const std::uint8_t* exact = stream.scratch.exact();
    std::int16_t* to = stream.scratch.rounded() + c;
    const std::uint64_t stride = stream.size.components;
    Seen seen{};
    each_coded(exact, stream.size.tokens, values, [&](std::uint32_t t, float y) {
      const float magnitude = y < 0 ? -y : y;
      store_value(to + t * stride, static_cast<std::int16_t>(std::bit_cast<std::uint32_t>(y + kRounder)));
      if (!(magnitude < kLargest)) {
        simt::atomic_max(stream.scratch.marks() + t, 1);
        seen.beyond = true;
      }
      seen.most = magnitude > seen.most ? magnitude : seen.most;
      seen.squares = add_square(seen.squares, magnitude);
    });
    return seen;
  }

  KVS_DEVICE std::uint32_t class_of(const Stream& stream, const ComponentValues& values,
                                    const Seen& seen) const {
    // The uncalibrated tables' first classes of levels 1 and 0, and what is cut off below them.
    constexpr std::uint32_t kFirst[2] = {4, 10};
    constexpr float kLimits[2] = {1.5f, 4.5f}, kMostExcess = 0.01f;
    if (seen.most <= 0.5f || seen.beyond) return 0;
    const double square = seen.squares / stream.kept;
    std::uint32_t k = 0;
    for (std::uint32_t step = 32; step != 0; step /= 2) {
      if (k + step < kClasses && square >= tables->borders[k + step]) k += step;
    }
    for (std::uint32_t i = 0; i < keep(2); ++i) {  // not unrolled: what is rare shall not be there twice
      const bool suspect = k < kFirst[i] && seen.most > kLimits[i];
      if (suspect && find_excess(stream, values, kLimits[i]) > kMostExcess) k = kFirst[i];
    }
    return k;
  }

  // Mean square of what lies beyond `limit`: outliers, which are rare.
  KVS_DEVICE static float find_excess(const Stream& stream, const ComponentValues& values, float limit) {
    const std::uint8_t* exact = stream.scratch.exact();
    std::uint32_t token = 0;
    auto next = [&] {
      while (exact[token] == 1) ++token;
      const float y = values(token++), excess = (y < 0 ? -y : y) - limit;
      return excess > 0 ? excess * excess : 0.0f;
    };
    const float sum =
        sum_pairwise<float>(stream.kept, [&next](std::uint32_t leaf) { return sum_leaf<float>(leaf, next); });
    return sum / static_cast<float>(stream.kept);
  }

  // Whether the stream gives the classes that were found. Where it does not, the static ones replace them.
  KVS_DEVICE bool choose_classes(const Stream& stream) const {
    if (stream.job.calibrated == 0) return true;
    const std::uint32_t components = stream.size.components;
    const auto* known = reinterpret_cast<const std::uint8_t*>(stream.job.classes);
    std::uint8_t* classes = stream.scratch.classes();
    if (simt::warp() == 0) {
      const double saved = sum_saved(classes, known, components) * stream.size.tokens;
      if (simt::lane() == 0) agreed()[0] = saved > static_cast<double>(8ull * components + 64) ? 1 : 0;
    }
    simt::sync_block();
    const bool given = agreed()[0] != 0;
    for (std::uint32_t c = simt::thread(); c < components && !given; c += simt::threads()) {
      classes[c] = static_cast<std::uint8_t>(sound_class(known[c]));
    }
    return given;
  }

  // What a calibration says was checked where it was read; this one can do no harm in any case.
  KVS_DEVICE static std::uint32_t sound_class(std::uint32_t k) { return k < kClasses ? k : kClasses - 1; }

  KVS_DEVICE double sum_saved(const std::uint8_t* classes, const std::uint8_t* known,
                              std::uint32_t components) const {
    std::uint32_t begin = 0;
    return sum_pairwise<double>(components, [&](std::uint32_t leaf) {
      const double sum = sum_leaf_by_eight(leaf, [&](std::uint32_t i) {
        return tables->gains[classes[begin + i]][sound_class(known[begin + i])];
      });
      begin += leaf;
      return sum;
    });
  }

  // The order of coding, by one warp, whose first lane learns how many are coded.
  KVS_DEVICE void sort(const Stream& stream, EncodedStream& found) const {
    const std::uint8_t* classes = stream.scratch.classes();
    std::uint16_t* order = stream.scratch.order();
    const std::uint32_t least = tables->first[stream.size.levels - 1];
    sort_by_class(
        stream.size.components, counters(),
        [classes](std::uint32_t c) -> std::uint32_t { return classes[c]; },
        [&](std::uint32_t k, std::uint32_t end) {
          KVS_UNROLL for (std::uint32_t level = 0; level < kLevels; ++level) {
            if (k >= tables->first[level]) found.coded[level] = end;
          }
        },
        [=](std::uint32_t place, std::uint32_t c, std::uint32_t k) {
          if (k >= least) order[place] = static_cast<std::uint16_t>(c);
        });
  }

  KVS_DEVICE static void list_exact(const Stream& stream) {
    const std::uint8_t* exact = stream.scratch.exact();
    std::uint16_t* to = stream.scratch.exact_tokens();
    for (std::uint32_t begin = 0; begin < stream.size.tokens; begin += simt::kWarp) {
      const std::uint32_t token = begin + simt::lane();
      const bool listed = token < stream.size.tokens && exact[token] != 0;
      const std::uint32_t all = simt::ballot(listed);
      if (listed) to[simt::count_bits(all & simt::lanes_before())] = static_cast<std::uint16_t>(token);
      to += simt::count_bits(all);
    }
  }
};

}  // namespace kvs
