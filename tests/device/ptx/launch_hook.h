// Included before each of csrc/cuda's sources when they are compiled for the host with kernels that are PTX:
// what starts a kernel in the emulation (launch.h) then hands its name and its bytes to the interpreter. The
// functor has the same layout there.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

namespace ptx {
void launch(const char* functor, const void* bytes, std::size_t size, std::uint32_t blocks,
            std::uint32_t threads, std::size_t shared_bytes);
}

// The emulator's own launch gets another name, so that this one can have its place.
#define launch launch_on_fibres
#include "emulator.h"
#undef launch

namespace kvs::emulator {

template <typename Kernel>
void launch(const Kernel& kernel, std::uint32_t blocks, std::uint32_t threads, std::size_t shared_bytes) {
  static_assert(std::is_trivially_copyable_v<Kernel>);
  ptx::launch(typeid(Kernel).name(), &kernel, sizeof kernel, blocks, threads, shared_bytes);
}

}  // namespace kvs::emulator
