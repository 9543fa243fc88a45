// XXH3-128: Collet, xxHash specification 0.8; seed 0 and the default secret only.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>

#include "octets.h"

namespace digests {

constexpr Octet kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};
constexpr Long kShort1 = 0x9E3779B1, kShort2 = 0x85EBCA77, kShort3 = 0xC2B2AE3D;
constexpr Long kLong1 = 0x9E3779B185EBCA87, kLong2 = 0xC2B2AE3D27D4EB4F, kLong3 = 0x165667B19E3779F9,
               kLong4 = 0x85EBCA77C2B2AE63, kLong5 = 0x27D4EB2F165667C5;
constexpr std::size_t kStripe = 64, kStripes = 16, kShortest = 241;

struct Pair {
  Long low, high;
};

Pair multiply(Long a, Long b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return {static_cast<Long>(product), static_cast<Long>(product >> 64)};
}

Long fold(Long a, Long b) {
  const Pair product = multiply(a, b);
  return product.low ^ product.high;
}

Long secret(std::size_t at) { return read<Long>(kSecret + at); }

Long avalanche(Long hash) {
  hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9;
  return hash ^ (hash >> 32);
}

Long avalanche_64(Long hash) {  // XXH64's
  hash = (hash ^ (hash >> 33)) * kLong2;
  hash = (hash ^ (hash >> 29)) * kLong3;
  return hash ^ (hash >> 32);
}

Pair hash_to_3(const Octet* in, std::size_t size) {
  const Word low =
      Word{in[0]} << 16 | Word{in[size >> 1]} << 24 | Word{in[size - 1]} | static_cast<Word>(size) << 8;
  const Word swapped = __builtin_bswap32(low), high = swapped << 13 | swapped >> 19;
  const Word flip_low = read<Word>(kSecret) ^ read<Word>(kSecret + 4);
  const Word flip_high = read<Word>(kSecret + 8) ^ read<Word>(kSecret + 12);
  return {avalanche_64(low ^ flip_low), avalanche_64(high ^ flip_high)};
}

Pair hash_to_8(const Octet* in, std::size_t size) {
  const Long keyed = (read<Word>(in) + (Long{read<Word>(in + size - 4)} << 32)) ^ secret(16) ^ secret(24);
  Pair hash = multiply(keyed, kLong1 + (size << 2));
  hash.high += hash.low << 1;
  hash.low ^= hash.high >> 3;
  hash.low = (hash.low ^ (hash.low >> 35)) * 0x9FB21C651E98DF25;
  return {hash.low ^ (hash.low >> 28), avalanche(hash.high)};
}

Pair hash_to_16(const Octet* in, std::size_t size) {
  const Long low = read<Long>(in), last = read<Long>(in + size - 8), high = last ^ secret(48) ^ secret(56);
  Pair mixed = multiply(low ^ last ^ secret(32) ^ secret(40), kLong1);
  mixed.low += Long{size - 1} << 54;
  mixed.high += high + static_cast<Word>(high) * (kShort2 - 1);
  mixed.low ^= __builtin_bswap64(mixed.high);
  Pair hash = multiply(mixed.low, kLong2);
  hash.high += mixed.high * kLong2;
  return {avalanche(hash.low), avalanche(hash.high)};
}

Long mix_16(const Octet* in, std::size_t at) {
  return fold(read<Long>(in) ^ secret(at), read<Long>(in + 8) ^ secret(at + 8));
}

void mix_32(Pair& sum, const Octet* first, const Octet* second, std::size_t at) {
  sum.low += mix_16(first, at);
  sum.low ^= read<Long>(second) + read<Long>(second + 8);
  sum.high += mix_16(second, at + 16);
  sum.high ^= read<Long>(first) + read<Long>(first + 8);
}

