// What a product on tensor cores is made of, and its emulation: copies into shared memory that arrive later,
// loads of small matrices from there, and the product itself. A warp holds a [16][16] and b [16][8] in
// float16 and adds their product to sums [16][8] of floats. Which lane holds what is that of PTX's
// mma.m16n8k16: lane 4 g + p has, as pairs of neighbours,
//   a: rows g, g + 8, g, g + 8 at columns 2 p, 2 p, 2 p + 8, 2 p + 8;
//   b: rows 2 p and 2 p + 8 of column g;
//   sums: row g at columns 2 p and 2 p + 1, then row g + 8.
#pragma once

#include "scalable_values.h"
#include "shared_memory.h"
#include "simt.h"

#ifndef __CUDACC__
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#endif

namespace kvs {

#ifdef __CUDACC__

KVS_DEVICE void add_tensor_product(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b_first,
                                   std::uint32_t b_second) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_first), "r"(b_second));
}

// Four matrices [8][8] of 16 bits: lane i says where row i % 8 of matrix i / 8 lies, 16 bytes in shared
// memory; lane 4 g + p gets of each matrix column g of rows 2 p and 2 p + 1.
KVS_DEVICE void load_turned(std::uint32_t (&to)[4], std::uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// Begins to copy 16 bytes into shared memory, or zeros where `there` is not so; both sides are at multiples
// of 16.
KVS_DEVICE void copy_later(std::uint32_t to, const void* from, bool there) {
  const std::uint32_t bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// What was begun since the call before is one batch.
KVS_DEVICE void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until this thread's batches have arrived, but for the last `kOnTheirWay`.
template <int kOnTheirWay>
KVS_DEVICE void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOnTheirWay) : "memory");
}

#else

struct TensorOperands {
  float a[16][16], b[16][8];
};

// A sum and eight products as a tensor core of 8.0 adds them, and later ones no worse: all are cut off at a
// bit below the last that the largest of them has as a float; so is their sum, at its own.
inline float add_cut_off(float sum, const double (&products)[8]) {
  constexpr int kBits = 24;
  const auto exponent_of = [](double value) {
    return static_cast<int>(std::bit_cast<std::uint64_t>(value) >> 52 & 0x7FF);
  };
  const auto cut = [](double value, int exponent, int bits) {  // exponents are biased by 1,023
    const auto power = [](int of) { return std::bit_cast<double>(static_cast<std::uint64_t>(of) << 52); };
    const int unit = exponent - bits;
    return std::trunc(value * power(2046 - unit)) * power(unit);
  };
  int largest = exponent_of(sum);
  for (const double product : products) largest = std::max(largest, exponent_of(product));
  if (largest == 0 || largest == 0x7FF) return sum;
  double all = cut(sum, largest, kBits);
  for (const double product : products) all += cut(product, largest, kBits);
  return all == 0 ? 0.0f : static_cast<float>(cut(all, exponent_of(all), kBits - 1));
}

inline void add_tensor_product(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b_first,
                               std::uint32_t b_second) {
  const emulator::races::Pause pause;
  static thread_local TensorOperands of_warps[32];
  TensorOperands& given = of_warps[simt::warp()];
  const std::uint32_t g = simt::lane() / 4, p = simt::lane() % 4;
  for (std::uint32_t i = 0; i < 8; ++i)
    given.a[g + i / 2 % 2 * 8][2 * p + i / 4 * 8 + i % 2] =
        widen_float16_bits(a[i / 2] >> 16 * (i % 2) & 0xFFFF);
  for (std::uint32_t i = 0; i < 4; ++i)
    given.b[2 * p + i / 2 * 8 + i % 2][g] =
        widen_float16_bits((i / 2 ? b_second : b_first) >> 16 * (i % 2) & 0xFFFF);
  emulator::meet_warp(emulator::Meeting::kMatrix, 0, [&](const std::uint32_t*, std::uint32_t) {
    for (std::uint32_t i = 0; i < 4; ++i) {
      for (std::uint32_t begin = 0; begin < 16; begin += 8) {
        double products[8];
        for (std::uint32_t k = 0; k < 8; ++k)
          products[k] =
              static_cast<double>(given.a[g + i / 2 * 8][begin + k]) * given.b[begin + k][2 * p + i % 2];
        sums[i] = add_cut_off(sums[i], products);
      }
    }
    return 0u;
  });
}

inline void load_turned(std::uint32_t (&to)[4], std::uint32_t row) {
  emulator::meet_warp(emulator::Meeting::kMatrix, row, [&to](const std::uint32_t* rows, std::uint32_t own) {
    for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t* of = rows + 8 * i + own % 4 * 2;
      to[i] = load_shared_16(of[0] + own / 4 * 2) | load_shared_16(of[1] + own / 4 * 2) << 16;
    }
    return 0u;
  });
}

// Copies of a thread that were begun and have not arrived: nothing is copied before it is waited for.
struct LateCopy {
  std::uint8_t* to;
  const void* from;  // null: zeros
  emulator::races::Moment begun;
};

// Within races::Pause.
inline std::deque<std::vector<LateCopy> >& late_copies() {
  static thread_local std::vector<std::deque<std::vector<LateCopy> > > of_threads(1024);
  auto& own = of_threads[simt::thread()];
  if (own.empty()) own.emplace_back();
  return own;
}

inline void copy_later(std::uint32_t to, const void* from, bool there) {
  if (to % 16 != 0 || (there && reinterpret_cast<std::uintptr_t>(from) % 16 != 0))
    emulator::stop("a copy into shared memory is not aligned to 16 bytes");
  const emulator::races::Pause pause;
  late_copies().back().push_back(
      {at_shared<std::uint8_t>(to), there ? from : nullptr, emulator::current().moment});
}

inline void end_batch() {
  const emulator::races::Pause pause;
  late_copies().emplace_back();
}

template <int kOnTheirWay>
void wait_for_batches() {
  const emulator::races::Pause pause;
  for (auto& own = late_copies(); own.size() > kOnTheirWay + 1; own.pop_front()) {
    for (const LateCopy& copy : own.front()) {
      emulator::races::copy_since(copy.begun, emulator::current().moment, copy.to, copy.from);
      if (copy.from) std::memcpy(copy.to, copy.from, 16);
      if (!copy.from) std::memset(copy.to, 0, 16);
    }
  }
}

#endif

}  // namespace kvs
