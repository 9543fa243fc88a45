// Lossless decode: one warp decodes one head's stream and puts each row of 32 values where the pages want it.
//
// Instructions for a row of 32 values in the fast loop, counted in the source: 8 take the symbol out of the
// state (two of them look it up in shared memory), 10 give hungry lanes their words (one ballot, two counts
// of bits), 3 fetch the six stored bits, 2 put the value together, 1 watches for escapes, 3 store it and move
// on, 5 are the loops, the refill of words and the pages' blocks: about 32, one for each value of a lane.
// Device memory for a row: 64 bytes out, 24 + some 18 (at 10.4 bits a value) in. Neither is read twice; the
// 64 bytes are two whole sectors (of 32 bytes), so that wider stores would save nothing but their staging.
// Shared memory: 68.1 KB of tables and 512 bytes of words for each warp: 76.1 KB for 16 warps, two blocks to
// a multiprocessor. A state's way from one row to the next is some 200 cycles (three lookups, one ballot), so
// that 8 warps to a scheduler keep it busy.

#include "api.h"
#include "lossless_decode.h"
#include "pages.h"

namespace kvs {
namespace {

// What a lane knows of the component that it decodes.
struct LaneClass {
  std::int32_t first_slot;  // of its table: -65536 to -4096, a multiple of 4096
  std::uint32_t entries;    // index of its table's entries
  std::uint32_t base;       // class_base

  KVS_DEVICE explicit LaneClass(std::uint32_t packed)
      : first_slot(static_cast<std::int32_t>((packed & 15) * kSlots) -
                   static_cast<std::int32_t>(DecodeTables::kAllSlots)),
        entries((packed & 15) * DecodeTables::kStride),
        base(class_base(packed >> kClassBits, packed >> 4 & 1)) {}

  // Whether no step leads below the exponent 0: values then need no modulo.
  KVS_DEVICE bool plain() const { return (base >> 7 & 255) >= 15; }
};

// A symbol taken out of a state.
struct Popped {
  std::uint32_t state, symbol, entry;

  KVS_DEVICE bool escapes() const { return (entry & DecodeTables::kEscape) != 0; }
};

KVS_DEVICE Popped pop(const DecodeTables& tables, const LaneClass& lane, std::uint32_t state) {
  const std::int32_t slot = static_cast<std::int32_t>(slot_of(state)) | lane.first_slot;
  const std::uint32_t symbol = tables.slots[slot + static_cast<std::int32_t>(DecodeTables::kAllSlots)];
  const std::uint32_t entry = tables.entries[lane.entries + symbol];
  const std::uint32_t popped = DecodeTables::frequency(entry) * (state >> kSlotBits) +
                               static_cast<std::uint32_t>(slot) + DecodeTables::back(entry);
  return {popped, symbol, entry};
}

// The value in bits 0-15 (others may be set), of a class that is plain. Bit 5 of the sum is there for the
// symbol's sign to be subtracted from.
KVS_DEVICE std::uint32_t plain_value(std::uint32_t base, std::uint32_t symbol, std::uint32_t low) {
  const std::uint32_t coded = (base | 32) + symbol * (0x8000 - 32);
  return (coded & ~63u) | (low & 63);
}

KVS_DEVICE std::uint32_t any_value(std::uint32_t base, std::uint32_t symbol, std::uint32_t low) {
  return assemble_value(base, (symbol / 2 | symbol % 2 << 5) << 24, low);
}

// One lane's part of four whole rows of stored bits, asked for before they are needed.
class LowBits {
 public:
  static constexpr std::uint32_t kRows = WordQueue::kMost;

  // `rows` of the stream: the two bytes before them may be read, and those behind them, which are classes.
  KVS_DEVICE explicit LowBits(const std::uint8_t* rows) {
    const std::uint32_t skew = reinterpret_cast<std::uintptr_t>(rows) % 4;
    const std::uint32_t bit = 8 * skew + kLowBits * simt::lane();
    offset_ = static_cast<std::int32_t>(bit / 32 * 4) - static_cast<std::int32_t>(skew);
    shift_ = bit % 32;
  }

  KVS_DEVICE void ask(const std::uint8_t* row) {
    const auto* from = reinterpret_cast<const std::uint32_t*>(row + offset_);
    KVS_UNROLL for (std::uint32_t i = 0; i < kRows; ++i) {
      first_[i] = load_constant(from + 6 * i);
      second_[i] = shift_ > 32 - kLowBits ? load_constant(from + 6 * i + 1) : 0;
    }
  }

