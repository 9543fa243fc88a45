// Codec 3 on a GPU, first kernel: rANS words of one to three levels to 16-bit numbers, one warp for each
// stream.
//
// A lane is a component, 32 to a block of the coding order; a row is one token of a block. Numbers lie in
// scratch as [block][token][32 lanes]: a row is one store of 64 bytes, and what the transform multiplies with
// is one piece.
//
// What it costs, as PTX counts: a row of level 0 takes 40 instructions, two loads from tables (a byte, then a
// word) and one from the ring of words; a row of level 1 or 2 takes 46, with one load of thresholds, one of a
// word, one of the coarse number. Device memory: 2 bytes written by level 0, 4 read and written by each other
// level, and the bitstream once, in whole lines that are asked for 64 words ahead. Levels are serial, as are
// rows (states carry on): some 150 cycles each, which the 32 warps of an SM hide: they issue 40 instructions
// each in 320 cycles of a scheduler. One chunk alone (64 streams of 256 tokens x 1,024 components for an 8B
// model) has too few warps to hide it: some 2 ms.
//
// Shared memory: thresholds, 1.5 KB; tables of the smallest kMostShared classes that are coded at level 0, 5
// KB each (frequent: most components are small; the others are read through L1); for each warp 448 bytes: its
// words and the counters of the coding order. 99 KB at most, so that two blocks of 16 warps live on an SM of
// 227 KB.
#pragma once

#include "api.h"
#include "scalable_tables_packed.h"
#include "simt.h"

namespace kvs {

inline constexpr std::uint32_t kRawStream = 0xFFFF;

// The words of a level, two chunks of 64 in shared memory and a third on its way in a register of each lane.
class WordRing {
 public:
  static constexpr std::uint32_t kChunk = 2 * simt::kWarp, kWords = 2 * kChunk;

  // `from` is 4 bytes aligned, and has as many bytes as its words rounded up to 4.
  KVS_DEVICE WordRing(std::uint32_t* ring, std::uint64_t from, std::uint32_t count)
      : ring_(ring), from_(reinterpret_cast<const std::uint32_t*>(from)), count_(count) {
    simt::sync_warp();  // whoever still reads the words of the level before
    ring_[simt::lane()] = load_chunk(0);
    ring_[simt::kWarp + simt::lane()] = load_chunk(1);
    ahead_ = load_chunk(2);
    simt::sync_warp();
  }

  // The next word for each lane that is `hungry`, in the order of the lanes; of no meaning for others, and
  // behind the end, which `ran_out` tells.
  KVS_DEVICE std::uint32_t take(std::uint32_t hungry) {
    const std::uint32_t lanes = simt::ballot(hungry);
    const std::uint32_t index = at_ + simt::count_bits(lanes & simt::lanes_before());
    const std::uint32_t word = reinterpret_cast<const std::uint16_t*>(ring_)[index % kWords];
    at_ += simt::count_bits(lanes);
    if (at_ >= turn_at_) turn_over();
    return word;
  }

  KVS_DEVICE bool ran_out() const { return at_ > count_; }
  KVS_DEVICE bool read_to_the_end() const { return at_ == count_; }

 private:
  KVS_DEVICE std::uint32_t load_chunk(std::uint32_t chunk) const {
    const std::uint32_t pair = chunk * simt::kWarp + simt::lane();  // a stream has less than 2^32 bytes
    return pair < count_ / 2 + count_ % 2 ? from_[pair] : 0;
  }

  // The chunk behind `at_` makes room for the one that is on its way.
  KVS_DEVICE void turn_over() {
    simt::sync_warp();
    const std::uint32_t gone = turn_at_ / kChunk - 1;
    ring_[gone % 2 * simt::kWarp + simt::lane()] = ahead_;
    ahead_ = load_chunk(gone + 3);
    turn_at_ += kChunk;
    simt::sync_warp();
  }

