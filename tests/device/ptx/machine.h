// A block of threads that executes an entry. Lanes of a warp have program counters of their own; those that
// are at the same statement take it together, until a branch parts them. What is `.sync` waits for all lanes
// that it names: a warp whose lanes wait for each other at different places is a fault, as is one that has
// ended in part.
//
// Between such meetings lanes may run in any order, and which one is a choice (Order): the plainest is lowest
// statement first, which brings lanes that parted together again where nvcc's code does. The others are for
// finding kernels that rely on it.
#pragma once

#include <cstring>
#include <memory>
#include <random>

#include "program.h"

namespace ptx {

enum class Order : std::uint32_t {
  kLowest,  // lanes at the lowest statement first, warps and blocks by their numbers
  kRandom,  // any lanes, warps and blocks first; what is taken together is taken apart at random
};

struct Region {
  std::uint64_t begin, end;
  bool writable;
};

// What kernels can reach beside their block's memory.
struct Memory {
  std::vector<Region> regions;  // by begin, no two overlap
  bool anything = false;        // other memory of this process too
};

// A copy into shared memory that has not arrived; null: zeros.
struct LateCopy {
  std::uint32_t to, bytes;
  std::array<std::uint8_t, 16> data;
};

struct Launch {
  const Entry* entry;
  const std::uint8_t* parameter;
  std::uint32_t blocks, threads, shared_bytes;
  Order order;
  std::uint64_t most;  // statements of a warp, then it does not end
};

class Block;

class Warp {
 public:
  Warp(Block& block, std::uint32_t number);

  // Runs until all lanes have ended or wait for the block, or, in random order, for a while.
  void run();
  void pass_barrier();

  bool ended() const { return ended_ == kAll; }
  bool at_barrier() const { return at_barrier_; }
  std::uint32_t number() const { return number_; }
  Block& block() const { return *block_; }
  std::uint32_t thread(std::uint32_t lane) const { return number_ * kWarp + lane; }
  const Instruction& at() const { return *at_; }
  [[noreturn]] void stop(const std::string& what, std::uint32_t lane = kNowhere) const;

  template <typename Value>
  Value* lanes(const Operand& operand) {
    return reinterpret_cast<Value*>(registers_ + operand.at);
  }
  Mask& predicate(const Operand& operand) { return *lanes<Mask>(operand); }
  Mask& defined(const Operand& operand) { return defined_[operand.index]; }
  std::uint64_t get(const Operand& operand, std::uint32_t lane);
  void set(const Operand& operand, std::uint32_t lane, std::uint64_t value);

  std::uint8_t* local(std::uint32_t lane) { return local_.data() + std::size_t{lane} * local_bytes_; }
  std::vector<std::vector<LateCopy>>& late(std::uint32_t lane) { return late_[lane]; }

 private:
  Block* block_;
  std::uint32_t number_;
  const Instruction* at_ = nullptr;
  std::unique_ptr<std::uint8_t[]> storage_;
  std::uint8_t* registers_;  // in `storage_`, aligned
  std::vector<Mask> defined_;
  std::vector<std::uint8_t> local_;
  std::uint32_t local_bytes_;
  std::array<std::vector<std::vector<LateCopy>>, kWarp> late_;
  std::array<std::uint32_t, kWarp> next_{};  // statement of each lane that does not run now
  Mask ready_ = kAll, waiting_ = 0, ended_ = 0;
  bool at_barrier_ = false;

  Mask choose(std::uint32_t& statement);
  void run_together(Mask lanes, std::uint32_t statement);
  void leave(Mask lanes, std::uint32_t statement);
  bool meet(const Instruction& instruction, Mask lanes, std::uint32_t statement);
  void execute(const Instruction& instruction, Mask lanes);
  [[noreturn]] void stop_apart();
};

class Block {
 public:
  Block(const Launch& launch, const Memory& memory, std::mt19937& random);

  void run(std::uint32_t number);

  const Launch& launch() const { return *launch_; }
  const Memory& memory() const { return *memory_; }
  std::uint32_t number() const { return number_; }
  std::uint32_t draw(std::uint32_t below) { return random_->operator()() % below; }
  bool random() const { return launch_->order == Order::kRandom; }
  std::uint8_t* shared() { return shared_.data() + skew_; }

  // Bytes that a copy is on its way to are nobody's until it has arrived.
  std::vector<std::uint8_t> in_flight;
  std::uint32_t copies_in_flight = 0;
  std::uint64_t statements_left;

 private:
  const Launch* launch_;
  const Memory* memory_;
  std::mt19937* random_;
  std::uint32_t number_ = 0;
  std::vector<std::uint8_t> shared_;
  std::size_t skew_;
};

// Runs all blocks of a launch, one after the other. Throws Fault.
void run_launch(const Launch& launch, const Memory& memory, std::mt19937& random);

}  // namespace ptx
