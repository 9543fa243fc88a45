#include "scalable_order.h"

namespace kvs {

CodingOrder::CodingOrder(const ScalableTables& tables, std::span<const std::uint8_t> classes,
                         unsigned object_levels) {
  std::uint64_t counts[kClasses] = {};
  for (const std::uint8_t k : classes) ++counts[k];
  std::uint64_t begin[kClasses] = {};
  std::uint64_t total = 0;
  for (std::uint32_t k = kClasses; k-- > tables.first(object_levels - 1);) {
    begin[k] = total;
    total += counts[k];
    for (unsigned level = 0; level < object_levels; ++level) {
      if (k >= tables.first(level)) coded_[level] = total;
    }
  }
  components_.resize(total);
  for (std::uint32_t component = 0; component < classes.size(); ++component) {
    const std::uint8_t k = classes[component];
    if (k >= tables.first(object_levels - 1)) components_[begin[k]++] = component;
  }
}

}  // namespace kvs