  std::uint32_t* ring_;
  const std::uint32_t* from_;
  std::uint32_t count_, at_ = 0, turn_at_ = kChunk, ahead_;
};

struct DecodeLevels {
  static constexpr std::uint32_t kThreads = 512, kResident = 2;
  static constexpr std::uint32_t kMostShared = 18;
  static constexpr std::uint32_t kThresholds = 2 * kClasses * kContexts;
  static constexpr std::uint32_t kWarpBytes = 2 * WordRing::kWords + 4 * kClasses;
  static constexpr std::uint32_t kSharedBytes = 4 * kThresholds + kMostShared * (4 * kBaseSymbols + kSlots) +
                                                kThreads / simt::kWarp * kWarpBytes;  // at most
  static constexpr std::uint32_t kBatch = 4;  // rows whose coarse numbers are loaded at once

  const KvsScalableJob* jobs;
  std::uint32_t count;
  const PackedTables* tables;
  std::uint32_t classes_end;  // of all jobs
  std::int16_t* numbers;
  std::uint32_t* order;
  std::uint32_t* faults;

  // How many tables of level 0 are in shared memory, from `first` on.
  static KVS_HOST_DEVICE std::uint32_t shared_classes(std::uint32_t first, std::uint32_t classes_end) {
    const std::uint32_t classes = classes_end > first ? classes_end - first : 0;
    return classes < kMostShared ? classes : kMostShared;
  }
  static KVS_HOST_DEVICE std::uint32_t shared_bytes(std::uint32_t first, std::uint32_t classes_end,
                                                    std::uint32_t warps) {
    return 4 * kThresholds + shared_classes(first, classes_end) * (4 * kBaseSymbols + kSlots) +
           warps * kWarpBytes;
  }

  KVS_DEVICE void operator()() const;

 private:
  struct Shared {
    std::uint32_t* thresholds;
    std::uint32_t* symbols;
    std::uint8_t* slots;
    std::uint32_t first, classes;
    std::uint32_t* ring;      // of this warp
    std::uint32_t* counters;  // of this warp, [kClasses]
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
    std::uint32_t escapes_taken = 0;
    bool sound = true;
  };

