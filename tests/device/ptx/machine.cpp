#include "machine.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace ptx {

namespace {

constexpr std::size_t kAlign = 64;

std::string lanes_text(Mask lanes) {
  char text[16];
  std::snprintf(text, sizeof text, "%08x", lanes);
  return text;
}

std::uint8_t* align(std::uint8_t* begin) {
  return reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(begin) + kAlign - 1) / kAlign *
                                         kAlign);
}

}  // namespace

Warp::Warp(Block& block, std::uint32_t number)
    : block_(&block),
      number_(number),
      storage_(new std::uint8_t[block.launch().entry->register_bytes + kAlign]),
      defined_(block.launch().entry->register_count, 0),
      local_bytes_(block.launch().entry->text->local_bytes) {
  const Entry& entry = *block.launch().entry;
  registers_ = align(storage_.get());
  std::memset(registers_, 0xA5, entry.register_bytes);
  local_.assign(std::size_t{local_bytes_} * kWarp, 0xA5);
  for (auto& batches : late_) batches.emplace_back();
  for (const Constant& constant : entry.constants) {
    defined_[constant.operand.index] = kAll;
    if (constant.operand.bytes == 0) {
      predicate(constant.operand) = constant.bits ? kAll : 0;
      continue;
    }
    for (std::uint32_t lane = 0; lane < kWarp; ++lane) set(constant.operand, lane, constant.bits);
  }
}

std::uint64_t Warp::get(const Operand& operand, std::uint32_t lane) {
  switch (operand.bytes) {
    case 0:
      return predicate(operand) >> lane & 1;
    case 1:
      return lanes<std::uint8_t>(operand)[lane];
    case 2:
      return lanes<std::uint16_t>(operand)[lane];
    case 4:
      return lanes<std::uint32_t>(operand)[lane];
    default:
      return lanes<std::uint64_t>(operand)[lane];
  }
}

void Warp::set(const Operand& operand, std::uint32_t lane, std::uint64_t value) {
  switch (operand.bytes) {
    case 0:
      predicate(operand) = (predicate(operand) & ~(1u << lane)) | (value & 1) << lane;
      break;
    case 1:
      lanes<std::uint8_t>(operand)[lane] = static_cast<std::uint8_t>(value);
      break;
    case 2:
      lanes<std::uint16_t>(operand)[lane] = static_cast<std::uint16_t>(value);
      break;
    case 4:
      lanes<std::uint32_t>(operand)[lane] = static_cast<std::uint32_t>(value);
      break;
    default:
      lanes<std::uint64_t>(operand)[lane] = value;
      break;
  }
}

void Warp::stop(const std::string& what, std::uint32_t lane) const {
  const EntryText& text = *block_->launch().entry->text;
  std::string where =
      text.functor + ", block " + std::to_string(block_->number()) + ", warp " + std::to_string(number_);
  if (lane != kNowhere) where += ", lane " + std::to_string(lane);
  if (at_) {
    const Statement& statement =
        text.statements[static_cast<std::size_t>(at_ - block_->launch().entry->code.data())];
    where += ", PTX line " + std::to_string(statement.line) + " (" + statement.text + "), of source line " +
             std::to_string(statement.place.line) + " of file " + std::to_string(statement.place.file);
  }
  throw Fault(where + ": " + what);
}

void Warp::stop_apart() {
  std::string what = "lanes wait for each other at different places for ever:";
  for (std::uint32_t lane = 0; lane < kWarp; ++lane)
    if (waiting_ >> lane & 1) {
      Mask same = 0;
      for (std::uint32_t i = 0; i < kWarp; ++i)
        if (waiting_ >> i & 1 && next_[i] == next_[lane]) same |= 1u << i;
      if (std::countr_zero(same) == static_cast<int>(lane)) {
        const Statement& statement = block_->launch().entry->text->statements[next_[lane]];
        what += " " + lanes_text(same) + " at PTX line " + std::to_string(statement.line) + " (" +
                statement.text + ")";
      }
    }
  if (ended_) what += " " + lanes_text(ended_) + " have ended";
  at_ = nullptr;
  stop(what);
}

