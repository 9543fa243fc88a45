// Encoding heads of codec 1 from pages, in three kernels.
//
// 1. LosslessClassKernel, a warp for each block of 32 components: counts, chooses the classes, packs the low
//    bits. No block of components waits for another.
// 2. LosslessCodeKernel, a warp for each head, from the last block and token to the first, as rANS wants it.
// 3. LosslessAssembleKernel, eight blocks of threads for each head: how long the streams are is known now, so
//    they are put side by side into the payload. That may as well be pinned host memory: every byte is
//    written once, and none is read.
//
// Bytes moved for each value, of 2 bytes: read twice (4), low bits written and moved (0.75 x 3), words
// likewise (some 0.55 x 3): 8, so that 300 GB/s of bf16 take 1.2 TB/s of device memory.
//
// Instructions for each row of 32 values, as the compiler's PTX has them, for 256 tokens: kernel 1 has 42
// (load and pack 6, count 19, search 17), kernel 2 has 70 (load 7, look up 27, push 36), kernel 3 some 3. At
// 115 in all, 132 multiprocessors of 4 schedulers at 1.7 GHz do at most 7.8 G rows a second, 500 GB/s of
// bf16; where six of ten cycles issue, 300.
//
// Kernel 2 waits for its chain (compare, shift, multiply, shift, multiply, add: some 40 cycles a row), which
// 8 warps on each scheduler hide: 4,224 heads; 64 chunks of an 8B model in groups of 4 layers have 4,096. Few
// heads take blocks x tokens x 40 cycles however few they are: 0.2 ms for 32 blocks of 256 tokens.

#include <algorithm>

#include "choose_class.h"
#include "launch.h"
#include "lossless_encode.h"
#include "lossless_encode_assemble.h"
#include "lossless_encode_classes.h"

namespace kvs {
namespace {

using simt::lane;

// Loaded by one instruction.
struct alignas(8) WholePush {
  Push push;
};

// Shared memory: sixteen tables of symbols, 8 KB, which each block makes from the frequencies, and a tile for
// each warp: 12 KB for 8 warps. A row looks 32 entries of 8 bytes up: some 5 passes through the banks, of the
// 17 cycles that a row takes where all four schedulers issue.
struct LosslessCodeKernel {
  static constexpr std::uint32_t kWarps = 8, kThreads = kWarps * kLanes, kResident = 4;
  static constexpr std::int32_t kBatch = 4;  // rows whose symbols wait in registers; divides kTileTokens
  static constexpr std::uint32_t kLeastWarps = 4;  // make the tables in some 2 us
  static constexpr std::uint32_t kPushBytes = sizeof(WholePush) * kTables * kSymbols;
  static constexpr std::uint32_t kSharedBytes = kPushBytes + kWarps * BlockValues::kTileBytes;

  const KvsLosslessEncodeJob* jobs;
  std::uint32_t count;
  KvsPages pages;
  std::uint32_t* lengths;

  // How far a warp has written: words from there on, escapes up to there.
  struct Written {
    std::uint16_t* words;
    std::uint8_t* escapes;
  };

  // A lane's component: where its table begins among the pushes, and class_base.
  struct Component {
    std::uint32_t table, base;
    bool used;
  };

  KVS_DEVICE void operator()() const {
    make_pushes();
    simt::sync_block();
    for (std::uint32_t index = simt::block() * simt::warps() + simt::warp(); index < count;
         index += simt::blocks() * simt::warps()) {
      encode(index);
    }
  }

  KVS_DEVICE void encode(std::uint32_t index) const {
    const KvsLosslessEncodeJob& job = jobs[index];
    const HeadSize size = HeadSize::of(job, pages.dim);
    EncodedHead coded = code(job, size);
    find_tops(classes_of(job), size, coded);
    const std::uint64_t end = EncodedParts::of(size, coded).end;
    coded.raw = end >= size.raw_bytes();
    if (lane() == 0) {
      *reinterpret_cast<EncodedHead*>(scratch_of(job)) = coded;
      lengths[index] = static_cast<std::uint32_t>(coded.raw ? size.raw_bytes() : end);
    }
  }

  KVS_DEVICE static WholePush* pushes() { return reinterpret_cast<WholePush*>(simt::shared_memory()); }