  KVS_DEVICE Shared load_tables() const;
  static KVS_DEVICE void decode_base_rows(Base& base, const std::uint8_t* slots, const std::uint32_t* symbols,
                                          bool active, std::int16_t* row);
  KVS_DEVICE Fault decode_stream(const KvsScalableJob& job, const Shared& shared) const;
  KVS_DEVICE bool decode_base(Stream& stream) const;
  KVS_DEVICE bool decode_refinement(Stream& stream, std::uint32_t level) const;
};

// A component of the coding order: its number, which is below 2^16, and its class.
KVS_DEVICE std::uint32_t pack_component(std::uint32_t number, std::uint32_t k) { return number | k << 16; }
KVS_DEVICE std::uint32_t number_of(std::uint32_t component) { return component & 0xFFFF; }
KVS_DEVICE std::uint32_t class_of(std::uint32_t component) { return component >> 16; }

// Classes were checked where they were parsed; what is read here can do no harm in any case.
KVS_DEVICE std::uint32_t find_class(const std::uint8_t* classes, std::uint32_t number) {
  return classes[number] < kClasses ? classes[number] : kClasses - 1;
}

// Components by class, largest first, those of one class by their number: a counting sort by one warp.
KVS_DEVICE void sort_components(const KvsScalableJob& job, const std::uint8_t* classes,
                                std::uint32_t* counters, std::uint32_t* order) {
  const std::uint32_t lane = simt::lane(), last_first = job.first[job.object_levels - 1];
  simt::sync_warp();
  for (std::uint32_t k = lane; k < kClasses; k += simt::kWarp) counters[k] = 0;
  simt::sync_warp();
  for (std::uint32_t i = lane; i < job.components; i += simt::kWarp)
    simt::atomic_add(&counters[find_class(classes, i)], 1);
  simt::sync_warp();
  if (lane == 0) {
    std::uint32_t begin = 0;
    for (std::uint32_t k = kClasses; k-- > 0;) {
      const std::uint32_t number = counters[k];
      counters[k] = begin;
      begin += number;
    }
  }
  simt::sync_warp();
  for (std::uint32_t begin = 0; begin < job.components; begin += simt::kWarp) {
    const bool there = begin + lane < job.components;
    const std::uint32_t k = there ? find_class(classes, begin + lane) : kClasses;
    std::uint32_t same = 0xFFFFFFFFu;
    for (std::uint32_t bit = 0; bit < 6; ++bit) {
      const std::uint32_t set = simt::ballot(k >> bit & 1);
      same &= k >> bit & 1 ? set : ~set;
    }
    const std::uint32_t rank = simt::count_bits(same & simt::lanes_before());
    const std::uint32_t place = there ? counters[k] + rank : 0;
    simt::sync_warp();
    if (there && rank == 0) counters[k] += simt::count_bits(same);
    simt::sync_warp();
    if (there && k >= last_first && place < job.coded[job.object_levels - 1])
      order[place] = pack_component(begin + lane, k);
  }
  simt::sync_warp();
}

KVS_DEVICE DecodeLevels::Shared DecodeLevels::load_tables() const {
  std::uint8_t* memory = simt::shared_memory();
  Shared shared{};
  shared.first = tables->first[0];
  shared.classes = shared_classes(shared.first, classes_end);
  shared.thresholds = reinterpret_cast<std::uint32_t*>(memory);
  shared.symbols = shared.thresholds + kThresholds;
  shared.slots = reinterpret_cast<std::uint8_t*>(shared.symbols + shared.classes * kBaseSymbols);
  std::uint8_t* warps = shared.slots + shared.classes * kSlots + simt::warp() * kWarpBytes;
  shared.ring = reinterpret_cast<std::uint32_t*>(warps);
  shared.counters = shared.ring + WordRing::kWords / 2;
  const std::uint32_t begin = simt::thread(), step = simt::threads();
  for (std::uint32_t i = begin; i < kThresholds; i += step)
    shared.thresholds[i] = tables->thresholds[0][0][i];
  const auto* symbols = tables->symbols[0] + shared.first * kBaseSymbols;
  for (std::uint32_t i = begin; i < shared.classes * kBaseSymbols; i += step) shared.symbols[i] = symbols[i];
  const auto* slots = reinterpret_cast<const std::uint32_t*>(tables->slots[0] + shared.first * kSlots);
  auto* words = reinterpret_cast<std::uint32_t*>(shared.slots);
  for (std::uint32_t i = begin; i < shared.classes * (kSlots / 4); i += step) words[i] = slots[i];
  return shared;
}

// The rows of a block of level 0: of a lane's table, `slots` has the symbols and `symbols` their entries.
KVS_DEVICE void DecodeLevels::decode_base_rows(Base& base, const std::uint8_t* slots,
                                               const std::uint32_t* symbols, bool active, std::int16_t* row) {
  const std::uint32_t tokens = base.job.tokens;
  std::uint32_t state = base.state;
  KVS_UNROLL_NO
  for (std::uint32_t token = 0; token < tokens; ++token, row += kLanes) {
    const std::uint32_t symbol = slots[slot_of(state)];
    const std::uint32_t popped = pop_packed(state, symbols[symbol]);
    const std::uint32_t hungry = active ? needs_word(popped) : 0;
    const std::uint32_t word = base.words.take(hungry);
    if (active) state = hungry ? popped << 16 | word : popped;
    std::int32_t number = active ? static_cast<std::int32_t>(symbol) - kBaseOffset : 0;
    const bool escaped = active && symbol == kBaseEscape;
    const std::uint32_t all = simt::ballot(escaped);
    if (all != 0) {
      const std::uint32_t index = base.escapes_taken + simt::count_bits(all & simt::lanes_before());
      const auto* escapes = reinterpret_cast<const std::int16_t*>(base.job.escapes);
      if (escaped) number = index < base.job.escape_count ? escapes[index] : kMostBase + 1;
      base.sound &= number >= -kMostBase && number <= kMostBase;
      base.escapes_taken += simt::count_bits(all);
    }
    *row = static_cast<std::int16_t>(number);
  }
  base.state = state;
}

KVS_DEVICE bool DecodeLevels::decode_base(Stream& stream) const {
  const KvsScalableJob& job = stream.job;
  const Shared& shared = stream.shared;
  const std::uint32_t lane = simt::lane(), coded = job.coded[0];
  Base base{job, WordRing(shared.ring, job.words[0], job.word_counts[0]), stream.state};
  for (std::uint32_t begin = 0; begin < coded; begin += kLanes) {
    const bool active = begin + lane < coded;
    const std::uint32_t k = active ? class_of(stream.order[begin + lane]) : shared.first;
    const std::uint32_t own = k - shared.first < kClasses - shared.first ? k - shared.first : 0;
    std::int16_t* row = stream.numbers + static_cast<std::uint64_t>(begin) * job.tokens + lane;
    // One block's lanes have one class, or neighbouring ones: seldom are some tables here and some far.
    if (simt::ballot(own >= shared.classes) == 0) {
      decode_base_rows(base, shared.slots + own * kSlots, shared.symbols + own * kBaseSymbols, active, row);
    } else {
      decode_base_rows(base, tables->slots[shared.first + own], tables->symbols[shared.first + own], active,
                       row);
    }
    if (base.words.ran_out() || base.escapes_taken > job.escape_count) return false;
  }
  stream.state = base.state;
  return base.words.read_to_the_end() && base.escapes_taken == job.escape_count &&
         simt::ballot(!base.sound) == 0;
}

KVS_DEVICE bool DecodeLevels::decode_refinement(Stream& stream, std::uint32_t level) const {
  const KvsScalableJob& job = stream.job;
  const std::uint32_t lane = simt::lane(), tokens = job.tokens, coded = job.coded[level];
  const std::uint32_t written =
      (job.coded[level - 1] + kLanes - 1) / kLanes * kLanes;  // by the levels before
  WordRing words(stream.shared.ring, job.words[level], job.word_counts[level]);
  std::uint32_t state = stream.state;
  for (std::uint32_t begin = 0; begin < coded; begin += kLanes) {
    const bool active = begin + lane < coded, coarser = begin < written;
    const std::uint32_t k = active ? class_of(stream.order[begin + lane]) : 0;
    const std::uint32_t* thresholds = stream.shared.thresholds + ((level - 1) * kClasses + k) * kContexts;
    std::int16_t* rows = stream.numbers + static_cast<std::uint64_t>(begin) * tokens + lane;
    for (std::uint32_t token = 0; token < tokens; token += kBatch, rows += kBatch * kLanes) {
      std::int32_t coarse[kBatch];
      KVS_UNROLL
      for (std::uint32_t i = 0; i < kBatch; ++i) {
        coarse[i] = active && coarser && token + i < tokens ? rows[i * kLanes] : 0;
      }
      KVS_UNROLL
      for (std::uint32_t i = 0; i < kBatch; ++i) {
        if (token + i >= tokens) break;
        std::int32_t fine;
        const std::uint32_t context = context_of(coarse[i]);
        const std::uint32_t popped = pop_ternary(state, thresholds[context], coarse[i], fine);
        const std::uint32_t hungry = active ? needs_word(popped) : 0;
        const std::uint32_t word = words.take(hungry);
        if (active) state = hungry ? popped << 16 | word : popped;
        rows[i * kLanes] = static_cast<std::int16_t>(active ? fine : 0);
      }
    }
    if (words.ran_out()) return false;
  }
  stream.state = state;
  return words.read_to_the_end();
}

KVS_DEVICE Fault DecodeLevels::decode_stream(const KvsScalableJob& job, const Shared& shared) const {
  const auto* classes = reinterpret_cast<const std::uint8_t*>(job.classes);
  const auto* states = reinterpret_cast<const std::uint32_t*>(job.states);
  std::uint32_t* const own_order = order + job.order;
  sort_components(job, classes, shared.counters, own_order);
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
