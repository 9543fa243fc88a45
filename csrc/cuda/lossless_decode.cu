// Lossless decode: one warp decodes one head's stream and puts each row of 32 values where the pages want it.
//
// Instructions for a row in the fast loop, as ptxas makes it for sm_90 (142 for four rows where no words are
// refilled and nothing escapes): 9 take the symbol out of the state (two of them look it up in shared
// memory), 11 give hungry lanes their words (one ballot, two counts of bits), 2 put the value together, 5
// fetch and shift the six stored bits, 4 store it and move on, 5 are the loop and the watch for escapes. A
// refill takes 17 for each 64 words, some 7 rows; a block of pages some 45: about 40 for a row with blocks of
// 16 tokens. Device memory for a row: 64 bytes out, 24 + some 18 (at 10.4 bits a value) in. Neither is read
// twice; the 64 bytes are two whole sectors (of 32 bytes), so that wider stores would save nothing but their
// staging. Shared memory for a row: some 3.5 cycles for the slots (32 of 1,024 words: about that many fall in
// one bank), some 3 for the entries, 1 for the words, and 4 for what goes to and comes from device memory by
// the same pipe. Occupancy: 80.6 KB of shared memory for 16 warps, two blocks to a multiprocessor. A state's
// way from one row to the next is some 200 cycles (three lookups, one ballot), so that 8 warps to a scheduler
// keep it busy.

#include "lossless_decode.h"
#include "pages.h"

namespace kvs {
namespace {

// What a lane knows of the component that it decodes.
struct LaneClass {
  std::uint32_t slots, entries;  // of its table
  std::uint32_t base;            // class_base, with bit 5 set, which assemble_value ignores

  KVS_DEVICE LaneClass(const DecodeTables& tables, std::uint32_t packed)
      : slots(keep(tables.slots_of(packed & 15))),
        entries(keep(tables.entries_of(packed & 15))),
        base(keep(class_base(packed >> kClassBits, packed >> 4 & 1) | 32)) {}

  // Whether no step leads below the exponent 0: values then need no modulo.
  KVS_DEVICE bool plain() const { return (base >> 7 & 255) >= 15; }
};

// A symbol taken out of a state.
struct Popped {
  std::uint32_t state, symbol, entry;

  KVS_DEVICE bool escapes() const { return (entry & DecodeTables::kEscape) != 0; }
};

KVS_DEVICE Popped pop(const LaneClass& lane, std::uint32_t state) {
  const std::uint32_t slot = slot_of(state) | lane.slots;
  const std::uint32_t symbol = load_shared_8(slot + DecodeTables::kBack);
  const std::uint32_t entry = load_shared_32(lane.entries + 4 * symbol);
  const std::uint32_t popped =
      DecodeTables::frequency(entry) * (state >> kSlotBits) + (slot + DecodeTables::lacks(entry));
  return {popped, symbol, entry};
}

// The bits of `a` where `mask` has ones, the others of `b`: one instruction, if the compiler is told.
KVS_DEVICE std::uint32_t choose_bits(std::uint32_t mask, std::uint32_t a, std::uint32_t b) {
#ifdef __CUDACC__
  std::uint32_t chosen;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(chosen) : "r"(mask), "r"(a), "r"(b));
  return chosen;
#else
  return (a & mask) | (b & ~mask);
#endif
}

// The value in bits 0-15 (others may be set), of a class that is plain. Bit 5 of the sum is there for the
// symbol's sign to be subtracted from; the last line takes bits 0-5 from `low` and the others from the sum.
KVS_DEVICE std::uint32_t plain_value(std::uint32_t base, std::uint32_t symbol, std::uint32_t low) {
  const std::uint32_t coded = (base | 32) + symbol * (0x8000 - 32);
  return choose_bits(63, low, coded);
}

KVS_DEVICE std::uint32_t any_value(std::uint32_t base, std::uint32_t symbol, std::uint32_t low) {
  return assemble_value(base, (symbol / 2 | symbol % 2 << 5) << 24, low);
}

// The stored bits, row by row: four whole rows at once, asked for four rows ahead, or one of any kind.
class Rows {
 public:
  static constexpr std::uint32_t kAtOnce = WordQueue::kRows;