  KVS_DEVICE static void make_pushes() {
    for (std::uint32_t i = simt::thread(); i < kTables * kSymbols; i += simt::threads()) {
      const std::uint16_t* frequencies = class_cost::kTablesOfFrequencies.of[i / kSymbols];
      std::uint32_t first = 0;
      for (std::uint32_t symbol = 0; symbol < i % kSymbols; ++symbol) first += frequencies[symbol];
      pushes()[i] = {make_push(frequencies[i % kSymbols], first)};
    }
  }

  // Leaves the states in the scratch.
  KVS_DEVICE EncodedHead code(const KvsLosslessEncodeJob& job, const HeadSize& size) const {
    const HeadScratch scratch = HeadScratch::of(size);
    auto* const words_end = reinterpret_cast<std::uint16_t*>(scratch_of(job) + scratch.end);
    std::uint8_t* const escapes_begin = scratch_of(job) + scratch.shared;
    Written to{words_end, escapes_begin};
    std::uint32_t state = kStateMin;
    for (std::uint32_t block = size.blocks(); block-- > 0;) {
      code_block(job, size, block, state, to);
    }
    if (lane() < size.lanes(0)) {
      reinterpret_cast<std::uint32_t*>(scratch_of(job) + HeadScratch::kStates)[lane()] = state;
    }
    return {static_cast<std::uint32_t>(words_end - to.words),
            static_cast<std::uint32_t>(to.escapes - escapes_begin), 0, 0, 0};
  }

  KVS_DEVICE void code_block(const KvsLosslessEncodeJob& job, const HeadSize& size, std::uint32_t block,
                             std::uint32_t& state, Written& to) const {
    auto* tile = reinterpret_cast<std::uint16_t*>(simt::shared_memory() + kPushBytes +
                                                  simt::warp() * BlockValues::kTileBytes);
    const bool used = lane() < size.lanes(block);
    const std::uint32_t chosen = used ? classes_of(job)[block * kLanes + lane()] : 0;
    const Component component{(chosen & 15) * kSymbols, class_base(chosen >> 8, chosen >> 4 & 1), used};
    BlockValues values(pages, job, block);
    const std::uint32_t tokens = job.tokens;
    std::uint32_t token = (tokens - 1) / kTileTokens * kTileTokens;
    values.fetch(token);
    for (std::uint32_t rows = tokens - token;; rows = kTileTokens) {
      simt::sync_warp();  // all have read the tile before
      values.put(tile);
      if (token != 0) values.fetch(token - kTileTokens);
      simt::sync_warp();
      for (std::int32_t first = kTileTokens - kBatch; first >= 0; first -= kBatch) {
        code_rows(tile + first * kLanes, static_cast<std::int32_t>(rows) - first, component, state, to);
      }
      if (token == 0) return;
      token -= kTileTokens;
    }
  }

  // Codes the first `rows` (or fewer than 1) of kBatch rows. Looks all symbols up before the first is pushed:
  // what a row waits for is its state alone.
  KVS_DEVICE static void code_rows(const std::uint16_t* values, std::int32_t rows, const Component& component,
                                   std::uint32_t& state, Written& to) {
    Push found[kBatch];
    std::uint32_t far = 0;
    KVS_UNROLL for (std::int32_t row = 0; row < kBatch; ++row) {
      const std::uint32_t value = values[row * kLanes + lane()];
      const std::uint32_t step = ((component.base & 0x7FC0) >> kLowBits) - ((value & 0x7FFF) >> kLowBits);
      found[row] = push_of(component, value, step & 31);
      const bool escapes = step >= kEscapeStep || frequency_of(found[row]) == 0;
      far |= static_cast<std::uint32_t>(escapes && component.used && row < rows) << row;
    }
    if (simt::ballot(far != 0) != 0) escape(values, far, component, found, to);
    KVS_UNROLL for (std::int32_t row = kBatch; row-- > 0;) {
      push_row(found[row], component.used && row < rows, state, to);
    }
  }

  KVS_DEVICE static Push push_of(const Component& component, std::uint32_t value, std::uint32_t step) {
    const std::uint32_t sign = (value ^ component.base) >> 15;
    return pushes()[component.table + sign * 32 + step].push;
  }

