// What the emulator tells a detector of data races (tests/device/races), and nothing where there is none.
//
// The model is a GPU's, not the emulator's: sync_warp orders what a warp's lanes did before it against what
// they do after it, sync_block likewise for a block, and launches are ordered one after the other. Votes,
// shuffles, loads of matrices and products let lanes wait for each other but order no memory (CUDA C++
// programming guide, warp functions: "do not imply a memory barrier"), and blocks are never ordered.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvs::emulator::races {

// How far a thread is: whatever two threads of a block (a warp) did at different counts of its meetings is
// ordered.
struct Moment {
  std::uint32_t block = 0, thread = 0;
  std::uint32_t of_block = 0, of_warp = 0;              // meetings so far
  const std::uint8_t *stack = nullptr, *end = nullptr;  // the thread's own memory, which is not watched
};

#ifdef KVS_RACES

// Whose accesses are the kernel's: a thread's, or, with null, nobody's, while the emulator works. Answers
// what it was before. One host thread at a time. Never inlined: what the emulator does may not move past it.
const Moment* watch(const Moment* thread);

void begin_launch();
void forget(const void* begin, std::size_t bytes);  // memory that a block gets anew
void access_atomically(const void* at, std::size_t bytes);
// 16 bytes are read, where `from` is not null, and written at some time between `begun` and now.
void copy_since(const Moment& begun, const Moment& now, const void* to, const void* from);
// Whether votes and the like are taken to order memory: what is found only where they are not depends on
// them.
bool votes_order_memory();

// While it lives, accesses are the emulator's own.
class Pause {
 public:
  Pause() : before_(watch(nullptr)) {}
  ~Pause() { watch(before_); }
  Pause(const Pause&) = delete;
  Pause& operator=(const Pause&) = delete;

 private:
  const Moment* before_;
};

#else

struct Pause {
  Pause() {}
};
inline const Moment* watch(const Moment*) { return nullptr; }
inline void begin_launch() {}
inline void forget(const void*, std::size_t) {}
inline void access_atomically(const void*, std::size_t) {}
inline void copy_since(const Moment&, const Moment&, const void*, const void*) {}
inline bool votes_order_memory() { return false; }

#endif

}  // namespace kvs::emulator::races
