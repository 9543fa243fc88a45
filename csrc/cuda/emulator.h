// Runs a kernel on the host: each thread of a block is a fibre, and a collective is where fibres wait for
// each other. Slow, exact, and strict: lanes that meet at different collectives, or leave while others wait,
// stop the program.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

namespace kvs::emulator {

inline constexpr std::uint32_t kWarp = 32;
inline constexpr std::size_t kStack = 128 * 1024;

enum class Meeting : std::uint32_t { kNone, kBallot, kShuffle, kShuffleXor, kSyncWarp, kMatrix, kSyncBlock };

struct Fibre {
  ucontext_t context;
  std::uint32_t thread = 0;
  Meeting waits_at = Meeting::kNone;
  bool ended = false;
  std::unique_ptr<std::uint8_t[]> stack;
};

struct Block {
  std::uint32_t number, blocks, threads;
  std::uint8_t* shared;
  std::vector<Fibre> fibres;
  std::vector<std::uint32_t> given;  // of each thread, at the meeting that it waits at
  ucontext_t scheduler;
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

inline void wait_at(Meeting meeting) {
  Block& block = current_block();
  Fibre& fibre = current();
  fibre.waits_at = meeting;
  swapcontext(&fibre.context, &block.scheduler);
  block.running = &fibre;
}

// All lanes of the warp give a value; each gets what `take` makes of the 32 (and of its own lane).
template <typename Take>
std::uint32_t meet_warp(Meeting meeting, std::uint32_t value, Take take) {
  Block& block = current_block();
  const std::uint32_t thread = current().thread;
  block.given[thread] = value;
  wait_at(meeting);
  const std::uint32_t found = take(&block.given[thread / kWarp * kWarp], thread % kWarp);
  wait_at(Meeting::kSyncWarp);  // nobody gives the next value before all have taken this one
  return found;
}

inline void meet_block() { wait_at(Meeting::kSyncBlock); }

inline void enter() {
  (*current_block().body)();
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

inline void run_block(Block& block, const std::function<void()>& body) {
  block_of_thread = &block;
  block.body = &body;
  block.given.assign(block.threads, 0);
  if (block.fibres.size() != block.threads) block.fibres = std::vector<Fibre>(block.threads);
  for (std::uint32_t i = 0; i < block.threads; ++i) {
    Fibre& fibre = block.fibres[i];
    fibre.thread = i;
    fibre.ended = false;
    fibre.waits_at = Meeting::kNone;
    if (!fibre.stack) fibre.stack.reset(new std::uint8_t[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
  }
  const auto resume = [&block](std::uint32_t i) {
    block.running = &block.fibres[i];
    swapcontext(&block.scheduler, &block.running->context);
  };
  for (std::uint32_t i = 0; i < block.threads; ++i) resume(i);
  for (;;) {
    bool moved = false;
    for (std::uint32_t begin = 0; begin < block.threads; begin += kWarp) {
      Fibre& first = block.fibres[begin];
      if (!have_met(block, begin, begin + kWarp, true)) {
        block.running = &first;
        stop("lanes of one warp are at different collectives");
      }
      if (first.ended || first.waits_at == Meeting::kSyncBlock) continue;
      for (std::uint32_t i = begin; i < begin + kWarp; ++i) resume(i);
      moved = true;
    }
    if (moved) continue;
    if (!have_met(block, 0, block.threads, false)) {
      block.running = &block.fibres[0];
      stop("threads ended while others wait for them at sync_block");
    }
    if (block.fibres[0].ended) break;
    for (std::uint32_t i = 0; i < block.threads; ++i) resume(i);
  }
  block_of_thread = nullptr;
}

// Runs `kernel` in `blocks` blocks of `threads` threads, one block after the other. Shared memory is filled
// with 0xA5 first: nothing may be expected of it.
template <typename Kernel>
void launch(const Kernel& kernel, std::uint32_t blocks, std::uint32_t threads, std::size_t shared_bytes) {
  if (threads == 0 || threads % kWarp != 0) {
    std::fprintf(stderr, "kernel emulator: %u threads are no whole warps\n", threads);
    std::abort();
  }
  std::vector<std::uint64_t> shared((shared_bytes + 7) / 8 + 2);
  auto* aligned = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(shared.data()) + 15) &
                                                  ~std::uintptr_t{15});
  Block state{};
  state.blocks = blocks;
  state.threads = threads;
  state.shared = aligned;
  const std::function<void()> body = [&kernel] { kernel(); };
  for (std::uint32_t number = 0; number < blocks; ++number) {
    state.number = number;
    for (std::size_t i = 0; i < shared_bytes; ++i) aligned[i] = 0xA5;
    run_block(state, body);
  }
}

}  // namespace kvs::emulator