  // Makes escapes of the values whose bits are set in `far`: the last row's last lane first, for the decoder
  // takes the first row's first lane's first.
  KVS_DEVICE static void escape(const std::uint16_t* values, std::uint32_t far, const Component& component,
                                Push* found, Written& to) {
    KVS_UNROLL for (std::int32_t row = kBatch; row-- > 0;) {
      const bool escapes = (far >> row & 1) != 0;
      const std::uint32_t escaping = simt::ballot(escapes);
      if (escapes) {
        const std::uint32_t value = values[row * kLanes + lane()];
        found[row] = push_of(component, value, kEscapeStep + (~value >> kLowBits & 1));
        const std::uint32_t after = simt::count_bits(escaping & ~simt::lanes_before()) - 1;
        to.escapes[after] = static_cast<std::uint8_t>(value >> 7);
      }
      to.escapes += simt::count_bits(escaping);
    }
  }

  KVS_DEVICE static void push_row(const Push& push, bool used, std::uint32_t& state, Written& to) {
    const std::uint32_t emits = used && must_emit(state, push);
    const std::uint32_t emitting = simt::ballot(emits != 0);
    to.words -= simt::count_bits(emitting);
    if (emits != 0) {
      to.words[simt::count_bits(emitting & simt::lanes_before())] = static_cast<std::uint16_t>(state);
    }
    const std::uint32_t pushed = push_symbol(state >> 16 * emits, push);
    state = used ? pushed : state;
  }

  KVS_DEVICE static void find_tops(const std::uint16_t* classes, const HeadSize& size, EncodedHead& coded) {
    std::uint32_t least = 255, most = 0;
    for (std::uint64_t i = lane(); i < size.components; i += kLanes) {
      const std::uint32_t top = classes[i] >> 8;
      least = top < least ? top : least;
      most = top > most ? top : most;
    }
    for (std::uint32_t mask = 16; mask != 0; mask /= 2) {
      const std::uint32_t other_least = simt::shuffle_xor(least, mask),
                          other_most = simt::shuffle_xor(most, mask);
      least = other_least < least ? other_least : least;
      most = other_most > most ? other_most : most;
    }
    coded.top_min = least;
    for (coded.top_bits = 0; (most - least) >> coded.top_bits != 0;) ++coded.top_bits;
  }
};

// Grids are persistent: no more blocks than may run at once, and never on more multiprocessors than allowed.
template <typename Kernel>
int launch_warps(const Kernel& kernel, std::uint32_t pieces, std::uint32_t multiprocessors,
                 std::uint32_t least_warps, void* stream) {
  const Grid grid = spread<Kernel>(pieces, multiprocessors, least_warps);
  return launch(kernel, grid.blocks, grid.threads, Kernel::kSharedBytes, stream);
}

int encode(const KvsLosslessEncodeJob* jobs, std::uint32_t count, const KvsPages& pages,
           std::uint32_t* lengths, void* stream) {
  std::uint32_t multiprocessors = 0;
  if (const int error = allow_multiprocessors(&multiprocessors); error != 0) return error;
  const LosslessClassKernel choose{jobs, count, pages};
  const std::uint32_t pieces = count * LosslessClassKernel::kParts;
  if (const int error = launch_warps(choose, pieces, multiprocessors, 1, stream); error != 0) return error;
  const LosslessCodeKernel code{jobs, count, pages, lengths};
  const std::uint32_t least = LosslessCodeKernel::kLeastWarps;
  if (const int error = launch_warps(code, count, multiprocessors, least, stream); error != 0) return error;
  using Assemble = LosslessAssembleKernel;
  const std::uint32_t blocks = std::min(count * Assemble::kParts, multiprocessors * Assemble::kResident);
  return launch(Assemble{jobs, count, pages, lengths}, blocks, Assemble::kThreads, 0, stream);
}

}  // namespace
}  // namespace kvs

extern "C" {

std::uint64_t kvs_lossless_encode_scratch(std::uint64_t components, std::uint64_t tokens) {
  return kvs::HeadScratch::of({components, tokens}).end;
}

int kvs_lossless_encode(const KvsLosslessEncodeJob* jobs, std::uint32_t count, const KvsPages* pages,
                        std::uint32_t* lengths, void* stream) {
  return count == 0 ? 0 : kvs::encode(jobs, count, *pages, lengths, stream);
}

}  // extern "C"
