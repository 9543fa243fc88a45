// The tables of the scalable codec in the forms that decoder and encoder look things up in.
#pragma once

#include <cstdint>
#include <vector>

#include "scalable_steps.h"

namespace kvs {

// A table of level 0 with few symbols: found by comparing a slot with where they begin instead of looking it
// up.
inline constexpr std::uint32_t kMostBounds = 12;

struct BaseBounds {
  std::uint32_t count;  // of bounds before the escape's; kMostBounds + 1: the table has too many
  std::uint32_t first;  // entry of the symbol that begins at 0
  std::uint32_t bounds[kMostBounds + 1];  // slots where the next symbols begin; last, the escape
  std::uint32_t
      entries[kMostBounds + 1];  // these symbols: as in pack_base_entry, but with the first slot itself
};

class ScalableTables {
 public:
  // What a table set says; arrays as in docs/format-scalable.md.
  struct Source {
    const std::uint8_t* first;    // [3]
    const std::uint16_t* base;    // [48][256]
    const std::uint16_t* refine;  // [2][48][4][2]
    const float* shift;           // [3][48]
  };

  // Throws std::invalid_argument for whatever the format forbids in classes that are coded.
  explicit ScalableTables(const Source& source);

  std::uint32_t first(unsigned level) const { return first_[level]; }
  float shift(unsigned level, std::uint32_t k) const { return shift_[level][k]; }

  // Level 0. Tables of all classes lie behind each other; classes that are not coded have none.
  const std::uint32_t* slots() const { return slots_.data(); }
  std::uint32_t slots_of(std::uint32_t k) const { return (k - first_[0]) * kSlots; }
  const BaseBounds& bounds_of(std::uint32_t k) const { return bounds_[k]; }
  const Push* base_pushes() const { return base_pushes_.data(); }
  std::uint32_t base_pushes_of(std::uint32_t k) const { return (k - first_[0]) * kBaseSymbols; }

  // Levels 1 and 2.
  std::uint32_t thresholds(unsigned level, std::uint32_t k, std::uint32_t context) const {
    return thresholds_[level - 1][k][context];
  }
  // The three symbols of a context.
  const Push* ternary_pushes(unsigned level, std::uint32_t k) const {
    return ternary_pushes_[level - 1][k][0];
  }

 private:
  void add_base(const std::uint16_t* frequencies);
  void set_refine(unsigned level, std::uint32_t k, const std::uint16_t* pairs);

  std::uint8_t first_[kLevels];
  float shift_[kLevels][kClasses] = {};
  std::uint32_t thresholds_[2][kClasses][kContexts] = {};
  Push ternary_pushes_[2][kClasses][kContexts][3] = {};
  BaseBounds bounds_[kClasses] = {};
  std::vector<std::uint32_t> slots_;
  std::vector<Push> base_pushes_;
};

}  // namespace kvs