  // They begin at byte `rows` of a stream: `whole` of 32 lanes, then those of a partial block. Where there
  // are whole ones, the two bytes before them (of a word or a state) and the eight behind them (of classes)
  // may be read.
  KVS_DEVICE Rows(const std::uint8_t* stream, std::uint32_t rows, std::uint32_t whole)
      : stream_(stream), rows_(rows), last_(whole < kAtOnce ? 0 : (whole - kAtOnce) * kWholeRow) {
    const std::uint32_t skew = reinterpret_cast<std::uintptr_t>(stream + rows) % 4;
    const std::uint32_t bit = 8 * skew + kLowBits * simt::lane();
    first_at_ = keep(rows - skew + bit / 32 * 4);
    shift_ = keep(bit % 32);
  }

  // Before take_four, where anything else has been taken.
  KVS_DEVICE void prepare() {
    if (asked_ != at_) ask(at_);
  }

  // The lane's numbers of the next four rows, which must be whole, in bits 0-5; there are others above.
  KVS_DEVICE void take_four(std::uint32_t (&low)[kAtOnce]) {
    KVS_UNROLL for (std::uint32_t i = 0; i < kAtOnce; ++i) {
      low[i] = static_cast<std::uint32_t>((std::uint64_t{second_[i]} << 32 | first_[i]) >> shift_);
    }
    at_ += kAtOnce * kWholeRow;
    ask(at_ < last_ ? at_ : last_);
  }

  // The lane's number of the next row, which has `lanes`.
  KVS_DEVICE std::uint32_t take_one(std::uint32_t lanes) {
    const std::uint8_t* row = stream_ + (rows_ + at_);
    const std::uint32_t bit = kLowBits * simt::lane();
    std::uint32_t low = 0;
    if (simt::lane() < lanes) {
      low = load_constant(row + bit / 8);
      if (bit % 8 > 8 - kLowBits) low |= std::uint32_t{load_constant(row + bit / 8 + 1)} << 8;
    }
    at_ += bytes_of_row(lanes);
    return low >> bit % 8 & 63;
  }

 private:
  static constexpr std::uint32_t kWholeRow = 24;

  KVS_DEVICE void ask(std::uint32_t at) {
    const auto* from = reinterpret_cast<const std::uint32_t*>(stream_ + (first_at_ + at));
    KVS_UNROLL for (std::uint32_t i = 0; i < kAtOnce; ++i) {
      first_[i] = load_constant(from + kWholeRow / 4 * i);
      second_[i] = load_constant(from + kWholeRow / 4 * i + 1);
    }
    asked_ = at;
  }

  const std::uint8_t* stream_;
  std::uint32_t rows_;
  std::uint32_t first_at_,
      shift_;  // where the lane's number of the first row begins: aligned 32 bits, and the bit
  std::uint32_t at_ = 0, last_;  // bytes from rows_: the next row; the last four whole ones
  std::uint32_t asked_ = ~0u;    // which rows these are of:
  std::uint32_t first_[kAtOnce], second_[kAtOnce];
};

// A warp's stream while it is decoded.
class HeadDecoder {
 public:
  // `queue`: the warp's, in shared memory.
  KVS_DEVICE HeadDecoder(std::uint32_t queue, const CodedParts& parts, std::uint32_t lanes,
                         std::uint32_t whole_rows)
      : words_(queue, parts.stream, parts.words, parts.word_count()),
        escapes_(parts),
        rows_(parts.stream, parts.rows, whole_rows),
        state_(simt::lane() < lanes ? load_two_words(parts.stream + CodedParts::kStates + 4 * simt::lane())
                                    : kStateMin) {}

  KVS_DEVICE bool bad_states() const { return simt::ballot(state_ < kStateMin || state_ >> 31) != 0; }

  // All tokens of a block of components; `to` is the first token's place of the lane's component.
  KVS_DEVICE void decode_block(const LaneClass& lane, std::uint32_t lanes, std::uint16_t* to,
                               const KvsPages& pages, std::uint32_t token, std::uint32_t end) {
    const bool fast = lanes == kLanes && simt::ballot(!lane.plain()) == 0;
    TokenWalk walk(pages, token, end);
    while (!walk.ended()) {
      TokenRun run = walk.next();
      std::uint16_t* at = to + run.offset;
      if (fast && run.tokens >= Rows::kAtOnce) {
        rows_.prepare();
        do {
          at = decode_four_rows(lane, at, pages.token_stride);
          run.tokens -= Rows::kAtOnce;
        } while (run.tokens >= Rows::kAtOnce);
      }
      for (; run.tokens > 0; --run.tokens, at += pages.token_stride) decode_row(lane, lanes, at);
    }
  }