// Lanes that are ready and at the same statement; the others' turn comes later.
Mask Warp::choose(std::uint32_t& statement) {
  statement = kNowhere;
  if (block_->random()) {
    std::uint32_t nth = block_->draw(static_cast<std::uint32_t>(std::popcount(ready_)));
    Mask left = ready_;
    while (nth--) left &= left - 1;
    const Mask one = left & -left;
    statement = next_[std::countr_zero(one)];
    const Mask some = block_->draw(2) ? kAll : one | (block_->draw(1u << 16) << 16 | block_->draw(1u << 16));
    Mask lanes = 0;
    for (std::uint32_t lane = 0; lane < kWarp; ++lane)
      if (ready_ & some & 1u << lane && next_[lane] == statement) lanes |= 1u << lane;
    return lanes;
  }
  Mask lanes = 0;
  for (std::uint32_t lane = 0; lane < kWarp; ++lane) {
    if (!(ready_ >> lane & 1) || next_[lane] > statement) continue;
    if (next_[lane] < statement) lanes = 0;
    statement = next_[lane];
    lanes |= 1u << lane;
  }
  return lanes;
}

void Warp::leave(Mask lanes, std::uint32_t statement) {
  for (; lanes; lanes &= lanes - 1) next_[std::countr_zero(lanes)] = statement;
}

void Warp::run() {
  int meetings = block_->random() ? 1 + static_cast<int>(block_->draw(8)) : -1;
  while (ready_ && meetings-- != 0) {
    std::uint32_t statement;
    const Mask lanes = choose(statement);
    ready_ &= ~lanes;
    run_together(lanes, statement);
  }
  if (ready_ || ended()) return;
  if (!at_barrier_ && waiting_) stop_apart();
}

void Warp::execute(const Instruction& instruction, Mask lanes) {
  at_ = &instruction;
  ++instruction.executed;
  if (instruction.way == Way::kCopy) {
    instruction.run(*this, instruction, lanes);
    return;
  }
  for (std::uint32_t i = instruction.written; i < instruction.operands; ++i)
    if (const Mask missing = lanes & ~defined(instruction.operand[i]))
      stop("operand " + std::to_string(i + 1) + " was never written",
           static_cast<std::uint32_t>(std::countr_zero(missing)));
  instruction.run(*this, instruction, lanes);
  for (std::uint32_t i = 0; i < instruction.written; ++i) defined(instruction.operand[i]) |= lanes;
}

// `lanes` go on together until a branch parts them, they meet or end, or they come to where others are (or,
// lowest first, past it).
void Warp::run_together(Mask lanes, std::uint32_t statement) {
  const std::vector<Instruction>& code = block_->launch().entry->code;
  std::uint32_t limit = kNowhere;
  const auto find_limit = [&] {
    limit = kNowhere;
    if (block_->random()) return;
    for (Mask left = ready_; left; left &= left - 1) limit = std::min(limit, next_[std::countr_zero(left)]);
  };
  find_limit();
  for (;;) {
    if (statement >= limit) {
      leave(lanes, statement);
      ready_ |= lanes;
      return;
    }
    const Instruction& instruction = code[statement];
    if (block_->statements_left-- == 0) stop("it does not end");
    Mask taken = lanes;
    if (instruction.guarded) {
      at_ = &instruction;
      if (const Mask missing = lanes & ~defined(instruction.guard))
        stop("its predicate was never written", static_cast<std::uint32_t>(std::countr_zero(missing)));
      taken &= instruction.guard_negated ? ~predicate(instruction.guard) : predicate(instruction.guard);
    }
    switch (instruction.way) {
      case Way::kPlain:
      case Way::kCopy:
        if (taken) execute(instruction, taken);
        ++statement;
        continue;
      case Way::kBranch:
        at_ = &instruction;
        ++instruction.executed;
        if (taken == lanes) {
          statement = instruction.target;
        } else if (taken == 0) {
          ++statement;
        } else {
          leave(taken, instruction.target);
          leave(lanes & ~taken, statement + 1);
          ready_ |= lanes;
          return;
        }
        continue;
      default:
        break;
    }
    if (taken != lanes) {
      leave(lanes & ~taken, statement + 1);
      ready_ |= lanes & ~taken;
      if (taken == 0) return;
    }
    if (instruction.way == Way::kReturn) {
      ++instruction.executed;
      ended_ |= taken;
      return;
    }
    if (!meet(instruction, taken, statement) || taken != lanes || block_->random()) return;
    if (ready_ != taken) return;
    ready_ = 0;  // all of them have met, and nobody else is ready: they go on
    limit = kNowhere;
    ++statement;
  }
}

