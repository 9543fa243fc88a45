// Components in their coding order (docs/format-scalable.md), by one warp.
#pragma once

#include "../scalable_steps.h"
#include "simt.h"

namespace kvs {

// Components by class, largest first, those of one class by their number: a counting sort. `class_of(c)` is
// below kClasses; `counters` are as many. put(place, c, k) by some lane for each component; the first lane
// learns by end(k, place), from the largest class on, where the components of a class end.
template <typename ClassOf, typename End, typename Put>
KVS_DEVICE void sort_by_class(std::uint32_t components, std::uint32_t* counters, const ClassOf& class_of,
                              const End& end, const Put& put) {
  const std::uint32_t lane = simt::lane();
  simt::sync_warp();
  for (std::uint32_t k = lane; k < kClasses; k += simt::kWarp) counters[k] = 0;
  simt::sync_warp();
  for (std::uint32_t c = lane; c < components; c += simt::kWarp) simt::atomic_add(&counters[class_of(c)], 1);
  simt::sync_warp();
  if (lane == 0) {
    std::uint32_t begin = 0;
    for (std::uint32_t k = kClasses; k-- > 0;) {
      const std::uint32_t number = counters[k];
      counters[k] = begin;
      begin += number;
      end(k, begin);
    }
  }
  simt::sync_warp();
  for (std::uint32_t begin = 0; begin < components; begin += simt::kWarp) {
    const bool there = begin + lane < components;
    const std::uint32_t k = there ? class_of(begin + lane) : kClasses;
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
    if (there) put(place, begin + lane, k);
  }
  simt::sync_warp();
}

}  // namespace kvs