  KVS_DEVICE bool overdrawn() const { return words_.overdrawn() || escapes_.overdrawn(); }

  KVS_DEVICE bool finished() const {
    return simt::ballot(state_ != kStateMin) == 0 && words_.empty() && escapes_.empty();
  }

 private:
  // Escapes are rare: they are looked for once in four rows. Answers where the next row goes.
  KVS_DEVICE std::uint16_t* decode_four_rows(const LaneClass& lane, std::uint16_t* to,
                                             std::int64_t token_stride) {
    std::uint32_t values[Rows::kAtOnce], entries[Rows::kAtOnce];
    rows_.take_four(values);
    words_.fill();
    std::uint32_t any = 0;
    KVS_UNROLL for (std::uint32_t i = 0; i < Rows::kAtOnce; ++i) {
      const Popped popped = pop(lane, state_);
      state_ = words_.pull(popped.state, true);
      values[i] = plain_value(lane.base, popped.symbol, values[i]);
      entries[i] = popped.entry;
      any |= popped.entry;
    }
    if (simt::ballot((any & DecodeTables::kEscape) != 0) != 0) {
      KVS_UNROLL for (std::uint32_t i = 0; i < Rows::kAtOnce; ++i) {
        values[i] = escapes_.take(values[i], (entries[i] & DecodeTables::kEscape) != 0);
      }
    }
    KVS_UNROLL for (std::uint32_t i = 0; i < Rows::kAtOnce; ++i, to += token_stride) {
      store_value(to, static_cast<std::uint16_t>(values[i]));
    }
    return to;
  }

  // Any row, as the format is written down.
  KVS_DEVICE void decode_row(const LaneClass& lane, std::uint32_t lanes, std::uint16_t* to) {
    const bool takes_part = simt::lane() < lanes;
    const std::uint32_t low = rows_.take_one(lanes);
    words_.fill();
    Popped popped = pop(lane, state_);
    if (!takes_part) popped = {state_, 0, 0};
    state_ = words_.pull(popped.state, takes_part);
    const std::uint32_t value = escapes_.take(any_value(lane.base, popped.symbol, low), popped.escapes());
    if (takes_part) store_value(to, static_cast<std::uint16_t>(value));
  }

  WordQueue words_;
  EscapeBytes escapes_;
  Rows rows_;
  std::uint32_t state_;
};

}  // namespace

struct LosslessDecode {
  static constexpr std::uint32_t kThreads = 512;
  static constexpr std::uint32_t kResident =
      2;  // 64 registers; what does not fit is not used in the fast loop
  static constexpr std::uint32_t kLeastWarps = 4;  // build the tables in some 10 us

  const KvsLosslessJob* jobs;
  std::uint32_t count;
  KvsPages pages;
  std::uint32_t* faults;

  // The warps' queues, then the tables; the first queue begins at a multiple of its size.
  static std::size_t shared_bytes(std::uint32_t threads) {
    return WordQueue::kBytes - 1 + threads / simt::kWarp * WordQueue::kBytes + DecodeTables::kBytes;
  }

  KVS_DEVICE void operator()() const {
    const std::uint32_t queues =
        (shared_address() + WordQueue::kBytes - 1) / WordQueue::kBytes * WordQueue::kBytes;
    const DecodeTables tables(queues + simt::warps() * WordQueue::kBytes);
    tables.build();
    const std::uint32_t queue = keep(queues + simt::warp() * WordQueue::kBytes);
    for (std::uint32_t i = simt::warp() * simt::blocks() + simt::block(); i < count;
         i += simt::warps() * simt::blocks()) {
      const Fault fault = decode(tables, queue, jobs[i]);
      if (simt::lane() == 0) faults[i] = static_cast<std::uint32_t>(fault);
    }
  }