Pair hash_to_240(const Octet* in, std::size_t size) {
  Pair sum{size * kLong1, 0};
  if (size <= 128) {
    for (std::size_t i = (size - 1) / 32 + 1; i-- > 0;) {
      mix_32(sum, in + 16 * i, in + size - 16 * (i + 1), 32 * i);
    }
  } else {
    for (std::size_t i = 0; i < 4; ++i) mix_32(sum, in + 32 * i, in + 32 * i + 16, 32 * i);
    sum = {avalanche(sum.low), avalanche(sum.high)};
    for (std::size_t i = 4; 32 * (i + 1) <= size; ++i) {
      mix_32(sum, in + 32 * i, in + 32 * i + 16, 3 + 32 * (i - 4));
    }
    mix_32(sum, in + size - 16, in + size - 32, 103);
  }
  const Long high = sum.low * kLong1 + sum.high * kLong4 + size * kLong2;
  return {avalanche(sum.low + sum.high), 0 - avalanche(high)};
}

struct Xxh3 {
  Long sums[8];
  Long total;
  Octet before[kStripe];  // the last bytes of the blocks that are done
  Octet buffer[kStripes * kStripe];
  Word buffered;

  void begin() {
    const Long first[8] = {kShort3, kLong1, kLong2, kLong3, kLong4, kShort2, kLong5, kShort1};
    std::copy_n(first, 8, sums);
    total = buffered = 0;
  }

  static void add_stripe(Long* sums, const Octet* in, const Octet* key) {
    Long values[8], keyed[8];
    std::memcpy(values, in, kStripe);
    std::memcpy(keyed, key, kStripe);
    for (int i = 0; i < 8; ++i) keyed[i] ^= values[i];
    for (int i = 0; i < 8; ++i) sums[i] += values[i ^ 1] + (keyed[i] & 0xFFFFFFFF) * (keyed[i] >> 32);
  }

  void add_block(const Octet* in) {
    Long local[8];
    std::copy_n(sums, 8, local);
    for (std::size_t stripe = 0; stripe < kStripes; ++stripe) {
      add_stripe(local, in + stripe * kStripe, kSecret + 8 * stripe);
    }
    for (int i = 0; i < 8; ++i) sums[i] = (local[i] ^ (local[i] >> 47) ^ secret(128 + 8 * i)) * kShort1;
  }

  // A block is done once there is a byte behind it.
  void update(const Octet* data, std::size_t size) {
    total += size;
    while (size > 0) {
      if (buffered == sizeof buffer) {
        add_block(buffer);
        std::memcpy(before, buffer + sizeof buffer - kStripe, kStripe);
        buffered = 0;
      }
      if (buffered == 0 && size > sizeof buffer) {
        const std::size_t blocks = (size - 1) / sizeof buffer;
        for (std::size_t block = 0; block < blocks; ++block) add_block(data + block * sizeof buffer);
        data += blocks * sizeof buffer;
        size -= blocks * sizeof buffer;
        std::memcpy(before, data - kStripe, kStripe);
      }
      const std::size_t taken = std::min<std::size_t>(size, sizeof buffer - buffered);
      std::memcpy(buffer + buffered, data, taken);
      buffered += static_cast<Word>(taken);
      data += taken;
      size -= taken;
    }
  }

  Pair digest() const {
    if (total == 0) return {avalanche_64(secret(64) ^ secret(72)), avalanche_64(secret(80) ^ secret(88))};
    if (total <= 3) return hash_to_3(buffer, total);
    if (total <= 8) return hash_to_8(buffer, total);
    if (total <= 16) return hash_to_16(buffer, total);
    if (total < kShortest) return hash_to_240(buffer, total);
    Long last[8];
    std::copy_n(sums, 8, last);
    for (std::size_t stripe = 0; stripe < (buffered - 1) / kStripe; ++stripe) {
      add_stripe(last, buffer + stripe * kStripe, kSecret + 8 * stripe);
    }
    Octet tail[kStripe];
    const std::size_t ours = std::min<std::size_t>(buffered, kStripe);
    std::memcpy(tail, before + ours, kStripe - ours);
    std::memcpy(tail + kStripe - ours, buffer + buffered - ours, ours);
    add_stripe(last, tail, kSecret + 121);
    return {merge(last, 11, total * kLong1), merge(last, 117, ~(total * kLong2))};
  }

  static Long merge(const Long* sums, std::size_t at, Long sum) {
    for (int i = 0; i < 4; ++i)
      sum += fold(sums[2 * i] ^ secret(at + 16 * i), sums[2 * i + 1] ^ secret(at + 16 * i + 8));
    return avalanche(sum);
  }
};

}  // namespace digests
