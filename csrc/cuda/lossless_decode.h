// What a warp needs to decode a lossless stream: the block's tables, the queue of words, the parts of a
// stream.
#pragma once

#include "../format.h"
#include "../lossless_tables.h"
#include "../rans.h"
#include "device_memory.h"
#include "launch.h"
#include "shared_memory.h"

namespace kvs {

// Sixteen tables of 4,096 packed entries would take 256 KB, more than a multiprocessor has. So a slot is
// looked up twice: a byte names the symbol (64 KB), a word says what pop_symbol needs of it (4 KB).
//
// The surprises first:
// - A symbol is 2 * step + sign here, so that one multiplication of it makes a value (plain_value).
// - The slots of all tables are one array, which begins at a multiple of 4096: an address in it is `state mod
// 4096`
//   put together with the table's own. It is a summand of the next state as well, as it stands: an entry says
//   by how much less than slot minus first[symbol] it is.
// - A table's entries begin one word further than a multiple of 64 words: tables differ in their banks.
struct DecodeTables {
  static constexpr std::uint32_t kAllSlots = kTables * kSlots;  // bytes
  static constexpr std::uint32_t kStride = kSymbols + 1;        // of a table's entries, in words
  static constexpr std::uint32_t kEntries = kTables * kStride;
  static constexpr std::uint32_t kEscape = 1u << 12;
  static constexpr std::uint32_t kBack =
      1u << 17;  // addresses of slots are counted from here: they are negative
  static constexpr std::uint32_t kBytes =
      4 * kEntries + kSlots - 1 + kAllSlots;  // more than there are, to align

  // Frequency in bits 0-11, escape in 12; in 15-31 what the address of the symbol's first slot lacks to
  // kBack.
  static constexpr std::uint32_t pack(std::uint32_t frequency, bool escape, std::uint32_t lacks) {
    return frequency | (escape ? kEscape : 0) | lacks << 15;
  }
  KVS_HOST_DEVICE static std::uint32_t frequency(std::uint32_t entry) { return entry & 0xFFF; }
  KVS_HOST_DEVICE static std::uint32_t lacks(std::uint32_t entry) { return entry >> 15; }

  std::uint32_t entries, slots;  // addresses

  // In kBytes of shared memory from `begin`, which is at most 60,000.
  KVS_DEVICE explicit DecodeTables(std::uint32_t begin)
      : entries(begin), slots((begin + 4 * kEntries + kSlots - 1) / kSlots * kSlots) {}

  KVS_DEVICE std::uint32_t entries_of(std::uint32_t table) const { return entries + 4 * kStride * table; }
  KVS_DEVICE std::uint32_t slots_of(std::uint32_t table) const { return slots + kSlots * table - kBack; }

  // By all threads of the block.
  KVS_DEVICE void build() const;
};

// The entries of slots from the address kLeast on.
struct DecodeEntries {
  static constexpr std::uint32_t kLeast = kSlots;

  std::uint32_t words[DecodeTables::kEntries];

  constexpr DecodeEntries() : words() {
    for (std::uint32_t table = 0; table < kTables; ++table) {
      std::uint32_t lacks = DecodeTables::kBack - table * kSlots;
      for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        const std::uint32_t step = symbol % 32, frequency = kFrequencies[table][symbol];
        words[table * DecodeTables::kStride + 2 * step + symbol / 32] =
            DecodeTables::pack(frequency, step >= kEscapeStep, lacks - kLeast);
        lacks -= frequency;
      }
    }
  }
};
KVS_DEVICE_TABLE DecodeEntries kDecodeEntries;