// Whether those for whom `lanes` were waited for are all here now; they are ready for what follows then.
bool Warp::meet(const Instruction& instruction, Mask lanes, std::uint32_t statement) {
  at_ = &instruction;
  leave(lanes, statement);
  waiting_ |= lanes;
  Mask here = 0;
  for (Mask left = waiting_; left; left &= left - 1)
    if (next_[std::countr_zero(left)] == statement) here |= left & -left;
  if (instruction.way == Way::kMeetBlock) {
    if (here != kAll) return false;
    ++instruction.executed;
    at_barrier_ = true;
    return false;
  }
  const auto first = static_cast<std::uint32_t>(std::countr_zero(lanes));
  const Operand& member = instruction.operand[instruction.member];
  const auto named = static_cast<Mask>(get(member, first));
  for (Mask left = lanes; left; left &= left - 1) {
    const auto lane = static_cast<std::uint32_t>(std::countr_zero(left));
    if (!(defined(member) >> lane & 1) || static_cast<Mask>(get(member, lane)) != named ||
        !(named >> lane & 1))
      stop("lanes that meet name others, or not themselves", lane);
  }
  if (ended_ & named)
    stop("lanes " + lanes_text(ended_ & named) + " have ended, and others wait for them", first);
  if ((here & named) != named) return false;
  execute(instruction, named);
  leave(named, statement + 1);
  waiting_ &= ~named;
  ready_ |= named;
  return true;
}

void Warp::pass_barrier() {
  leave(kAll, next_[0] + 1);
  waiting_ = 0;
  ready_ = kAll;
  at_barrier_ = false;
}

Block::Block(const Launch& launch, const Memory& memory, std::mt19937& random)
    : statements_left(launch.most),
      launch_(&launch),
      memory_(&memory),
      random_(&random),
      shared_(launch.shared_bytes + 2 * kAlign, 0xA5) {
  skew_ = static_cast<std::size_t>(align(shared_.data()) - shared_.data());
}

void Block::run(std::uint32_t number) {
  number_ = number;
  std::fill(shared_.begin(), shared_.end(), std::uint8_t{0xA5});
  in_flight.assign(launch_->shared_bytes, 0);
  copies_in_flight = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  for (std::uint32_t i = 0; i < launch_->threads / kWarp; ++i)
    warps.push_back(std::make_unique<Warp>(*this, i));
  for (;;) {
    std::vector<Warp*> going;
    for (const auto& warp : warps)
      if (!warp->ended() && !warp->at_barrier()) going.push_back(warp.get());
    if (going.empty()) {
      const auto at_barrier = [](const auto& warp) { return warp->at_barrier(); };
      if (std::none_of(warps.begin(), warps.end(), at_barrier)) return;
      for (const auto& warp : warps)
        if (!warp->at_barrier()) warp->stop("it ended, and others wait for it at a barrier of the block");
      for (const auto& warp : warps) warp->pass_barrier();
      continue;
    }
    going[random() ? draw(static_cast<std::uint32_t>(going.size())) : 0]->run();
  }
}

void run_launch(const Launch& launch, const Memory& memory, std::mt19937& random) {
  Block block(launch, memory, random);
  std::vector<std::uint32_t> numbers(launch.blocks);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (launch.order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), random);
  for (const std::uint32_t number : numbers) block.run(number);
}

}  // namespace ptx
