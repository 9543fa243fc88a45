// Encoding codec 3: the numbers of a stream through rANS, from the last row of the last level to the first of
// the first: a warp for each stream. scalable_encode.cu has the whole.
#pragma once

#include "device_memory.h"
#include "launch.h"
#include "scalable_encode.h"

namespace kvs {

// No shared memory: the symbols of a row are of one class or two, most of them near the middle, and come
// through L1 as few lines.
struct CodeLevels {
  static constexpr std::uint32_t kThreads = 256, kResident = 4;
  static constexpr std::uint32_t kSharedBytes = 0;
  static constexpr std::uint32_t kBatch = 4;  // rows whose symbols wait in registers
  static_assert(EncodeScratch::kSlack >= kBatch * kLanes * 4);

  const KvsScalableEncodeJob* jobs;
  std::uint32_t count;
  const PackedPushes* tables;
  KvsPages pages;
  std::uint32_t item_bytes;
  std::uint32_t* lengths;

  KVS_DEVICE void operator()() const {
    for (std::uint32_t i = simt::block() * simt::warps() + simt::warp(); i < count;
         i += simt::blocks() * simt::warps()) {
      code(jobs[i], lengths + std::uint64_t{i} * kLevels);
    }
  }

 private:
  // How many words and escapes a warp has written: words from their end down, escapes from their begin up.
  // Both lie in one piece: where together they take what raw values take, the stream is not shorter, and
  // coding it ends there. Counts of 32 bits, for pointers are two registers.
  struct Written {
    std::uint16_t* words_end;
    std::uint16_t* escapes_begin;
    std::uint32_t most;  // together
    std::uint32_t words = 0, escapes = 0;

    KVS_DEVICE bool is_full() const { return words + escapes >= most; }
  };

  // A lane's component: where its pushes begin, and its numbers, of which escapes need to know.
  struct Component {
    const std::uint64_t* pushes;
    const std::int16_t* numbers;
    std::uint32_t stride;
    bool used;
  };

  KVS_DEVICE void code(const KvsScalableEncodeJob& job, std::uint32_t* length) const {
    const EncodeSize size = EncodeSize::of(job, pages.dim, item_bytes);
    const EncodeScratch scratch = scratch_of(job, size);
    EncodedStream stream = scratch.stream();
    std::uint32_t state = kStateMin;
    Written to{scratch.words_end(), scratch.escapes(), static_cast<std::uint32_t>(size.raw_bytes() / 2)};
    for (std::uint32_t level = size.levels; level-- > 0 && stream.raw == 0;) {
      const std::uint32_t before = to.words;
      if (!code_level(stream, size, scratch, level, state, to)) stream.raw = 1;
      stream.words[level] = to.words - before;
    }
    stream.escapes = to.escapes;
    if (simt::lane() < stream.lanes(size.levels)) scratch.states()[simt::lane()] = state;
    simt::sync_warp();  // all have read what is overwritten
    if (simt::lane() == 0) {
      write_lengths(job, size, stream, length);
      scratch.stream() = stream;
    }
  }

  KVS_DEVICE static void write_lengths(const KvsScalableEncodeJob& job, const EncodeSize& size,
                                       EncodedStream& stream, std::uint32_t* length) {
    std::uint64_t level[kLevels] = {EncodedBase::of(size, job.calibrated != 0, stream).end, 0, 0};
    std::uint64_t all = level[0];
    for (std::uint32_t i = 1; i < size.levels; ++i) {
      level[i] = 4 + round_up(2ull * stream.words[i], 4);
      all += level[i];
    }
    if (all >= size.raw_bytes()) stream.raw = 1;
    for (std::uint32_t i = 0; i < kLevels; ++i) {
      const std::uint64_t raw = i == 0 ? size.raw_stream() : 0;
      length[i] = static_cast<std::uint32_t>(stream.raw != 0 ? raw : level[i]);
    }
  }

  KVS_DEVICE bool code_level(const EncodedStream& stream, const EncodeSize& size,
                             const EncodeScratch& scratch, std::uint32_t level, std::uint32_t& state,
                             Written& to) const {
    const std::uint32_t coded = stream.coded[level];
    for (std::uint32_t block = (coded + kLanes - 1) / kLanes; block-- > 0;) {
      const std::uint32_t c = block * kLanes + simt::lane();
      const std::uint32_t number = c < coded ? load_constant(scratch.order() + c) : 0;
      const std::uint32_t k = c < coded ? load_constant(scratch.classes() + number) : tables->first[level];
      Component component{tables->base[k], scratch.rounded() + number, size.components, c < coded};
      const std::uint16_t* rows = scratch.rows() + std::uint64_t{block} * size.tokens * kLanes + simt::lane();
      bool fits = false;
      if (level == 0) {
        fits = code_rows<0>(component, rows, size.tokens, state, to);
      } else {
        component.pushes = tables->ternary[level - 1][k];
        fits = level == 1 ? code_rows<1>(component, rows, size.tokens, state, to)
                          : code_rows<2>(component, rows, size.tokens, state, to);
      }
      if (!fits) return false;
    }
    return true;
  }

