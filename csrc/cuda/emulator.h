// Runs a kernel on the host: each thread of a block is a fibre, and a collective is where fibres wait for
// each other. Slow, exact, and strict: lanes that meet at different collectives, or leave while others wait,
// stop the program, as does an access behind a block's shared memory.
//
// Between two collectives one lane runs after the other, in an order that may be chosen: nothing may depend
// on it. What depends on more than that, the ordering of memory, is for the detector (emulator_races.h).
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
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "emulator_races.h"

namespace kvs::emulator {

inline constexpr std::uint32_t kWarp = 32;
inline constexpr std::size_t kStack = 128 * 1024;

enum class Meeting : std::uint32_t { kNone, kBallot, kShuffle, kShuffleXor, kSyncWarp, kMatrix, kSyncBlock };

struct Fibre {
  ucontext_t beginning;
  jmp_buf place;  // where it waits, once it has begun
  bool begun = false;
  std::uint32_t thread = 0;
  Meeting waits_at = Meeting::kNone;
  bool ended = false;
  std::unique_ptr<std::uint8_t[]> stack;
  races::Moment moment;
};

// In which order lanes, warps and blocks take their turns: 0 from the first to the last, 1 from the last to
// the first, others at random, from this seed on.
inline std::atomic<std::uint32_t> order_seed = 0;

class Order {
 public:
  explicit Order(std::uint32_t seed) : seed_(seed), state_(seed) {}

  // [begin, begin + count), in the order of their turns.
  void draw(std::uint32_t begin, std::uint32_t count, std::vector<std::uint32_t>& to) {
    to.resize(count);
    std::iota(to.begin(), to.end(), begin);
    if (seed_ == 1) std::reverse(to.begin(), to.end());
    for (std::uint32_t left = count; seed_ > 1 && left > 1; --left)
      std::swap(to[left - 1], to[next() % left]);
  }

 private:
  // Marsaglia's xorshift; `state_` is not 0 where it is asked.
  std::uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    return state_ ^= state_ << 5;
  }

  std::uint32_t seed_, state_;
};

struct Block {
  std::uint32_t number, blocks, threads;
  std::uint8_t* shared;
  Order* order;
  std::vector<Fibre> fibres;
  std::vector<std::uint32_t> given;         // of each thread, at the meeting that it waits at
  std::vector<std::uint32_t> warps, lanes;  // in the order of their turns
  jmp_buf scheduler;
  Fibre* running = nullptr;
  const std::function<void()>* body = nullptr;
};

inline thread_local Block* block_of_thread = nullptr;

inline Block& current_block() { return *block_of_thread; }
inline Fibre& current() { return *current_block().running; }

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "kernel emulator: block %u, thread %u: %s\n", current_block().number,
               current_block().running ? current().thread : 0, why);
  std::abort();
}

// Jumps, since swapcontext asks the system for the signals that are blocked, each time.
[[gnu::noinline]] inline void resume(Block& block, Fibre& fibre) {
  block.running = &fibre;
  if (_setjmp(block.scheduler) != 0) return;
  if (fibre.begun) _longjmp(fibre.place, 1);
  fibre.begun = true;
  setcontext(&fibre.beginning);
}

[[gnu::noinline]] inline void leave(Block& block, Fibre& fibre) {
  if (_setjmp(fibre.place) == 0) _longjmp(block.scheduler, 1);
}

// Within races::Pause.
inline void wait_at(Meeting meeting) {
  Fibre& fibre = current();
  fibre.waits_at = meeting;
  leave(current_block(), fibre);
}

// All lanes of the warp give a value; each gets what `take` makes of the 32 (and of its own lane).
template <typename Take>
std::uint32_t meet_warp(Meeting meeting, std::uint32_t value, Take take) {
  const std::uint32_t thread = current().thread;
  std::uint32_t* given = &current_block().given[thread / kWarp * kWarp];
  {
    const races::Pause pause;
    given[thread % kWarp] = value;
    wait_at(meeting);
    if (meeting == Meeting::kSyncWarp || races::votes_order_memory()) ++current().moment.of_warp;
  }
  const std::uint32_t found = take(given, thread % kWarp);
  const races::Pause pause;
  wait_at(Meeting::kSyncWarp);  // nobody gives the next value before all have taken this one
  return found;
}

inline void meet_block() {
  const races::Pause pause;
  wait_at(Meeting::kSyncBlock);
  ++current().moment.of_block;
}

inline void enter() {
  races::watch(&current().moment);
  (*current_block().body)();
  races::watch(nullptr);
  current().ended = true;
  for (;;) wait_at(Meeting::kNone);
}