 private:
  KVS_DEVICE Fault decode(const DecodeTables& tables, std::uint32_t queue, const KvsLosslessJob& job) const {
    const auto* stream = reinterpret_cast<const std::uint8_t*>(job.stream);
    if (job.length < kRawHeader) return Fault::kBadPayload;
    const std::uint8_t mode = load_constant(stream);
    if (mode == kModeRaw) return copy_raw(stream, job);
    if (mode == kModeCoded) return decode_coded(tables, queue, stream, job);
    return Fault::kBadPayload;
  }

  KVS_DEVICE Fault copy_raw(const std::uint8_t* stream, const KvsLosslessJob& job) const {
    if (load_constant(stream + 1) != 0 || load_word(stream + 2) != 0) return Fault::kBadPayload;
    const std::uint32_t planes = std::uint32_t{job.layers} * job.kinds;
    if (job.length != kRawHeader + 2 * std::uint64_t{planes} * pages.dim * job.tokens)
      return Fault::kBadPayload;
    const auto* from = reinterpret_cast<const std::uint16_t*>(stream + kRawHeader);
    for (std::uint32_t plane = 0; plane < planes; ++plane) {
      std::uint16_t* head = find_plane(job, plane);
      TokenWalk walk(pages, job.token_begin, job.token_begin + job.tokens);
      while (!walk.ended()) {
        const TokenRun run = walk.next();
        from = copy_tokens(from, head + run.offset, run.tokens);
      }
    }
    return Fault::kNone;
  }

  // The lanes share the values of all tokens of a run, so that short heads keep them busy as well.
  KVS_DEVICE const std::uint16_t* copy_tokens(const std::uint16_t* from, std::uint16_t* to,
                                              std::uint32_t tokens) const {
    std::uint32_t token = simt::lane() / pages.dim, at = simt::lane() % pages.dim;
    for (std::uint32_t i = simt::lane(); token < tokens; i += simt::kWarp) {
      store_value(to + token * pages.token_stride + at, load_constant(from + i));
      for (at += simt::kWarp; at >= pages.dim; at -= pages.dim) ++token;
    }
    return from + std::uint64_t{tokens} * pages.dim;
  }

  KVS_DEVICE Fault decode_coded(const DecodeTables& tables, std::uint32_t queue, const std::uint8_t* stream,
                                const KvsLosslessJob& job) const {
    const std::uint32_t components = job.layers * job.kinds * pages.dim;
    CodedParts parts{};
    parts.stream = stream;
    if (!parts.cut(job.length, components, job.tokens)) return Fault::kBadPayload;
    HeadDecoder decoder(queue, parts, components < kLanes ? components : kLanes,
                        components / kLanes * job.tokens);
    if (decoder.bad_states()) return Fault::kBadPayload;
    for (std::uint32_t begin = 0; begin < components; begin += kLanes) {
      const std::uint32_t lanes = components - begin < kLanes ? components - begin : kLanes;
      const std::uint32_t component = begin + (simt::lane() < lanes ? simt::lane() : 0);
      const LaneClass lane(tables, parts.read_class(component));
      std::uint16_t* to = find_plane(job, component / pages.dim) + component % pages.dim;
      decoder.decode_block(lane, lanes, to, pages, job.token_begin, job.token_begin + job.tokens);
      if (decoder.overdrawn()) return Fault::kBadPayload;
    }
    return decoder.finished() ? Fault::kNone : Fault::kBadPayload;
  }

  KVS_DEVICE std::uint16_t* find_plane(const KvsLosslessJob& job, std::uint32_t plane) const {
    return find_head<std::uint16_t>(pages, job.layer_begin + plane / job.kinds,
                                    job.kind_begin + plane % job.kinds, job.head);
  }
};

}  // namespace kvs

extern "C" int kvs_lossless_decode(const KvsLosslessJob* jobs, std::uint32_t count, const KvsPages* pages,
                                   std::uint32_t* faults, void* stream) {
  std::uint32_t multiprocessors = 0;
  if (const int error = kvs::allow_multiprocessors(&multiprocessors); error != 0) return error;
  const kvs::LosslessDecode kernel{jobs, count, *pages, faults};
  const kvs::Grid grid =
      kvs::spread<kvs::LosslessDecode>(count, multiprocessors, kvs::LosslessDecode::kLeastWarps);
  return kvs::launch(kernel, grid.blocks, grid.threads, kernel.shared_bytes(grid.threads), stream);
}