  // The lane's number in bits 0-5, others above.
  KVS_DEVICE std::uint32_t at(std::uint32_t row) const {
    return static_cast<std::uint32_t>((std::uint64_t{second_[row]} << 32 | first_[row]) >> shift_);
  }

 private:
  std::int32_t offset_;
  std::uint32_t shift_;
  std::uint32_t first_[kRows], second_[kRows];
};

// The rows of a stream, front to back.
class Rows {
 public:
  // `whole`: rows of 32 lanes, those of partial blocks come behind them.
  KVS_DEVICE Rows(const std::uint8_t* rows, std::uint32_t whole) : row_(rows), whole_(whole), ahead_(rows) {}

  // The next four, which must be whole.
  KVS_DEVICE void take_four(std::uint32_t (&low)[LowBits::kRows]) {
    if (asked_ != whole_) ahead_.ask(row_);
    KVS_UNROLL for (std::uint32_t i = 0; i < LowBits::kRows; ++i) low[i] = ahead_.at(i);
    row_ += LowBits::kRows * kWholeRow;
    whole_ -= LowBits::kRows;
    if (whole_ >= LowBits::kRows) {
      ahead_.ask(row_);
      asked_ = whole_;
    }
  }

  // The lane's number of the next row, which has `lanes`.
  KVS_DEVICE std::uint32_t take_one(std::uint32_t lanes) {
    const std::uint32_t bit = kLowBits * simt::lane();
    std::uint32_t low = 0;
    if (simt::lane() < lanes) {
      low = load_constant(row_ + bit / 8);
      if (bit % 8 > 8 - kLowBits) low |= std::uint32_t{load_constant(row_ + bit / 8 + 1)} << 8;
    }
    row_ += bytes_of_row(lanes);
    whole_ -= lanes == kLanes;
    return low >> bit % 8 & 63;
  }

 private:
  static constexpr std::uint32_t kWholeRow = 24;

  const std::uint8_t* row_;
  std::uint32_t whole_;      // left
  std::uint32_t asked_ = 0;  // `whole_` when `ahead_` is what comes next; none is asked for before 0 rows
  LowBits ahead_;
};

// A warp's stream while it is decoded.
class HeadDecoder {
 public:
  KVS_DEVICE HeadDecoder(const DecodeTables& tables, std::uint8_t* shared, const CodedParts& parts,
                         std::uint32_t lanes, std::uint32_t whole_rows)
      : tables_(tables),
        words_(shared, parts.words, parts.word_count),
        escapes_(parts.escapes, parts.escape_count),
        rows_(parts.rows, whole_rows),
        takes_part_(simt::lane() < lanes),
        state_(takes_part_ ? load_two_words(parts.states + 4 * simt::lane()) : kStateMin) {}

  KVS_DEVICE bool bad_states() const { return simt::ballot(state_ < kStateMin || state_ >> 31) != 0; }

  // All tokens of a block of components; `to` is the first token's place of the lane's component.
  KVS_DEVICE void decode_block(const LaneClass& lane, std::uint32_t lanes, std::uint16_t* to,
                               const KvsPages& pages, std::uint32_t token, std::uint32_t end) {
    const bool fast = lanes == kLanes && simt::ballot(!lane.plain()) == 0;
    TokenWalk walk(pages, token, end);
    while (!walk.ended()) {
      TokenRun run = walk.next();
      std::uint16_t* at = to + run.offset;
      if (fast) {
        for (; run.tokens >= LowBits::kRows; run.tokens -= LowBits::kRows) {
          at = decode_four_rows(lane, at, pages.token_stride);
        }
      }
      for (; run.tokens > 0; --run.tokens, at += pages.token_stride) decode_row(lane, lanes, at);
    }
  }

  KVS_DEVICE bool overdrawn() const { return words_.overdrawn() || escapes_.overdrawn(); }

  KVS_DEVICE bool finished() const {
    return simt::ballot(state_ != kStateMin) == 0 && words_.empty() && escapes_.empty();
  }

