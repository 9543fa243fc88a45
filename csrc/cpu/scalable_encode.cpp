// Encoding a stream: components rounded into rows of 32, then the levels from the last to the first, because
// a decoder's states go the other way.

#include <memory>
#include <stdexcept>

#include "scalable_encode_rows.h"
#include "scalable_kernels.h"
#include "scalable_order.h"

namespace kvs {
namespace {

// The largest |q2| of a component that is coded from this level on: beyond it, coarser levels would not be 0.
constexpr float kLimits[kLevels] = {9.0f * kMostBase + 4, 4, 1};

class StreamEncoder {
 public:
  StreamEncoder(const ScalableTables& tables, std::span<const std::uint8_t> classes, std::uint64_t tokens,
                unsigned levels, Implementation how)
      : tables_(tables),
        classes_(classes),
        tokens_(tokens),
        levels_(levels),
        how_(how),
        order_(tables, classes, levels),
        block_numbers_(tokens * kLanes),
        numbers_(new std::int16_t[order_.blocks(levels - 1) * block_numbers_]) {
    std::fill_n(states_.state, kLanes, kStateMin);
  }

  ScalableStream encode(const float* y, std::uint64_t components) {
    quantise(y, components);
    ScalableStream stream;
    stream.words.resize(levels_);
    const auto room = LevelSink::kWideStore + 2 * order_.coded(levels_ - 1) * tokens_;
    const std::unique_ptr<std::uint8_t[]> words(new std::uint8_t[room]);
    std::uint8_t* const end = words.get() + room;
    for (unsigned level = levels_; level-- > 0;) {
      LevelSink to{end, nullptr};
      if (level == 0) {
        encode_base(to, stream.escapes);
      } else {
        encode_refinement(to, level);
      }
      stream.words[level].assign(to.words, end);
    }
    const auto* states = reinterpret_cast<const std::uint8_t*>(states_.state);
    stream.states.assign(states, states + 4 * order_.states());
    return stream;
  }

 private:
  const std::int16_t* block_numbers(std::uint64_t block) const {
    return numbers_.get() + block * block_numbers_;
  }
  std::uint32_t class_of(std::uint64_t block, std::uint32_t lane) const {
    return classes_[order_.components()[block * kLanes + lane]];
  }

  void quantise(const float* y, std::uint64_t components) {
    const ScalableKernels& kernels = scalable_kernels(how_);
    const std::uint64_t count = order_.blocks(levels_ - 1) * kLanes;
    std::vector<std::uint32_t> order(count);  // unused lanes: the first component, cut to 0
    std::vector<float> limit(count);
    const auto coded = order_.components();
    for (std::uint64_t c = 0; c < coded.size(); ++c) {
      order[c] = coded[c];
      const std::uint32_t k = classes_[coded[c]];
      limit[c] = k >= tables_.first(0) ? kLimits[0] : k >= tables_.first(1) ? kLimits[1] : kLimits[2];
    }
    const auto stage = std::make_unique<float[]>(count);
    for (std::uint64_t token = 0; token < tokens_; ++token) {
      kernels.quantise(y + token * components, order.data(), limit.data(), count, stage.get(),
                       numbers_.get() + token * kLanes, block_numbers_);
    }
  }

  void encode_base(LevelSink& to, std::vector<std::uint8_t>& escapes) {
    // As many as there can be: one for each value.
    const std::uint64_t room = 2 * order_.coded(0) * tokens_;
    const std::unique_ptr<std::uint8_t[]> buffer(new std::uint8_t[room]);
    to.escapes = buffer.get() + room;
    BasePushes block{};
    block.pushes = tables_.base_pushes();
    for (std::uint64_t index = order_.blocks(0); index-- > 0;) {
      block.lanes = order_.lanes(0, index);
      block.numbers = block_numbers(index);
      for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
        block.table[lane] = tables_.base_pushes_of(class_of(index, lane));
      }
      PushBase* rows = encode_base_portable;
      if (how_ == Implementation::kAvx512) rows = encode_base_avx512;
      if (how_ == Implementation::kAvx2) rows = encode_base_avx2;
      rows(to, states_, block, tokens_);
    }
    escapes.assign(to.escapes, buffer.get() + room);
  }

  void encode_refinement(LevelSink& to, unsigned level) {
    RefinePushes block{};
    block.level = level;
    for (std::uint64_t index = order_.blocks(level); index-- > 0;) {
      block.lanes = order_.lanes(level, index);
      block.numbers = block_numbers(index);
      for (std::uint32_t lane = 0; lane < block.lanes; ++lane) {
        const std::uint32_t k = class_of(index, lane);
        block.pushes[lane] = tables_.ternary_pushes(level, k);
        for (std::uint32_t context = 0; context < kContexts; ++context) {
          block.thresholds[context][lane] = tables_.thresholds(level, k, context);
        }
      }
      PushRefine* rows = encode_refine_portable;
      if (how_ == Implementation::kAvx512) rows = encode_refine_avx512;
      if (how_ == Implementation::kAvx2) rows = encode_refine_avx2;
      rows(to, states_, block, tokens_);
    }
  }

  const ScalableTables& tables_;
  std::span<const std::uint8_t> classes_;
  std::uint64_t tokens_;
  unsigned levels_;
  Implementation how_;
  CodingOrder order_;
  std::uint64_t block_numbers_;  // of one block, over all tokens
  std::unique_ptr<std::int16_t[]> numbers_;
  PushStates states_;
};

}  // namespace

ScalableStream encode_scalable(const ScalableTables& tables, std::span<const std::uint8_t> classes,
                               const Components<const float>& y, unsigned levels, Implementation how) {
  if (!classes_are_sound(classes)) throw std::invalid_argument("a class is 0 to 47");
  StreamEncoder encoder(tables, classes, y.tokens, levels, how);
  return encoder.encode(y.values, y.count);
}

}  // namespace kvs
