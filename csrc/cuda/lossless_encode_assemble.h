// The last encode kernel: streams side by side in the payload. lossless_encode.cu has the whole.
#pragma once

#include "launch.h"
#include "lossless_encode.h"

namespace kvs {

// Copies parts that lie in pages or scratch to their places. No shared memory.
struct LosslessAssembleKernel {
  static constexpr std::uint32_t kThreads = 256, kResident = 4;
  static constexpr std::uint32_t kParts = 8;  // blocks of threads share a head

  const KvsLosslessEncodeJob* jobs;
  std::uint32_t count;
  KvsPages pages;
  const std::uint32_t* lengths;

  // Each thread writes every kStride-th unit of a part, from `first` on.
  static constexpr std::uint32_t kStride = kParts * kThreads;

  KVS_DEVICE void operator()() const {
    for (std::uint32_t piece = simt::block(); piece < count * kParts; piece += simt::blocks()) {
      write_stream(piece / kParts, piece % kParts * kThreads + simt::thread());
    }
  }

  KVS_DEVICE void write_stream(std::uint32_t index, std::uint32_t first) const {
    const KvsLosslessEncodeJob job = jobs[index];
    const EncodedHead coded = *reinterpret_cast<const EncodedHead*>(scratch_of(job));
    auto* payload = reinterpret_cast<std::uint8_t*>(job.payload);
    if (first == 0) put_number(payload + 4ull * job.index, lengths[index]);
    std::uint8_t* stream = payload + 4ull * job.heads;
    for (std::uint32_t before = index - job.index; before < index; ++before) stream += lengths[before];
    if (coded.raw) {
      write_raw(stream, job, first);
    } else {
      write_coded(stream, job, HeadSize::of(job, pages.dim), coded, first);
    }
  }

  KVS_DEVICE static void put_number(std::uint8_t* to, std::uint32_t number) {
    for (std::uint32_t i = 0; i < 4; ++i) to[i] = static_cast<std::uint8_t>(number >> 8 * i);
  }

  KVS_DEVICE void write_raw(std::uint8_t* stream, const KvsLosslessEncodeJob& job,
                            std::uint32_t first) const {
    if (first == 0) put_number(stream, kModeRaw);
    auto* to = reinterpret_cast<std::uint16_t*>(stream + kRawHeader);
    const std::uint32_t of_plane = job.tokens * pages.dim;
    const std::uint32_t all = of_plane * job.layers * job.kinds;
    for (std::uint32_t i = first; i < all; i += kStride) {
      const std::uint32_t token = job.token_begin + i % of_plane / pages.dim;
      to[i] =
          find_component(pages, job, i / of_plane * pages.dim + i % pages.dim)[token_offset(pages, token)];
    }
  }

  KVS_DEVICE static void write_coded(std::uint8_t* stream, const KvsLosslessEncodeJob& job,
                                     const HeadSize& size, const EncodedHead& coded, std::uint32_t first) {
    const EncodedParts parts = EncodedParts::of(size, coded);
    const HeadScratch scratch = HeadScratch::of(size);
    const std::uint8_t* from = scratch_of(job);
    if (first == 0) {
      put_number(stream, kModeCoded | coded.top_min << 8 | coded.top_bits << 16);
      put_number(stream + 4, coded.words);
      put_number(stream + 8, coded.escapes);
    }
    copy(stream + kCodedHeader, from + HeadScratch::kStates, parts.words - kCodedHeader, first);
    copy(stream + parts.words, from + scratch.end - 2ull * coded.words, 2ull * coded.words, first);
    copy(stream + parts.rows, from + scratch.rows, parts.classes - parts.rows, first);
    for (std::uint64_t i = first; i < parts.escapes - parts.classes; i += kStride) {
      stream[parts.classes + i] = class_byte(classes_of(job), size.components, coded, i);
    }
    for (std::uint64_t i = first; i < coded.escapes; i += kStride) {
      stream[parts.escapes + i] = from[scratch.shared + coded.escapes - 1 - i];
    }
    for (std::uint64_t i = parts.escapes_end + first; i < parts.end; i += kStride) stream[i] = 0;
  }

  // Words of four bytes wherever `to` has whole ones, each put together from two of `from`: some six
  // instructions for 128 bytes of a warp. Reads no aligned word that has no byte of the part.
  KVS_DEVICE static void copy(std::uint8_t* to, const std::uint8_t* from, std::uint64_t bytes,
                              std::uint32_t first) {
    const std::uint64_t unaligned = -reinterpret_cast<std::uintptr_t>(to) & 3;
    const std::uint64_t edge = unaligned < bytes ? unaligned : bytes;
    const std::uint64_t words = (bytes - edge) / 4;
    for (std::uint64_t i = first; i < edge; i += kStride) to[i] = from[i];
    const std::uint32_t shift = reinterpret_cast<std::uintptr_t>(from + edge) % 4 * 8;
    const auto* source = reinterpret_cast<const std::uint32_t*>(from + edge - shift / 8);
    auto* target = reinterpret_cast<std::uint32_t*>(to + edge);
    for (std::uint64_t i = first; i < words; i += kStride) {
      const std::uint64_t high = shift != 0 ? source[i + 1] : 0;
      target[i] = static_cast<std::uint32_t>((high << 32 | source[i]) >> shift);
    }
    for (std::uint64_t i = edge + 4 * words + first; i < bytes; i += kStride) to[i] = from[i];
  }

  // Byte `at` of the bit string of classes.
  KVS_DEVICE static std::uint8_t class_byte(const std::uint16_t* classes, std::uint64_t components,
                                            const EncodedHead& coded, std::uint64_t at) {
    const std::uint32_t bits = kClassBits + coded.top_bits;
    std::uint64_t component = 8 * at / bits;
    std::uint32_t found = 0;
    for (auto place = static_cast<std::int32_t>(component * bits - 8 * at);
         place < 8 && component < components; place += static_cast<std::int32_t>(bits), ++component) {
      const std::uint32_t number = (classes[component] & 31) | ((classes[component] >> 8) - coded.top_min)
                                                                   << kClassBits;
      found |= place < 0 ? number >> -place : number << place;
    }
    return static_cast<std::uint8_t>(found);
  }
};

}  // namespace kvs
