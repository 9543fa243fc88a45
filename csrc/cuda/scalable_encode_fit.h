// Encoding codec 3 without a calibration, second kernel: the steps of each layer's K and V, and the means, of
// a stream, from those of its tokens that are no outliers. scalable_encode.cu has the whole.
//
// Doubles, in the order of kvstore_s3/codec/stream_map.py (`fit_uncalibrated`): the same operations, so the
// same steps.
#pragma once

#include <cmath>

#include "device_memory.h"
#include "launch.h"
#include "scalable_encode.h"
#include "scalable_encode_sums.h"

namespace kvs {

// A block for each stream. Shared memory: two counters.
struct FitStreams {
  static constexpr std::uint32_t kThreads = 256, kResident = 4;
  static constexpr std::uint32_t kSharedBytes = 16;
  static constexpr std::uint32_t kRounds = 4;
  static constexpr double kOutlier = 24.0, kLeastOutlier = 4.0;  // deviations
  static constexpr double kLoud = 8.0;                           // medians
  static constexpr std::uint32_t kMostLoud = 16;                 // one in so many tokens

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count;
  KvsPages pages;
  std::uint32_t item_bytes;

  KVS_DEVICE void operator()() const {
    for (std::uint32_t i = simt::block(); i < count; i += simt::blocks()) {
      if (jobs[i].calibrated == 0) fit(jobs[i]);
    }
  }

 private:
  struct Fit {
    EncodeSize size;
    EncodeScratch scratch;
    std::uint32_t kept;
  };

  KVS_DEVICE static std::uint32_t* counter() {
    return reinterpret_cast<std::uint32_t*>(simt::shared_memory());
  }

  KVS_DEVICE void fit(const KvsScalableEncodeJob& job) const {
    const EncodeSize size = EncodeSize::of(job, pages.dim, item_bytes);
    Fit fit{size, scratch_of(job, size), 0};
    for (std::uint32_t i = simt::thread(); i < size.numbers; i += simt::threads()) {
      fit.scratch.centers()[i] = 0;
    }
    for (std::uint32_t p = simt::thread(); p < size.planes; p += simt::threads()) {
      fit.scratch.deviations()[p] = 0;
    }
    for (std::uint32_t t = simt::thread(); t < size.tokens; t += simt::threads()) fit.scratch.marks()[t] = 0;
    for (std::uint32_t round = 0; round < kRounds; ++round) {
      fit.kept = count_kept(fit);
      if (fit.kept == 0) break;
      find_centers(fit);
      simt::sync_block();
      find_distances(fit);
      simt::sync_block();
      find_deviations(fit);
      mark_loud(fit);
      simt::sync_block();
      mark_far(fit);
      simt::sync_block();
      if (!drop_marked(fit)) break;
    }
    simt::sync_block();
    write_steps(fit);
    simt::sync_block();
    write_means(fit);
  }

  // Before and after, the counter is nobody's.
  template <typename Counts>
  KVS_DEVICE static std::uint32_t count_tokens(const Fit& fit, Counts counts) {
    simt::sync_block();
    if (simt::thread() == 0) *counter() = 0;
    simt::sync_block();
    std::uint32_t own = 0;
    for (std::uint32_t t = simt::thread(); t < fit.size.tokens; t += simt::threads()) own += counts(t);
    if (own != 0) simt::atomic_add(counter(), own);
    simt::sync_block();
    return *counter();
  }

  KVS_DEVICE static std::uint32_t count_kept(const Fit& fit) {
    const std::uint8_t* exact = fit.scratch.exact();
    return count_tokens(fit, [exact](std::uint32_t t) { return exact[t] == 0 ? 1u : 0u; });
  }

  // True where tokens were.
  KVS_DEVICE static bool drop_marked(const Fit& fit) {
    std::uint8_t* exact = fit.scratch.exact();
    std::uint32_t* marks = fit.scratch.marks();
    return count_tokens(fit, [exact, marks](std::uint32_t t) {
             if (marks[t] == 0) return 0u;
             exact[t] = 1;
             marks[t] = 0;
             return 1u;
           }) != 0;
  }

