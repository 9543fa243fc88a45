// Encoding codec 3, last kernel: streams side by side in the payloads of a section's levels.
// scalable_encode.cu has the whole.
#pragma once

#include "launch.h"
#include "lossless_encode_assemble.h"
#include "scalable_encode.h"

namespace kvs {

// Writes every byte of the payloads once, and reads none: they may lie in pinned host memory. No shared
// memory.
struct AssembleStreams {
  static constexpr std::uint32_t kThreads = LosslessAssembleKernel::kThreads, kResident = 4;
  static constexpr std::uint32_t kParts = LosslessAssembleKernel::kParts;  // blocks of threads share a stream
  static constexpr std::uint32_t kStride = LosslessAssembleKernel::kStride;
  static constexpr std::uint32_t kSharedBytes = 0;

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count;
  KvsPages pages;
  std::uint32_t item_bytes;
  const std::uint32_t* lengths;

  KVS_DEVICE void operator()() const {
    for (std::uint32_t piece = simt::block(); piece < count * kParts; piece += simt::blocks()) {
      write(piece / kParts, piece % kParts * kThreads + simt::thread());
    }
  }

 private:
  // Each thread writes every kStride-th unit of a part, from `first` on.
  KVS_DEVICE void write(std::uint32_t index, std::uint32_t first) const {
    const KvsScalableEncodeJob& job = jobs[index];
    const EncodeSize size = EncodeSize::of(job, pages.dim, item_bytes);
    const EncodeScratch scratch = scratch_of(job, size);
    const EncodedStream stream = scratch.stream();
    auto* to = reinterpret_cast<std::uint8_t*>(job.payload);
    if (job.index == 0) {
      copy(to, reinterpret_cast<const std::uint8_t*>(job.header), job.header_bytes, first);
    }
    to += job.header_bytes;
    for (std::uint32_t level = 0; level < size.levels; ++level) {
      const std::uint32_t length = lengths[std::uint64_t{index} * kLevels + level];
      std::uint8_t* own = to + 4ull * job.streams;
      if (first == 0) put_number(to + 4ull * job.index, length, 4);
      to = own;
      for (std::uint32_t i = 0; i < job.streams; ++i) {
        const std::uint32_t of_stream = lengths[std::uint64_t{index - job.index + i} * kLevels + level];
        if (i < job.index) own += of_stream;
        to += of_stream;
      }
      if (level == 0) {
        write_base(own, job, size, scratch, stream, first);
      } else if (stream.raw == 0) {
        write_refinement(own, scratch, stream, level, first);
      }
    }
  }

  KVS_DEVICE void write_base(std::uint8_t* to, const KvsScalableEncodeJob& job, const EncodeSize& size,
                             const EncodeScratch& scratch, const EncodedStream& stream,
                             std::uint32_t first) const {
    if (first == 0) {
      put_number(to, stream.raw != 0 ? 0 : stream.words[0], 4);
      put_number(to + 4, stream.raw != 0 ? 0 : stream.escapes, 4);
      put_number(to + 8, stream.raw != 0 ? kMarkRaw : stream.exact | stream.explicit_classes << 16, 4);
    }
    if (stream.raw != 0) {
      write_values(to + 12, job, size, nullptr, size.tokens, first);
      pad(to, 12 + size.raw_bytes(), first);
      return;
    }
    const EncodedBase base = EncodedBase::of(size, job.calibrated != 0, stream);
    copy(to + 12, scratch.steps(), base.means - 12, first);
    copy(to + base.means, scratch.means(), base.classes - base.means, first);
    copy(to + base.classes, scratch.classes(), base.classes_end - base.classes, first);
    pad(to, base.classes_end, first);
    copy(to + base.states, scratch.states(), base.words - base.states, first);
    copy(to + base.words, words_of(scratch, stream, 0), base.escapes - base.words, first);
    // The first lies last.
    for (std::uint32_t i = first; i < stream.escapes; i += kStride) {
      put_number(to + base.escapes + 2ull * i, scratch.escapes()[stream.escapes - 1 - i], 2);
    }
    copy(to + base.tokens, scratch.exact_tokens(), base.values - base.tokens, first);
    write_values(to + base.values, job, size, scratch.exact_tokens(), stream.exact, first);
    pad(to, base.values_end, first);
  }

  KVS_DEVICE static void write_refinement(std::uint8_t* to, const EncodeScratch& scratch,
                                          const EncodedStream& stream, std::uint32_t level,
                                          std::uint32_t first) {
    const std::uint32_t words = stream.words[level];
    if (first == 0) put_number(to, words, 4);
    copy(to + 4, words_of(scratch, stream, level), 2ull * words, first);
    pad(to, 4 + 2ull * words, first);
  }

  // The last level's words are the last.
  KVS_DEVICE static const std::uint16_t* words_of(const EncodeScratch& scratch, const EncodedStream& stream,
                                                  std::uint32_t level) {
    std::uint64_t behind = 0;
    for (std::uint32_t i = level; i < kLevels; ++i) behind += stream.words[i];
    return scratch.words_end() - behind;
  }

  // Bit patterns of the tokens `listed`, or of all, in the order of x.
  KVS_DEVICE void write_values(std::uint8_t* to, const KvsScalableEncodeJob& job, const EncodeSize& size,
                               const std::uint16_t* listed, std::uint32_t tokens, std::uint32_t first) const {
    const std::uint64_t all = std::uint64_t{tokens} * size.numbers;
    for (std::uint64_t i = first; i < all; i += kStride) {
      const auto row = static_cast<std::uint32_t>(i / size.numbers);
      const auto number = static_cast<std::uint32_t>(i % size.numbers);
      const std::uint32_t place = job.token_begin + (listed != nullptr ? listed[row] : row);
      const std::int64_t at = find_token_run(pages, place, place + 1).offset + number % size.dim;
      if (item_bytes == 2) {
        put_number(to + 2 * i, find_plane<std::uint16_t>(pages, job, number / size.dim)[at], 2);
      } else {
        put_number(to + 4 * i, find_plane<std::uint32_t>(pages, job, number / size.dim)[at], 4);
      }
    }
  }

  // Little-endian, in halves: everything lies at even addresses.
  KVS_DEVICE static void put_number(std::uint8_t* to, std::uint32_t number, std::uint32_t bytes) {
    auto* half = reinterpret_cast<std::uint16_t*>(to);
    half[0] = static_cast<std::uint16_t>(number);
    if (bytes == 4) half[1] = static_cast<std::uint16_t>(number >> 16);
  }

  // Zeros from `at` to the next multiple of 4 from the stream's start on.
  KVS_DEVICE static void pad(std::uint8_t* to, std::uint64_t at, std::uint32_t first) {
    const std::uint64_t end = round_up(at, 4);
    if (first < end - at) to[at + first] = 0;
  }

  KVS_DEVICE static void copy(std::uint8_t* to, const void* from, std::uint64_t bytes, std::uint32_t first) {
    LosslessAssembleKernel::copy(to, static_cast<const std::uint8_t*>(from), bytes, first);
  }
};

}  // namespace kvs
