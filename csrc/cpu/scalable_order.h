// Which components are coded, and in which order: by class, largest first, those of one class by their
// number.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "../scalable.h"

namespace kvs {

class CodingOrder {
 public:
  // `classes` are all below kClasses.
  CodingOrder(const ScalableTables& tables, std::span<const std::uint8_t> classes, unsigned object_levels);

  std::span<const std::uint32_t> components() const { return components_; }
  std::uint64_t coded(unsigned level) const { return coded_[level]; }
  std::uint64_t blocks(unsigned level) const { return (coded_[level] + kLanes - 1) / kLanes; }
  std::uint32_t lanes(unsigned level, std::uint64_t block) const {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(kLanes, coded_[level] - block * kLanes));
  }
  std::uint32_t states() const {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(kLanes, components_.size()));
  }

 private:
  std::vector<std::uint32_t> components_;
  std::uint64_t coded_[kLevels] = {};  // M of each level of the object
};

// False where a class is not one.
inline bool classes_are_sound(std::span<const std::uint8_t> classes) {
  return std::all_of(classes.begin(), classes.end(), [](std::uint8_t k) { return k < kClasses; });
}

template <typename Number>
Number load_number(const std::uint8_t* from) {
  Number number;
  std::memcpy(&number, from, sizeof number);
  return number;
}

template <typename Number>
void store_number(std::uint8_t* to, Number number) {
  std::memcpy(to, &number, sizeof number);
}

}  // namespace kvs