 private:
  // Escapes are rare: they are looked for once in four rows.
  KVS_DEVICE std::uint16_t* decode_four_rows(const LaneClass& lane, std::uint16_t* to,
                                             std::int64_t token_stride) {
    std::uint32_t values[LowBits::kRows], entries[LowBits::kRows];
    rows_.take_four(values);
    words_.fill();
    std::uint32_t any = 0;
    KVS_UNROLL for (std::uint32_t i = 0; i < LowBits::kRows; ++i) {
      const Popped popped = pop(tables_, lane, state_);
      state_ = words_.pull(popped.state, true);
      values[i] = plain_value(lane.base, popped.symbol, values[i]);
      entries[i] = popped.entry;
      any |= popped.entry;
    }
    if (simt::ballot((any & DecodeTables::kEscape) != 0) != 0) {
      KVS_UNROLL for (std::uint32_t i = 0; i < LowBits::kRows; ++i) {
        values[i] = escapes_.take(values[i], (entries[i] & DecodeTables::kEscape) != 0);
      }
    }
    KVS_UNROLL for (std::uint32_t i = 0; i < LowBits::kRows; ++i, to += token_stride) {
      store_away(to, static_cast<std::uint16_t>(values[i]));
    }
    return to;
  }

  // Any row, as the format is written down.
  KVS_DEVICE void decode_row(const LaneClass& lane, std::uint32_t lanes, std::uint16_t* to) {
    const bool takes_part = simt::lane() < lanes;
    const std::uint32_t low = rows_.take_one(lanes);
    words_.fill();
    Popped popped = pop(tables_, lane, state_);
    if (!takes_part) popped = {state_, 0, 0};
    state_ = words_.pull(popped.state, takes_part);
    const std::uint32_t value = escapes_.take(any_value(lane.base, popped.symbol, low), popped.escapes());
    if (takes_part) store_away(to, static_cast<std::uint16_t>(value));
  }

  const DecodeTables& tables_;
  WordQueue words_;
  EscapeBytes escapes_;
  Rows rows_;
  bool takes_part_;
  std::uint32_t state_;
};

}  // namespace

struct LosslessDecode {
  static constexpr std::uint32_t kThreads = 512;
  static constexpr std::uint32_t kResident = 2;    // 64 registers
  static constexpr std::uint32_t kLeastWarps = 4;  // build the tables in some 10 us

  const KvsLosslessJob* jobs;
  std::uint32_t count;
  KvsPages pages;
  std::uint32_t* faults;

  static std::size_t shared_bytes(std::uint32_t threads) {
    return DecodeTables::kBytes + threads / simt::kWarp * WordQueue::kBytes;
  }

  KVS_DEVICE void operator()() const {
    std::uint8_t* shared = simt::shared_memory();
    const DecodeTables tables(shared);
    tables.build();
    std::uint8_t* words = shared + DecodeTables::kBytes + simt::warp() * WordQueue::kBytes;
    for (std::uint32_t i = simt::warp() * simt::blocks() + simt::block(); i < count;
         i += simt::warps() * simt::blocks()) {
      const Fault fault = decode(tables, words, jobs[i]);
      if (simt::lane() == 0) faults[i] = static_cast<std::uint32_t>(fault);
    }
  }

 private:
  KVS_DEVICE Fault decode(const DecodeTables& tables, std::uint8_t* words, const KvsLosslessJob& job) const {
    const auto* stream = reinterpret_cast<const std::uint8_t*>(job.stream);
    if (job.length < kRawHeader) return Fault::kBadPayload;
    const std::uint8_t mode = load_constant(stream);
    if (mode == kModeRaw) return copy_raw(stream, job);
    if (mode == kModeCoded) return decode_coded(tables, words, stream, job);
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
      store_away(to + token * pages.token_stride + at, load_constant(from + i));
      for (at += simt::kWarp; at >= pages.dim; at -= pages.dim) ++token;
    }
    return from + std::uint64_t{tokens} * pages.dim;
  }

  KVS_DEVICE Fault decode_coded(const DecodeTables& tables, std::uint8_t* words, const std::uint8_t* stream,
                                const KvsLosslessJob& job) const {
    const std::uint32_t components = job.layers * job.kinds * pages.dim;
    CodedParts parts;
    if (!parts.cut(stream, job.length, components, job.tokens)) return Fault::kBadPayload;
    HeadDecoder decoder(tables, words, parts, components < kLanes ? components : kLanes,
                        components / kLanes * job.tokens);
    if (decoder.bad_states()) return Fault::kBadPayload;
    for (std::uint32_t begin = 0; begin < components; begin += kLanes) {
      const std::uint32_t lanes = components - begin < kLanes ? components - begin : kLanes;
      const std::uint32_t component = begin + (simt::lane() < lanes ? simt::lane() : 0);
      const LaneClass lane(parts.read_class(component));
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
