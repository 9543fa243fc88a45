// Decoding a stream: levels one after the other into 16-bit numbers, blocks side by side in rows of 32, and
// from these the components.

#include <memory>

#include "scalable_decode_rows.h"
#include "scalable_kernels.h"
#include "scalable_order.h"

namespace kvs {
namespace {

constexpr float kSteps[kLevels] = {9.0f, 3.0f, 1.0f};

class StreamDecoder {
 public:
  StreamDecoder(const ScalableTables& tables, std::span<const std::uint8_t> classes, std::uint64_t tokens,
                unsigned object_levels, unsigned levels, Implementation how)
      : tables_(tables),
        classes_(classes),
        tokens_(tokens),
        levels_(levels),
        how_(how),
        order_(tables, classes, object_levels),
        block_numbers_(tokens * kLanes),
        numbers_(new std::int16_t[order_.blocks(levels - 1) * block_numbers_]) {
    // What level 0 does not reach has no coarser number: 0.
    const std::uint64_t begin = order_.blocks(0) * block_numbers_;
    std::fill(numbers_.get() + begin, numbers_.get() + order_.blocks(levels - 1) * block_numbers_,
              std::int16_t{0});
  }

  Fault decode(Bytes states, std::span<const Bytes> words, Bytes escapes, bool whole) {
    if (states.size() != 4ull * order_.states()) return Fault::kBadPayload;
    for (std::uint32_t lane = 0; lane < order_.states(); ++lane) {
      states_.state[lane] = load_number<std::uint32_t>(states.data() + 4 * lane);
      if (states_.state[lane] < kStateMin || states_.state[lane] >> 31) return Fault::kBadPayload;
    }
    if (escapes.size() % 2 != 0) return Fault::kBadPayload;
    for (unsigned level = 0; level < levels_; ++level) {
      if (words[level].size() % 2 != 0) return Fault::kBadPayload;
      const Bytes own = level == 0 ? escapes : Bytes{};
      LevelSource from(words[level].data(), words[level].data() + words[level].size(), own.data(),
                       own.data() + own.size());
      const bool done = level == 0 ? decode_base(from) : decode_refinement(from, level);
      if (!done || !from.read_to_the_end()) return Fault::kBadPayload;
    }
    const auto at_start = [](std::uint32_t state) { return state == kStateMin; };
    const bool ended = std::all_of(states_.state, states_.state + order_.states(), at_start);
    return !whole || ended ? Fault::kNone : Fault::kBadPayload;
  }

  void write(const Components<float>& y) const {
    const ScalableKernels& kernels = scalable_kernels(how_);
    const unsigned level = levels_ - 1;
    const std::uint64_t count = order_.blocks(level) * kLanes;
    // One more than there are components: what is not coded is taken from there.
    const auto stage = std::make_unique<float[]>(count + 1);
    std::vector<float> shift(count);
    std::vector<std::uint32_t> place(y.count, static_cast<std::uint32_t>(count));
    for (std::uint64_t c = 0; c < order_.coded(level); ++c) {
      const std::uint32_t component = order_.components()[c];
      shift[c] = tables_.shift(level, classes_[component]);
      place[component] = static_cast<std::uint32_t>(c);
    }
    for (std::uint64_t token = 0; token < tokens_; ++token) {
      kernels.reconstruct(numbers_.get() + token * kLanes, block_numbers_, shift.data(), kSteps[level], count,
                          stage.get());
      kernels.spread(stage.get(), place.data(), y.count, y.values + token * y.count);
    }
  }

 private:
  std::int16_t* block_numbers(std::uint64_t block) { return numbers_.get() + block * block_numbers_; }
  std::uint32_t class_of(std::uint64_t block, std::uint32_t lane) const {
    return classes_[order_.components()[block * kLanes + lane]];
  }

  void set_tables(BaseBlock& block, std::uint64_t index) const {
    block.bound_count = 0;
    for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
      const std::uint32_t k = class_of(index, lane);
      block.table[lane] = tables_.slots_of(k);
      block.bound_count = std::max(block.bound_count, tables_.bounds_of(k).count);
    }
    if (block.bound_count > kMostBounds) return;
    for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
      const BaseBounds& of = tables_.bounds_of(class_of(index, lane));
      block.first[lane] = of.first;
      for (std::uint32_t i = 0; i <= kMostBounds; ++i) {
        const std::uint32_t from = i < of.count ? i : kMostBounds;
        block.bounds[i][lane] = of.bounds[from];
        block.entries[i][lane] = of.entries[from];
      }
    }
  }

  bool decode_base(LevelSource& from) {
    BaseBlock block{};
    block.slots = tables_.slots();
    for (std::uint64_t index = 0; index < order_.blocks(0); ++index) {
      block.lanes = order_.lanes(0, index);
      block.numbers = block_numbers(index);
      set_tables(block, index);
      BaseRows* fast = nullptr;
      if (how_ == Implementation::kAvx512) fast = decode_base_avx512;
      if (how_ == Implementation::kAvx2) fast = decode_base_avx2;
      if (!decode_rows(from, block, fast, decode_base_portable)) return false;
    }
    return true;
  }

  bool decode_refinement(LevelSource& from, unsigned level) {
    RefineBlock block{};
    for (std::uint64_t index = 0; index < order_.blocks(level); ++index) {
      block.lanes = order_.lanes(level, index);
      block.numbers = block_numbers(index);
      for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
        for (std::uint32_t context = 0; context < kContexts; ++context) {
          block.thresholds[context][lane] = tables_.thresholds(level, class_of(index, lane), context);
        }
      }
      RefineRows* fast = nullptr;
      if (how_ == Implementation::kAvx512) fast = decode_refine_avx512;
      if (how_ == Implementation::kAvx2) fast = decode_refine_avx2;
      if (!decode_rows(from, block, fast, decode_refine_portable)) return false;
    }
    return true;
  }

  // All rows of a block: as far as the fast loop comes, then on in the padded end of the words.
  template <typename Block, typename Rows>
  bool decode_rows(LevelSource& from, const Block& block, Rows* fast, Rows* portable) {
    std::uint64_t done = 0;
    if (fast != nullptr) {
      done = fast(from, states_, block, 0, tokens_);
      if (done < tokens_ && !from.failed && !from.padded) {
        from.pad();
        done = fast(from, states_, block, done, tokens_);
      }
      if (from.next > from.end) from.failed = true;
    }
    if (!from.failed && done < tokens_) portable(from, states_, block, done, tokens_);
    return !from.failed;
  }

  const ScalableTables& tables_;
  std::span<const std::uint8_t> classes_;
  std::uint64_t tokens_;
  unsigned levels_;
  Implementation how_;
  CodingOrder order_;
  std::uint64_t block_numbers_;  // of one block, over all tokens
  std::unique_ptr<std::int16_t[]> numbers_;
  LaneStates states_{};
};

}  // namespace

Fault decode_scalable(const ScalableTables& tables, std::span<const std::uint8_t> classes, Bytes states,
                      std::span<const Bytes> words, Bytes escapes, const Components<float>& y,
                      unsigned object_levels, Implementation how) {
  if (!classes_are_sound(classes)) return Fault::kBadPayload;
  const auto levels = static_cast<unsigned>(words.size());
  StreamDecoder decoder(tables, classes, y.tokens, object_levels, levels, how);
  const Fault fault = decoder.decode(states, words, escapes, levels == object_levels);
  if (fault == Fault::kNone) decoder.write(y);
  return fault;
}

}  // namespace kvs
