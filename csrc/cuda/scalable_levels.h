// Codec 3 on a GPU, first kernel: rANS words of one to three levels to 16-bit numbers, one warp for each
// stream.
//
// A lane is a component, 32 to a block of the coding order; a row is one token of a block. Eight rows go
// together: their numbers are one access of 16 bytes for each lane (scalable_order.h).
//
// What it costs: see docs/gpu.md, where the instructions of the compiled loops are counted. A row of level 0
// loads twice from tables (a byte, then a word) and once from the ring of words; a row of level 1 or 2 loads
// two thresholds and a word. Device memory: 2 bytes written by level 0, 4 read and written by each other
// level, and the bitstream once, in whole lines that are asked for 128 words ahead. Levels are serial, as are
// rows (states carry on): some 150 cycles each, which the 32 warps of an SM hide. One chunk alone (64 streams
// of 256 tokens x 1,024 components for an 8B model) has too few warps to hide it: some 2 ms.
//
// Shared memory: thresholds, 6 KB; tables of the smallest kMostShared classes that are coded at level 0, 5
// KB each (frequent: most components are small; the others are read through L1), which begin at a multiple of
// 4,096, so that a slot's address is put together from bits; for each warp 768 bytes: its words, and the
// counters of the coding order before them. 112 KB at most, so that two blocks of 16 warps live on an SM of
// 227 KB; where a block may not have that much (99 KB on 8.6, 8.9 and 12.0), fewer tables are shared.
#pragma once

#include <algorithm>

#include "scalable_order.h"
#include "scalable_pops.h"
#include "scalable_words.h"

namespace kvs {

struct DecodeLevels {
  static constexpr std::uint32_t kThreads = 512, kResident = 2;
  static constexpr std::uint32_t kMostShared = 18;
  static constexpr std::uint32_t kSides = 8;  // of a class's thresholds: coarse numbers from -3 to 3
  static constexpr std::uint32_t kThresholdBytes = 8 * kSides * kClasses * (kLevels - 1);
  static constexpr std::uint32_t kClassBytes = kSlots + 4 * kBaseSymbols;
  static constexpr std::uint32_t kSharedBytes = kSlots + kThresholdBytes + kMostShared * kClassBytes +
                                                kThreads / simt::kWarp * WordRing::kBytes;  // at most
  static_assert(WordRing::kBytes >= 4 * kClasses);

  const KvsScalableJob* jobs;
  std::uint32_t count;
  const PackedTables* tables;
  std::uint32_t classes_end;  // of all jobs
  std::uint32_t most_shared;  // classes whose tables have room in shared memory
  std::int16_t* numbers;
  std::uint32_t* order;
  std::uint32_t* faults;

  // How many tables of level 0 are in shared memory, from `first` on.
  static KVS_HOST_DEVICE std::uint32_t shared_classes(std::uint32_t first, std::uint32_t classes_end,
                                                      std::uint32_t most) {
    const std::uint32_t classes = classes_end > first ? classes_end - first : 0;
    return classes < most ? classes : most;
  }
  static std::uint32_t shared_bytes(std::uint32_t classes, std::uint32_t warps) {
    return kSlots + kThresholdBytes + classes * kClassBytes + warps * WordRing::kBytes;
  }
  // The most tables that a block of so many warps has room for in `bytes`.
  static std::uint32_t find_room(std::uint32_t bytes, std::uint32_t warps) {
    const std::uint32_t taken = shared_bytes(0, warps);
    return bytes < taken ? 0 : std::min(kMostShared, (bytes - taken) / kClassBytes);
  }

  KVS_DEVICE void operator()() const;

 private:
  // Addresses in shared memory.
  struct Shared {
    std::uint32_t slots, entries, thresholds;
    std::uint32_t first, classes;
    std::uint32_t ring;  // of this warp
  };

  // One stream on its way.
  struct Stream {
    const KvsScalableJob& job;
    const Shared& shared;
    const std::uint32_t* order;
    std::int16_t* numbers;
    std::uint32_t state;
  };

  // Level 0 of a stream.
  struct Base {
    const KvsScalableJob& job;
    WordRing words;
    std::uint32_t state;
    std::uint32_t hungry_below;  // 0: the lane codes nothing in this block
    std::uint32_t escapes_taken = 0;
    bool sound = true;
  };