// Some 5,000 cycles for a block of 16 warps: 3 us, once for all of its streams.
KVS_DEVICE void DecodeTables::build() const {
  const std::uint32_t further = slots - DecodeEntries::kLeast;
  for (std::uint32_t i = simt::thread(); i < kEntries; i += simt::threads()) {
    store_shared_32(entries + 4 * i, kDecodeEntries.words[i] - (further << 15));
  }
  simt::sync_block();
  for (std::uint32_t table = simt::warp(); table < kTables; table += simt::warps()) {
    for (std::uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
      const std::uint32_t entry = load_shared_32(entries_of(table) + 4 * symbol);
      const std::uint32_t first = kBack - lacks(entry);
      for (std::uint32_t i = simt::lane(); i < frequency(entry); i += simt::kWarp) {
        store_shared_8(first + i, symbol);
      }
    }
  }
  simt::sync_block();
}

// The words of a stream on their way to the lanes: 256 of them in shared memory, 64 more already asked for,
// one pair in a register of each lane. Device memory is read in whole, aligned 32-bit numbers, coalesced, and
// never waited for unless a warp takes 64 words in less time than a read takes.
class WordQueue {
 public:
  static constexpr std::uint32_t kRows = 4;     // that fill() has words for, whatever they take
  static constexpr std::uint32_t kBytes = 512;  // in shared memory: more than twice what kRows may take

  // `queue`: kBytes of shared memory, at a multiple of kBytes. The words begin at byte `words` of a coded
  // stream: the two bytes before them (of a state) and behind them (rows and classes) may be read.
  KVS_DEVICE WordQueue(std::uint32_t queue, const std::uint8_t* stream, std::uint32_t words,
                       std::uint32_t count)
      : queue_(queue), stream_(stream) {
    next_ = reinterpret_cast<std::uintptr_t>(stream + words) % 4;
    from_ = words - next_;
    end_ = next_ + 2 * count;
    asked_ = ask();
  }

  // Words for the next kRows rows are in the queue after this: zeros where the stream has no more. All lanes.
  KVS_DEVICE void fill() {
    if (filled_ >= next_ + kMostTaken) return;
    simt::sync_warp();  // what is overwritten has been read by all
    do {
      store_shared_32((queue_ | filled_ % kBytes) + 4 * simt::lane(), asked_);
      filled_ += kFill;
      asked_ = ask();
    } while (filled_ < next_ + kMostTaken);
    simt::sync_warp();
  }

  // The state of a row's lane after it took its word, where it needs one; lanes take them in ascending order.
  KVS_DEVICE std::uint32_t pull(std::uint32_t state, bool takes_part) {
    const bool needs = takes_part && state < kStateMin;
    const std::uint32_t hungry = simt::ballot(needs);
    const std::uint32_t at = next_ + 2 * simt::count_bits(hungry & simt::lanes_before());
    next_ += 2 * simt::count_bits(hungry);
    const std::uint32_t word = load_shared_16(queue_ | at % kBytes);  // not a lane's own where it needs none
    return needs ? pull_word(state, word, 1) : state;
  }

  KVS_DEVICE bool overdrawn() const { return next_ > end_; }
  KVS_DEVICE bool empty() const { return next_ == end_; }

 private:
  static constexpr std::uint32_t kFill = 4 * kLanes;               // bytes that are asked for at once
  static constexpr std::uint32_t kMostTaken = 2 * kLanes * kRows;  // bytes

  KVS_DEVICE std::uint32_t ask() const {
    const std::uint32_t begin = filled_ + 4 * simt::lane();
    return begin < end_ ? load_constant(reinterpret_cast<const std::uint32_t*>(stream_ + (from_ + begin)))
                        : 0;
  }

  std::uint32_t queue_;
  const std::uint8_t* stream_;
  std::uint32_t from_;  // where in the stream the words begin, or two bytes before them: 4 bytes aligned
  std::uint32_t next_, end_;  // bytes from there
  std::uint32_t filled_ = 0;  // where the next pairs go: a multiple of kFill
  std::uint32_t asked_;
};

KVS_DEVICE std::uint32_t load_word(const std::uint8_t* from) {
  return load_constant(reinterpret_cast<const std::uint16_t*>(from));
}
KVS_DEVICE std::uint32_t load_two_words(const std::uint8_t* from) {
  return load_word(from) | load_word(from + 2) << 16;
}