  KVS_DEVICE static void find_centers(const Fit& fit) {
    const std::uint8_t* exact = fit.scratch.exact();
    for (std::uint32_t i = simt::thread(); i < fit.size.numbers; i += simt::threads()) {
      const float* x = fit.scratch.x() + i;
      const std::uint64_t numbers = fit.size.numbers;
      double sum = 0;
      each_coded(
          exact, fit.size.tokens,
          [&](std::uint32_t t) { return load_constant(x + std::uint64_t{t} * numbers); },
          [&](std::uint32_t, float value) { sum += static_cast<double>(value); });
      fit.scratch.centers()[i] = sum / fit.kept;
    }
  }

  // Root mean square of each token's plane about the center, and its furthest value: eight lanes for each,
  // four tokens to a warp. Those of exact tokens are of no meaning.
  KVS_DEVICE static void find_distances(const Fit& fit) {
    const EncodeSize& size = fit.size;
    const std::uint32_t fours = (size.tokens + 3) / 4;
    for (std::uint32_t i = simt::warp(); i < fours * size.planes; i += simt::warps()) {
      const std::uint32_t plane = i % size.planes, wanted = i / size.planes * 4 + simt::lane() / 8;
      const std::uint32_t token = wanted < size.tokens ? wanted : size.tokens - 1;
      const float* x = fit.scratch.x() + std::uint64_t{token} * size.numbers + plane * size.dim;
      const double* center = fit.scratch.centers() + plane * size.dim;
      double most = 0;
      const double sum = sum_pairwise<double>(size.dim, [&](std::uint32_t leaf) {
        const double found = sum_leaf_by_eight(leaf, [&](std::uint32_t at) {
          const double away = std::fabs(static_cast<double>(load_constant(x + at)) - center[at]);
          most = away > most ? away : most;
          return away * away;
        });
        x += leaf;
        center += leaf;
        return found;
      });
      KVS_UNROLL for (std::uint32_t mask = 1; mask < 8; mask *= 2) {
        const double other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      if (simt::lane() % 8 == 0 && wanted < size.tokens) {
        const std::uint64_t place = std::uint64_t{token} * size.planes + plane;
        fit.scratch.distances()[place] = std::sqrt(sum / size.dim);
        fit.scratch.furthest()[place] = most;
      }
    }
  }

  KVS_DEVICE static void find_deviations(const Fit& fit) {
    const std::uint8_t* exact = fit.scratch.exact();
    for (std::uint32_t p = simt::thread(); p < fit.size.planes; p += simt::threads()) {
      const double* distances = fit.scratch.distances() + p;
      double sum = 0;
      each_coded(
          exact, fit.size.tokens,
          [&](std::uint32_t t) { return distances[std::uint64_t{t} * fit.size.planes]; },
          [&](std::uint32_t, double distance) { sum += distance * distance; });
      fit.scratch.deviations()[p] = std::sqrt(sum / fit.kept);
    }
  }

  // One plane's distances of tokens that are kept, which a warp goes through.
  struct PlaneDistances {
    const double* from;
    const std::uint8_t* exact;
    std::uint32_t tokens, planes;

    template <typename See>
    KVS_DEVICE void each(See see) const {
      for (std::uint32_t t = simt::lane(); t < tokens; t += simt::kWarp) {
        if (exact[t] != 1) see(from[std::uint64_t{t} * planes], t);
      }
    }
    template <typename Condition>
    KVS_DEVICE std::uint32_t count(Condition condition) const {
      std::uint32_t found = 0;
      each([&](double distance, std::uint32_t) { found += condition(distance) ? 1 : 0; });
      for (std::uint32_t mask = 16; mask != 0; mask /= 2) found += simt::shuffle_xor(found, mask);
      return found;
    }
  };

  // Tokens far from the mean as a whole. A token can be that only if at least half of the others are nearer
  // than an eighth of the furthest's distance: rarely, so the median is rarely looked for.
  KVS_DEVICE static void mark_loud(const Fit& fit) {
    const std::uint8_t* exact = fit.scratch.exact();
    for (std::uint32_t p = simt::warp(); p < fit.size.planes; p += simt::warps()) {
      const PlaneDistances distances{fit.scratch.distances() + p, exact, fit.size.tokens, fit.size.planes};
      double most = 0;
      distances.each([&](double distance, std::uint32_t) { most = distance > most ? distance : most; });
      for (std::uint32_t mask = 16; mask != 0; mask /= 2) {
        const double other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      const double near = most / kLoud;
      if (distances.count([near](double distance) { return distance < near; }) < (fit.kept + 1) / 2) continue;
      const double loud = kLoud * find_median(distances, fit.kept);
      const std::uint32_t found = distances.count([loud](double distance) { return distance > loud; });
      const std::uint32_t few = fit.kept / kMostLoud > 1 ? fit.kept / kMostLoud : 1;
      if (found > few) continue;
      distances.each([&](double distance, std::uint32_t t) {
        if (distance > loud) simt::atomic_max(fit.scratch.marks() + t, 1);
      });
    }
  }

  // Bit by bit from the highest: numbers that are not negative are ordered as their bits are.
  KVS_DEVICE static double find_median(const PlaneDistances& distances, std::uint32_t kept) {
    const std::uint32_t rank = (kept - 1) / 2;  // of the lower of both middles
    std::uint64_t lower = 0;
    for (std::uint64_t bit = 1ull << 62; bit != 0; bit /= 2) {
      const std::uint64_t candidate = lower | (bit - 1);
      const std::uint32_t below = distances.count(
          [candidate](double distance) { return std::bit_cast<std::uint64_t>(distance) <= candidate; });
      if (below <= rank) lower |= bit;
    }
    const auto middle = std::bit_cast<double>(lower);
    if (kept % 2 != 0) return middle;
    if (distances.count([middle](double distance) { return distance <= middle; }) >= rank + 2) return middle;
    double upper = std::bit_cast<double>(0x7FEFFFFFFFFFFFFFull);
    distances.each([&](double distance, std::uint32_t) {
      if (distance > middle && distance < upper) upper = distance;
    });
    for (std::uint32_t mask = 16; mask != 0; mask /= 2) {
      const double other = shuffle_xor(upper, mask);
      upper = other < upper ? other : upper;
    }
    return (middle + upper) / 2;
  }

  KVS_DEVICE static void mark_far(const Fit& fit) {
    const EncodeSize& size = fit.size;
    const double most = 0.5 * std::sqrt(static_cast<double>(std::uint64_t{fit.kept} * size.dim));
    const double least = most < kOutlier ? most : kOutlier,
                 limit = least > kLeastOutlier ? least : kLeastOutlier;
    const std::uint8_t* exact = fit.scratch.exact();
    for (std::uint32_t t = simt::thread(); t < size.tokens; t += simt::threads()) {
      if (exact[t] == 1) continue;
      const double* furthest = fit.scratch.furthest() + std::uint64_t{t} * size.planes;
      bool far = false;
      for (std::uint32_t p = 0; p < size.planes; ++p)
        far |= furthest[p] > limit * fit.scratch.deviations()[p];
      if (far) fit.scratch.marks()[t] = 1;
    }
  }

  KVS_DEVICE static void write_steps(const Fit& fit) {
    constexpr double kLeastStep = 0x1p-126, kMostStep = 1e30;
    for (std::uint32_t p = simt::thread(); p < fit.size.planes; p += simt::threads()) {
      const double deviation = fit.scratch.deviations()[p];
      double step = deviation > 0 ? deviation * (p % 2 == 0 ? 0.10 : 0.14) : 1.0;
      step = step < kLeastStep ? kLeastStep : step;
      step = step > kMostStep ? kMostStep : step;
      fit.scratch.steps()[p] = static_cast<float>(step);
    }
  }

  KVS_DEVICE static void write_means(const Fit& fit) {
    for (std::uint32_t i = simt::thread(); i < fit.size.numbers; i += simt::threads()) {
      const double step = fit.scratch.steps()[i / fit.size.dim];
      double mean = std::rint(fit.scratch.centers()[i] / (9 * step));
      mean = mean < -127 ? -127 : mean;
      mean = mean > 127 ? 127 : mean;
      fit.scratch.means()[i] = static_cast<std::int8_t>(mean);
    }
  }
};

}  // namespace kvs