  // Level 1 or 2.
  struct Refinement {
    WordRing words;
    std::uint32_t state;
    std::uint32_t hungry_below;
    std::uint32_t thresholds;  // of the lane's class
  };

  KVS_DEVICE Shared load_tables() const;
  template <typename Tables>
  static KVS_DEVICE void decode_base_block(Base& base, const Tables& tables, Octet* to);
  template <bool whole, typename Tables>
  static KVS_DEVICE Octet decode_base_octet(Base& base, const Tables& tables, std::uint32_t rows);
  static KVS_DEVICE void take_escapes(Base& base, const Octet& symbols, Octet& octet);
  static KVS_DEVICE void refine_block(Refinement& level, std::uint32_t tokens, bool coarser, Octet* octets);
  template <bool whole>
  static KVS_DEVICE Octet refine_octet(Refinement& level, const Octet& coarse, std::uint32_t rows);
  KVS_DEVICE Fault decode_stream(const KvsScalableJob& job, const Shared& shared) const;
  KVS_DEVICE bool decode_base(Stream& stream) const;
  KVS_DEVICE bool decode_refinement(Stream& stream, std::uint32_t level) const;
};

KVS_DEVICE DecodeLevels::Shared DecodeLevels::load_tables() const {
  Shared shared{};
  shared.first = tables->first[0];
  shared.classes = shared_classes(shared.first, classes_end, most_shared);
  shared.slots = (shared_address() + kSlots - 1) / kSlots * kSlots;
  shared.entries = shared.slots + shared.classes * kSlots;
  shared.thresholds = shared.entries + shared.classes * 4 * kBaseSymbols;
  shared.ring = shared.thresholds + kThresholdBytes + simt::warp() * WordRing::kBytes;
  const std::uint32_t begin = simt::thread(), step = simt::threads();
  const auto* slots = reinterpret_cast<const std::uint32_t*>(tables->slots[0] + shared.first * kSlots);
  for (std::uint32_t i = begin; i < shared.classes * (kSlots / 4); i += step)
    store_shared_32(shared.slots + 4 * i, slots[i]);
  const auto* entries = tables->symbols[0] + shared.first * kBaseSymbols;
  for (std::uint32_t i = begin; i < shared.classes * kBaseSymbols; i += step)
    store_shared_32(shared.entries + 4 * i, turn_entry(entries[i]));
  const auto* thresholds = reinterpret_cast<const std::uint32_t*>(tables->thresholds);
  for (std::uint32_t i = begin; i < kThresholdBytes / 8; i += step) {
    const std::uint32_t side = i % kSides, context = side < 3 ? 3 - side : side < 7 ? side - 3 : 3;
    const std::uint32_t both = thresholds[i / kSides * kContexts + context];
    store_shared_32(shared.thresholds + 8 * i, both & 0xFFFF);
    store_shared_32(shared.thresholds + 8 * i + 4, both >> 16);
  }
  return shared;
}

// The numbers of a block of level 0.
template <typename Tables>
KVS_DEVICE void DecodeLevels::decode_base_block(Base& base, const Tables& tables, Octet* to) {
  const std::uint32_t tokens = base.job.tokens;
  KVS_UNROLL_NO
  for (std::uint32_t left = tokens; left >= kOctet; left -= kOctet, to += kLanes)
    *to = decode_base_octet<true>(base, tables, kOctet);
  if (tokens % kOctet != 0) *to = decode_base_octet<false>(base, tables, tokens % kOctet);
}

// `rows` of 8 tokens, or all of them; the others are 0.
template <bool whole, typename Tables>
KVS_DEVICE Octet DecodeLevels::decode_base_octet(Base& base, const Tables& tables, std::uint32_t rows) {
  Octet symbols{}, octet{};
  KVS_UNROLL
  for (std::uint32_t i = 0; i < kOctet; ++i) {
    std::uint32_t symbol = kBaseOffset;
    if (whole || i < rows) {
      symbol = tables.symbol(base.state);
      const std::uint32_t popped = pop_turned(base.state, tables.entry(symbol));
      base.state = base.words.feed(popped, popped < base.hungry_below);
    }
    symbols.pairs[i / 2] |= symbol << 16 * (i % 2);
    if (i % WordRing::kRows == WordRing::kRows - 1) base.words.refill();
  }
  const bool active = base.hungry_below != 0;
  std::uint32_t escapes = 0;  // bits 8 and 24 where a symbol is the last one
  KVS_UNROLL
  for (std::uint32_t i = 0; i < kOctet / 2; ++i) {
    escapes |= symbols.pairs[i] + 0x00010001u;
    const std::uint32_t pair = symbols.pairs[i] + (0x80008000u - 0x007F007Fu);  // no half borrows
    octet.pairs[i] = active ? pair ^ 0x80008000u : 0;
  }
  static_assert(kBaseEscape == 0xFF && kBaseOffset == 0x7F);
  if (simt::ballot(active && (escapes & 0x01000100u) != 0) != 0) take_escapes(base, symbols, octet);
  return octet;
}

// Puts the escapes of eight rows in their places.
KVS_DEVICE void DecodeLevels::take_escapes(Base& base, const Octet& symbols, Octet& octet) {
  const auto* escapes = reinterpret_cast<const std::int16_t*>(base.job.escapes);
  KVS_UNROLL
  for (std::uint32_t i = 0; i < kOctet; ++i) {
    const std::uint32_t shift = 16 * (i % 2);
    const bool escaped = base.hungry_below != 0 && (symbols.pairs[i / 2] >> shift & 0xFFFF) == kBaseEscape;
    const std::uint32_t all = simt::ballot(escaped);
    const std::uint32_t index = base.escapes_taken + simt::count_bits(all & simt::lanes_before());
    base.escapes_taken += simt::count_bits(all);
    if (!escaped) continue;
    const std::int32_t number = index < base.job.escape_count ? escapes[index] : kMostBase + 1;
    base.sound &= number >= -kMostBase && number <= kMostBase;
    octet.pairs[i / 2] &= ~(0xFFFFu << shift);
    octet.pairs[i / 2] |= (static_cast<std::uint32_t>(number) & 0xFFFF) << shift;
  }
}

KVS_DEVICE bool DecodeLevels::decode_base(Stream& stream) const {
  const KvsScalableJob& job = stream.job;
  const Shared& shared = stream.shared;
  const std::uint32_t lane = simt::lane(), coded = job.coded[0];
  Base base{job, WordRing(shared.ring, job.words[0], job.word_counts[0]), stream.state, 0};
  for (std::uint32_t begin = 0; begin < coded; begin += kLanes) {
    const bool active = begin + lane < coded;
    const std::uint32_t k = active ? class_of(stream.order[begin + lane]) : shared.first;
    const std::uint32_t own = k - shared.first < kClasses - shared.first ? k - shared.first : 0;
    auto* const to = reinterpret_cast<Octet*>(stream.numbers + place_of_octet(begin + lane, 0, job.tokens));
    const std::uint32_t before = base.state;
    base.hungry_below = active ? kStateMin : 0;
    // One block's lanes have one class, or neighbouring ones: seldom are some tables here and some far.
    if (simt::ballot(own >= shared.classes) == 0) {
      decode_base_block(base,
                        NearTables{shared.slots + own * kSlots, shared.entries + own * 4 * kBaseSymbols}, to);
    } else {
      decode_base_block(
          base, FarTables{tables->slots[shared.first + own], tables->symbols[shared.first + own]}, to);
    }
    if (!active) base.state = before;
    if (base.words.ran_out() || base.escapes_taken > job.escape_count) return false;
  }
  stream.state = base.state;
  return base.words.read_to_the_end() && base.escapes_taken == job.escape_count &&
         simt::ballot(!base.sound) == 0;
}

template <bool whole>
KVS_DEVICE Octet DecodeLevels::refine_octet(Refinement& level, const Octet& coarse, std::uint32_t rows) {
  Octet octet{};
  KVS_UNROLL
  for (std::uint32_t i = 0; i < kOctet; ++i) {
    std::int32_t fine = 0;
    if (whole || i < rows) {
      const std::int32_t number = number_in(coarse.pairs[i / 2], i % 2);
      std::uint32_t c1, c2;
      load_shared_64(level.thresholds + 8 * side_of(number), c1, c2);
      const std::uint32_t popped = pop_refinement(level.state, c1, c2, number, fine);
      level.state = level.words.feed(popped, popped < level.hungry_below);
    }
    octet.pairs[i / 2] |= (static_cast<std::uint32_t>(fine) & 0xFFFF) << 16 * (i % 2);
    if (i % WordRing::kRows == WordRing::kRows - 1) level.words.refill();
  }
  KVS_UNROLL
  for (std::uint32_t i = 0; i < kOctet / 2; ++i) octet.pairs[i] = level.hungry_below ? octet.pairs[i] : 0;
  return octet;
}

// The numbers of a block, in place; `coarser`: levels before have written some. Those of the next octet are
// on their way while one is decoded.
KVS_DEVICE void DecodeLevels::refine_block(Refinement& level, std::uint32_t tokens, bool coarser,
                                           Octet* octets) {
  Octet ahead = coarser ? *octets : Octet{};
  KVS_UNROLL_NO
  for (std::uint32_t left = tokens; left >= kOctet; left -= kOctet, octets += kLanes) {
    const Octet coarse = ahead;
    if (coarser && left > kOctet) ahead = octets[kLanes];
    *octets = refine_octet<true>(level, coarse, kOctet);
  }
  if (tokens % kOctet != 0) *octets = refine_octet<false>(level, ahead, tokens % kOctet);
}

KVS_DEVICE bool DecodeLevels::decode_refinement(Stream& stream, std::uint32_t level) const {
  const KvsScalableJob& job = stream.job;
  const std::uint32_t lane = simt::lane(), coded = job.coded[level];
  const std::uint32_t written =
      (job.coded[level - 1] + kLanes - 1) / kLanes * kLanes;  // by the levels before
  Refinement own{WordRing(stream.shared.ring, job.words[level], job.word_counts[level]), stream.state, 0, 0};
  for (std::uint32_t begin = 0; begin < coded; begin += kLanes) {
    const bool active = begin + lane < coded;
    const std::uint32_t k = active ? class_of(stream.order[begin + lane]) : 0;
    const std::uint32_t before = own.state;
    own.hungry_below = active ? kStateMin : 0;
    own.thresholds = stream.shared.thresholds + 8 * kSides * ((level - 1) * kClasses + k);
    refine_block(own, job.tokens, begin < written,
                 reinterpret_cast<Octet*>(stream.numbers + place_of_octet(begin + lane, 0, job.tokens)));
    if (!active) own.state = before;
    if (own.words.ran_out()) return false;
  }
  stream.state = own.state;
  return own.words.read_to_the_end();
}

KVS_DEVICE Fault DecodeLevels::decode_stream(const KvsScalableJob& job, const Shared& shared) const {
  const auto* classes = reinterpret_cast<const std::uint8_t*>(job.classes);
  const auto* states = reinterpret_cast<const std::uint32_t*>(job.states);
  std::uint32_t* const own_order = order + job.order;
  auto* const counters =
      reinterpret_cast<std::uint32_t*>(simt::shared_memory() + (shared.ring - shared_address()));
  sort_components(job, classes, counters, own_order);
  const bool used = simt::lane() < job.coded[job.object_levels - 1];
  Stream stream{job, shared, own_order, numbers + job.numbers, used ? states[simt::lane()] : kStateMin};
  if (simt::ballot(stream.state < kStateMin || stream.state >> 31) != 0) return Fault::kBadPayload;
  if (!decode_base(stream)) return Fault::kBadPayload;
  for (std::uint32_t level = 1; level < job.levels; ++level) {
    if (!decode_refinement(stream, level)) return Fault::kBadPayload;
  }
  const bool ended = simt::ballot(stream.state != kStateMin) == 0;
  return job.levels < job.object_levels || ended ? Fault::kNone : Fault::kBadPayload;
}

KVS_DEVICE void DecodeLevels::operator()() const {
  const Shared shared = load_tables();
  simt::sync_block();
  for (std::uint32_t i = simt::block() * simt::warps() + simt::warp(); i < count;
       i += simt::blocks() * simt::warps()) {
    const KvsScalableJob& job = jobs[i];
    const Fault fault = job.exact_count == kRawStream ? Fault::kNone : decode_stream(job, shared);
    if (simt::lane() == 0) faults[i] = static_cast<std::uint32_t>(fault);
  }
}

}  // namespace kvs
