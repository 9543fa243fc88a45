// The coding order of a stream's components (docs/format-scalable.md), found by a warp.
#pragma once

#include "scalable_places.h"
#include "simt.h"

namespace kvs {

// A component of the coding order: its number, which is below 2^16, and its class.
KVS_DEVICE std::uint32_t pack_component(std::uint32_t number, std::uint32_t k) { return number | k << 16; }
KVS_DEVICE std::uint32_t number_of(std::uint32_t component) { return component & 0xFFFF; }
KVS_DEVICE std::uint32_t class_of(std::uint32_t component) { return component >> 16; }

// Classes were checked where they were parsed; what is read here can do no harm in any case.
KVS_DEVICE std::uint32_t find_class(const std::uint8_t* classes, std::uint32_t number) {
  return classes[number] < kClasses ? classes[number] : kClasses - 1;
}

// Components by class, largest first, those of one class by their number: a counting sort by one warp.
KVS_DEVICE void sort_components(const KvsScalableJob& job, const std::uint8_t* classes,
                                std::uint32_t* counters, std::uint32_t* order) {
  const std::uint32_t lane = simt::lane(), last_first = job.first[job.object_levels - 1];
  simt::sync_warp();
  for (std::uint32_t k = lane; k < kClasses; k += simt::kWarp) counters[k] = 0;
  simt::sync_warp();
  for (std::uint32_t i = lane; i < job.components; i += simt::kWarp)
    simt::atomic_add(&counters[find_class(classes, i)], 1);
  simt::sync_warp();
  if (lane == 0) {
    std::uint32_t begin = 0;
    for (std::uint32_t k = kClasses; k-- > 0;) {
      const std::uint32_t number = counters[k];
      counters[k] = begin;
      begin += number;
    }
  }
  simt::sync_warp();
  for (std::uint32_t begin = 0; begin < job.components; begin += simt::kWarp) {
    const bool there = begin + lane < job.components;
    const std::uint32_t k = there ? find_class(classes, begin + lane) : kClasses;
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
    if (there && k >= last_first && place < job.coded[job.object_levels - 1])
      order[place] = pack_component(begin + lane, k);
  }
  simt::sync_warp();
}

}  // namespace kvs
