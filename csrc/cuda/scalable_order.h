// The coding order of a stream's components (docs/format-scalable.md), found by a warp.
#pragma once

#include "class_sort.h"
#include "scalable_places.h"

namespace kvs {

// A component of the coding order: its number, which is below 2^16, and its class.
KVS_DEVICE std::uint32_t pack_component(std::uint32_t number, std::uint32_t k) { return number | k << 16; }
KVS_DEVICE std::uint32_t number_of(std::uint32_t component) { return component & 0xFFFF; }
KVS_DEVICE std::uint32_t class_of(std::uint32_t component) { return component >> 16; }

// Classes were checked where they were parsed; what is read here can do no harm in any case.
KVS_DEVICE std::uint32_t find_class(const std::uint8_t* classes, std::uint32_t number) {
  return classes[number] < kClasses ? classes[number] : kClasses - 1;
}

// The coding order of a stream, by one warp.
KVS_DEVICE void sort_components(const KvsScalableJob& job, const std::uint8_t* classes,
                                std::uint32_t* counters, std::uint32_t* order) {
  const std::uint32_t first = job.first[job.object_levels - 1], coded = job.coded[job.object_levels - 1];
  sort_by_class(
      job.components, counters, [classes](std::uint32_t c) { return find_class(classes, c); },
      [](std::uint32_t, std::uint32_t) {},
      [=](std::uint32_t place, std::uint32_t c, std::uint32_t k) {
        if (k >= first && place < coded) order[place] = pack_component(c, k);
      });
}

}  // namespace kvs