  // Codes the rows of a block from the last to the first; the next batch's symbols are on their way
  // meanwhile. False where nothing is won any more.
  template <std::uint32_t level>
  KVS_DEVICE static bool code_rows(const Component& component, const std::uint16_t* rows,
                                   std::uint32_t tokens, std::uint32_t& state, Written& to) {
    std::uint32_t next[kBatch];
    const bool full = simt::ballot(component.used) == 0xFFFFFFFFu;
    Batch batch{{}, (tokens - 1) / kBatch * kBatch, 0};
    batch.there = tokens - batch.begin;
    load(rows, batch.begin, batch.there, next);
    for (;; batch.begin -= kBatch, batch.there = kBatch) {
      KVS_UNROLL for (std::uint32_t i = 0; i < kBatch; ++i) batch.symbols[i] = next[i];
      if (batch.begin != 0) load(rows, batch.begin - kBatch, kBatch, next);
      if (to.is_full()) return false;
      if (full && batch.there == kBatch) {
        code_batch<level, true>(component, batch, state, to);
      } else {
        code_batch<level, false>(component, batch, state, to);
      }
      if (batch.begin == 0) return true;
    }
  }

  // Rows [begin, begin + there).
  struct Batch {
    std::uint32_t symbols[kBatch];  // as pack_symbols has them
    std::uint32_t begin, there;
  };

  KVS_DEVICE static void load(const std::uint16_t* rows, std::uint32_t begin, std::uint32_t there,
                              std::uint32_t* symbols) {
    KVS_UNROLL for (std::uint32_t i = 0; i < kBatch; ++i) {
      symbols[i] = i < there ? load_constant(rows + (std::uint64_t{begin} + i) * kLanes) : 0;
    }
  }

  // Looks all pushes up before the first of them is done: what a row waits for is its state alone. `whole`:
  // all lanes of all rows are there.
  template <std::uint32_t level, bool whole>
  KVS_DEVICE static void code_batch(const Component& component, const Batch& batch, std::uint32_t& state,
                                    Written& to) {
    Push found[kBatch];
    std::uint32_t metas = 0;
    KVS_UNROLL for (std::uint32_t i = 0; i < kBatch; ++i) {
      const std::uint32_t symbols = batch.symbols[i];
      const std::uint32_t symbol = level == 0 ? symbols >> 8 : level == 1 ? symbols >> 4 & 15 : symbols & 15;
      const std::uint64_t packed = load_constant(component.pushes + symbol);
      found[i] = {static_cast<std::uint32_t>(packed), static_cast<std::uint32_t>(packed >> 32)};
      metas |= found[i].meta;
    }
    if constexpr (level == 0) {
      if (simt::ballot((metas & PackedPushes::kEscapes) != 0) != 0) escape(component, batch, found, to);
    }
    KVS_UNROLL for (std::uint32_t i = kBatch; i-- > 0;) {
      push_row<whole>(found[i], component.used && i < batch.there, state, to);
    }
  }

  // The last row's last lane first, for the decoder takes the first row's first lane's first.
  KVS_DEVICE static void escape(const Component& component, const Batch& batch, Push* found, Written& to) {
    KVS_UNROLL for (std::uint32_t i = kBatch; i-- > 0;) {
      const bool marked = (found[i].meta & PackedPushes::kEscapes) != 0;
      const bool escapes = marked && component.used && i < batch.there;
      const std::uint32_t escaping = simt::ballot(escapes);
      found[i].meta &= ~PackedPushes::kEscapes;
      if (escapes) {
        const std::uint32_t place = to.escapes + simt::count_bits(escaping & ~simt::lanes_before()) - 1;
        const std::int32_t number = component.numbers[(std::uint64_t{batch.begin} + i) * component.stride];
        to.escapes_begin[place] = static_cast<std::uint16_t>(coarsen_number(coarsen_number(number)));
      }
      to.escapes += simt::count_bits(escaping);
    }
  }

  template <bool whole>
  KVS_DEVICE static void push_row(const Push& push, bool used, std::uint32_t& state, Written& to) {
    const std::uint32_t emits = (whole || used) && must_emit(state, push);
    const std::uint32_t emitting = simt::ballot(emits != 0);
    to.words += simt::count_bits(emitting);
    if (emits != 0) {
      const std::uint32_t before = simt::count_bits(emitting & simt::lanes_before());
      store_value(to.words_end + static_cast<std::int32_t>(before - to.words),
                  static_cast<std::uint16_t>(state));
    }
    const std::uint32_t pushed = push_symbol(state >> 16 * emits, push);
    state = whole || used ? pushed : state;
  }
};

}  // namespace kvs
