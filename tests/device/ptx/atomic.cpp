// Atomics, and copies into shared memory that arrive later.
#include "memory.h"
#include "operations.h"

namespace ptx {

namespace {

struct Add {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Exchange {
  template <typename T>
  static T of(T, T b) {
    return b;
  }
};

// One lane after the other, in any order.
template <typename T, typename Operation>
void change(Warp& warp, const Instruction& i, Mask mask) {
  const Operand &base = i.operand[i.written], &value = i.operand[i.written + 1];
  const std::uint32_t begin = warp.block().random() ? warp.block().draw(kWarp) : 0;
  for (std::uint32_t n = 0; n < kWarp; ++n) {
    const std::uint32_t lane = (begin + n) % kWarp;
    if (!(mask >> lane & 1)) continue;
    std::uint64_t address = warp.get(base, lane) + static_cast<std::uint64_t>(i.offset);
    if (base.bytes == 4) address = static_cast<std::uint32_t>(address);
    std::uint8_t* at = find_bytes(warp, i, lane, address, sizeof(T), true);
    T before;
    std::memcpy(&before, at, sizeof(T));
    const T after = Operation::of(before, static_cast<T>(warp.get(value, lane)));
    std::memcpy(at, &after, sizeof(T));
    if (i.written) warp.set(i.operand[0], lane, static_cast<std::uint64_t>(before));
  }
}

template <typename Operation>
Handler of_type(const std::string& type) {
  return pick(Types<std::uint32_t, std::int32_t, std::uint64_t, std::int64_t>{}, type,
              [](auto t) -> Handler { return change<decltype(t), Operation>; });
}

Handler find_change(const std::string& what, const std::string& type) {
  if (what == "add") return of_type<Add>(type);
  if (what == "min") return of_type<Least>(type);
  if (what == "max") return of_type<Most>(type);
  if (what == "and") return of_type<And>(type);
  if (what == "or") return of_type<Or>(type);
  if (what == "exch") return of_type<Exchange>(type);
  return nullptr;
}

// What is copied is read now and lands when it is waited for: in between nobody may look.
void begin_copy(Warp& warp, const Instruction& i, Mask mask) {
  Block& block = warp.block();
  for (; mask; mask &= mask - 1) {
    const auto lane = static_cast<std::uint32_t>(__builtin_ctz(mask));
    const auto to =
        static_cast<std::uint32_t>(warp.get(i.operand[0], lane) + static_cast<std::uint64_t>(i.offset));
    const std::uint64_t from =
        warp.get(i.operand[1], lane) + static_cast<std::uint64_t>(static_cast<std::int32_t>(i.detail));
    const auto bytes = static_cast<std::uint32_t>(warp.get(i.operand[2], lane));
    const auto taken = static_cast<std::uint32_t>(i.operands > 3 ? warp.get(i.operand[3], lane) : bytes);
    if (bytes != 16) warp.stop("only 16 bytes are copied past the cache of the first level", lane);
    if (taken > bytes) warp.stop("more bytes are taken than are copied", lane);
    find_shared(warp, lane, to, bytes);
    LateCopy copy{to, bytes, {}};
    if (from % 16 != 0) warp.stop("it copies from an address that is not a multiple of 16", lane);
    if (taken == 16) std::memcpy(copy.data.data(), find_global(warp, i, lane, from, 16, false), 16);
    if (taken != 0 && taken != 16) warp.stop("a copy of which a part is zeros", lane);
    for (std::uint32_t k = 0; k < bytes; ++k) block.in_flight[to - kSharedBegin + k] = 1;
    ++block.copies_in_flight;
    warp.late(lane).back().push_back(copy);
  }
}

void end_batch(Warp& warp, const Instruction&, Mask mask) {
  for (; mask; mask &= mask - 1) warp.late(static_cast<std::uint32_t>(__builtin_ctz(mask))).emplace_back();
}

void wait_for_batches(Warp& warp, const Instruction& i, Mask mask) {
  Block& block = warp.block();
  for (; mask; mask &= mask - 1) {
    const auto lane = static_cast<std::uint32_t>(__builtin_ctz(mask));
    auto& batches = warp.late(lane);
    while (batches.size() > warp.get(i.operand[0], lane) + 1) {
      for (const LateCopy& copy : batches.front()) {
        const std::uint32_t at = copy.to - static_cast<std::uint32_t>(kSharedBegin);
        std::memcpy(block.shared() + at, copy.data.data(), copy.bytes);
        std::memset(&block.in_flight[at], 0, copy.bytes);
        --block.copies_in_flight;
      }
      batches.erase(batches.begin());
    }
  }
}

}  // namespace

Found find_atomic(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  if (opcode.text == "cp.async.cg.shared.global") {
    Form form{.run = begin_copy, .written = 0, .widths = {4, 8, 4}};
    if (statement.terms.size() > 3) form.widths.push_back(4);
    return form;
  }
  if (opcode.text == "cp.async.commit_group") return Form{.run = end_batch, .written = 0, .widths = {}};
  if (opcode.text == "cp.async.wait_group") return Form{.run = wait_for_batches, .written = 0, .widths = {4}};
  const std::size_t parts = opcode.parts.size();
  if ((opcode.name != "atom" && opcode.name != "red") || parts < 2 || parts > 3) return {};
  if (parts == 3 && opcode.parts[0] != "shared" && opcode.parts[0] != "global") return {};
  const int bytes = bytes_of(opcode.type());
  const bool answers = opcode.name == "atom";
  Form form{.run = find_change(opcode.type(1), opcode.type()), .written = answers, .widths = {}};
  if (answers) form.widths.push_back(bytes);
  form.widths.insert(form.widths.end(), {kAny, bytes});
  if (form.run == nullptr) return {};
  return form;
}

}  // namespace ptx