// Whether all of the fibres [begin, end) wait at the same meeting; stops where they never will.
inline bool have_met(const Block& block, std::uint32_t begin, std::uint32_t end, bool warp) {
  const Fibre& first = block.fibres[begin];
  bool all = true;
  for (std::uint32_t i = begin; i < end; ++i) {
    const Fibre& fibre = block.fibres[i];
    if (fibre.waits_at == Meeting::kSyncBlock && warp && first.waits_at == Meeting::kSyncBlock) continue;
    if (fibre.ended != first.ended || fibre.waits_at != first.waits_at) all = false;
  }
  return all;
}

inline void start_fibre(Block& block, std::uint32_t thread) {
  Fibre& fibre = block.fibres[thread];
  fibre.thread = thread;
  fibre.begun = fibre.ended = false;
  fibre.waits_at = Meeting::kNone;
  if (!fibre.stack) fibre.stack.reset(new std::uint8_t[kStack]);
  fibre.moment = {block.number, thread, 0, 0, fibre.stack.get(), fibre.stack.get() + kStack};
  getcontext(&fibre.beginning);
  fibre.beginning.uc_stack.ss_sp = fibre.stack.get();
  fibre.beginning.uc_stack.ss_size = kStack;
  fibre.beginning.uc_link = nullptr;
  makecontext(&fibre.beginning, enter, 0);
}

// Lets each lane of a warp run until it waits.
inline void run_warp(Block& block, std::uint32_t warp) {
  block.order->draw(warp * kWarp, kWarp, block.lanes);
  for (const std::uint32_t thread : block.lanes) resume(block, block.fibres[thread]);
}

// Lets each warp run that waits for none but its own lanes. False where there is none.
inline bool run_ready_warps(Block& block) {
  bool moved = false;
  block.order->draw(0, block.threads / kWarp, block.warps);
  for (const std::uint32_t warp : block.warps) {
    Fibre& first = block.fibres[warp * kWarp];
    if (!have_met(block, warp * kWarp, (warp + 1) * kWarp, true)) {
      block.running = &first;
      stop("lanes of one warp are at different collectives");
    }
    if (first.ended || first.waits_at == Meeting::kSyncBlock) continue;
    run_warp(block, warp);
    moved = true;
  }
  return moved;
}

inline void run_block(Block& block, const std::function<void()>& body) {
  block_of_thread = &block;
  block.body = &body;
  block.given.assign(block.threads, 0);
  if (block.fibres.size() != block.threads) block.fibres = std::vector<Fibre>(block.threads);
  for (std::uint32_t i = 0; i < block.threads; ++i) start_fibre(block, i);
  do {
    block.order->draw(0, block.threads / kWarp, block.warps);
    for (const std::uint32_t warp : block.warps) run_warp(block, warp);
    while (run_ready_warps(block)) {
    }
    if (!have_met(block, 0, block.threads, false)) {
      block.running = &block.fibres[0];
      stop("threads ended while others wait for them at sync_block");
    }
  } while (!block.fibres[0].ended);
  block_of_thread = nullptr;
}

// A block's shared memory: what lies behind it cannot be touched.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : bytes_((bytes + 15) / 16 * 16) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = (bytes_ + page - 1) / page * page;
    mapped_ = used + page;
    void* found = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED || mprotect(static_cast<std::uint8_t*>(found) + used, page, PROT_NONE) != 0) {
      std::fprintf(stderr, "kernel emulator: no memory for %zu shared bytes\n", bytes);
      std::abort();
    }
    map_ = static_cast<std::uint8_t*>(found);
    begin_ = map_ + used - bytes_;
  }
  ~SharedMemory() { munmap(map_, mapped_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // As a new block finds it: nothing may be expected of it.
  std::uint8_t* renew() const {
    std::fill_n(begin_, bytes_, std::uint8_t{0xA5});
    races::forget(begin_, bytes_);
    return begin_;
  }

 private:
  std::size_t bytes_, mapped_;
  std::uint8_t *map_, *begin_;
};

// Runs `kernel` in `blocks` blocks of `threads` threads, one block after the other.
template <typename Kernel>
void launch(const Kernel& kernel, std::uint32_t blocks, std::uint32_t threads, std::size_t shared_bytes) {
  if (threads == 0 || threads % kWarp != 0) {
    std::fprintf(stderr, "kernel emulator: %u threads are no whole warps\n", threads);
    std::abort();
  }
  races::begin_launch();
  const SharedMemory shared(shared_bytes);
  Order order(order_seed);
  Block state{};
  state.blocks = blocks;
  state.threads = threads;
  state.order = &order;
  const std::function<void()> body = [&kernel] { kernel(); };
  std::vector<std::uint32_t> numbers;
  order.draw(0, blocks, numbers);
  for (const std::uint32_t number : numbers) {
    state.number = number;
    state.shared = shared.renew();
    run_block(state, body);
  }
}

}  // namespace kvs::emulator