KVS_DEVICE std::uint32_t bytes_of_row(std::uint32_t lanes) { return (lanes * kLowBits + 7) / 8; }

// A coded stream cut up. Parts are named by where they begin, in bytes from its start; all are 2 bytes
// aligned but for classes and escapes.
struct CodedParts {
  static constexpr std::uint32_t kStates = kCodedHeader;

  const std::uint8_t* stream;
  std::uint32_t words, rows, classes, escapes;

  // Read where they are needed: registers are scarcer.
  KVS_DEVICE std::uint32_t top_min() const { return load_constant(stream + 1); }
  KVS_DEVICE std::uint32_t top_bits() const { return load_constant(stream + 2); }
  KVS_DEVICE std::uint32_t word_count() const { return load_two_words(stream + 4); }
  KVS_DEVICE std::uint32_t escape_count() const { return load_two_words(stream + 8); }

  // Where the parts lie in `length` bytes. False where the header is not one, or calls for another length.
  KVS_DEVICE bool cut(std::uint32_t length, std::uint32_t components, std::uint32_t tokens) {
    if (length < kCodedHeader) return false;
    if (top_bits() > 8 || load_constant(stream + 3) != 0) return false;
    const std::uint32_t last = (components - 1) / kLanes, lanes = components < kLanes ? components : kLanes;
    const std::uint64_t row =
        std::uint64_t{last} * bytes_of_row(kLanes) + bytes_of_row(components - last * kLanes);
    const std::uint64_t at_words = kStates + 4 * lanes;
    const std::uint64_t at_rows = at_words + 2 * std::uint64_t{word_count()};
    const std::uint64_t at_classes = at_rows + tokens * row;
    const std::uint64_t at_escapes =
        at_classes + (std::uint64_t{components} * (kClassBits + top_bits()) + 7) / 8;
    words = static_cast<std::uint32_t>(at_words);  // they fit where the length is right
    rows = static_cast<std::uint32_t>(at_rows);
    classes = static_cast<std::uint32_t>(at_classes);
    escapes = static_cast<std::uint32_t>(at_escapes);
    return (at_escapes + escape_count() + 3) / 4 * 4 == length;
  }

  // Class of a component: table in bits 0-3, flip in bit 4, top in bits 5-12.
  KVS_DEVICE std::uint32_t read_class(std::uint32_t component) const {
    const std::uint32_t bits = kClassBits + top_bits();
    const std::uint64_t bit = std::uint64_t{component} * bits;
    const std::uint32_t shift = bit % 8;
    const std::uint8_t* from = stream + classes + bit / 8;
    std::uint32_t window = 0;
    for (std::uint32_t i = 0; 8 * i < shift + bits; ++i)
      window |= std::uint32_t{load_constant(from + i)} << 8 * i;
    const std::uint32_t field = window >> shift & ((1u << bits) - 1);
    const std::uint32_t top = (top_min() + (field >> kClassBits)) & 255;
    return (field & ((1u << kClassBits) - 1)) | top << kClassBits;
  }
};

// The escape bytes, taken in rows' order, then the lanes'.
class EscapeBytes {
 public:
  KVS_DEVICE explicit EscapeBytes(const CodedParts& parts) : parts_(parts) {}

  // `value` with its exponent, where the lane `escapes`. All lanes.
  KVS_DEVICE std::uint32_t take(std::uint32_t value, bool escapes) {
    const std::uint32_t escaped = simt::ballot(escapes);
    const std::uint32_t at = next_ + simt::count_bits(escaped & simt::lanes_before());
    next_ += simt::count_bits(escaped);
    if (!escapes || at >= parts_.escape_count()) return value;
    return replace_exponent(value, load_constant(parts_.stream + (parts_.escapes + at)));
  }

  KVS_DEVICE bool overdrawn() const { return next_ > parts_.escape_count(); }
  KVS_DEVICE bool empty() const { return next_ == parts_.escape_count(); }

 private:
  const CodedParts& parts_;
  std::uint32_t next_ = 0;
};

}  // namespace kvs
