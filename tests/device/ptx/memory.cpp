#include "memory.h"

#include <algorithm>

namespace ptx {

namespace {

[[noreturn]] void stop_at(Warp& warp, std::uint32_t lane, std::uint64_t address, std::uint32_t bytes,
                          const char* what) {
  char text[128];
  std::snprintf(text, sizeof text, "%u bytes at %#llx: %s", bytes, static_cast<unsigned long long>(address),
                what);
  warp.stop(text, lane);
}

void require_aligned(Warp& warp, std::uint32_t lane, std::uint64_t address, std::uint32_t bytes) {
  if (address % bytes != 0) stop_at(warp, lane, address, bytes, "not aligned");
}

// An address that a lane has in a register, of 4 bytes or 8.
std::uint64_t address_of(Warp& warp, const Instruction& i, const Operand& base, std::uint32_t lane) {
  const std::uint64_t sum = warp.get(base, lane) + static_cast<std::uint64_t>(i.offset);
  return base.bytes == 4 ? static_cast<std::uint32_t>(sum) : sum;
}

}  // namespace

std::uint8_t* find_shared(Warp& warp, std::uint32_t lane, std::uint64_t address, std::uint32_t bytes) {
  require_aligned(warp, lane, address, bytes);
  Block& block = warp.block();
  const std::uint64_t end = kSharedBegin + block.launch().shared_bytes;
  if (address < kSharedBegin || address > end - bytes)
    stop_at(warp, lane, address, bytes, "outside of shared memory");
  const std::uint64_t at = address - kSharedBegin;
  if (block.copies_in_flight)
    for (std::uint32_t k = 0; k < bytes; ++k)
      if (block.in_flight[at + k])
        stop_at(warp, lane, address, bytes, "a copy to there may not have arrived");
  return block.shared() + at;
}

std::uint8_t* find_global(Warp& warp, const Instruction& i, std::uint32_t lane, std::uint64_t address,
                          std::uint32_t bytes, bool write) {
  require_aligned(warp, lane, address, bytes);
  const Memory& memory = warp.block().memory();
  const auto holds = [&](const Region& region) {
    return region.begin <= address && address + bytes <= region.end;
  };
  const Region* found = i.region < memory.regions.size() ? &memory.regions[i.region] : nullptr;
  if (found == nullptr || !holds(*found)) {
    const auto after =
        std::upper_bound(memory.regions.begin(), memory.regions.end(), address,
                         [](std::uint64_t at, const Region& region) { return at < region.begin; });
    found = after == memory.regions.begin() ? nullptr : &*(after - 1);
    if (found != nullptr && holds(*found)) i.region = static_cast<std::size_t>(found - memory.regions.data());
  }
  if (found == nullptr || !holds(*found)) {
    if (!memory.anything || address < 65536) stop_at(warp, lane, address, bytes, "no memory of this launch");
  } else if (write && !found->writable) {
    stop_at(warp, lane, address, bytes, "a constant");
  }
  return reinterpret_cast<std::uint8_t*>(address);
}

std::uint8_t* find_bytes(Warp& warp, const Instruction& i, std::uint32_t lane, std::uint64_t address,
                         std::uint32_t bytes, bool write) {
  Space space = i.space;
  if (space == Space::kGeneric) {
    const std::uint64_t window = address & 0xFFull << 56;
    space = window == kSharedWindow  ? Space::kShared
            : window == kLocalWindow ? Space::kLocal
                                     : Space::kGlobal;
    if (space != Space::kGlobal) address &= ~(0xFFull << 56);
  }
  const Launch& launch = warp.block().launch();
  switch (space) {
    case Space::kShared:
      return find_shared(warp, lane, address, bytes);
    case Space::kLocal:
      require_aligned(warp, lane, address, bytes);
      if (address > launch.entry->text->local_bytes || address + bytes > launch.entry->text->local_bytes)
        stop_at(warp, lane, address, bytes, "outside of the thread's memory");
      return warp.local(lane) + address;
    case Space::kParameter:
      require_aligned(warp, lane, address, bytes);
      if (write || address > launch.entry->text->parameter_bytes ||
          address + bytes > launch.entry->text->parameter_bytes)
        stop_at(warp, lane, address, bytes, "outside of the arguments");
      return const_cast<std::uint8_t*>(launch.parameter) + address;
    default:
      return find_global(warp, i, lane, address, bytes, write);
  }
}

namespace {

// Extended to the register's width as its type says.
template <typename T>
void load(Warp& warp, const Instruction& i, Mask mask) {
  const Operand& base = i.operand[i.written];
  for (; mask; mask &= mask - 1) {
    const auto lane = static_cast<std::uint32_t>(__builtin_ctz(mask));
    const std::uint8_t* from =
        find_bytes(warp, i, lane, address_of(warp, i, base, lane), i.written * sizeof(T), false);
    for (std::uint32_t k = 0; k < i.written; ++k) {
      T value;
      std::memcpy(&value, from + k * sizeof(T), sizeof(T));
      warp.set(i.operand[k], lane, static_cast<std::uint64_t>(static_cast<std::int64_t>(value)));
    }
  }
}

// Lanes that write to the same place: any of them may be the last.
template <typename T>
void store(Warp& warp, const Instruction& i, Mask mask) {
  const std::uint32_t count = i.operands - 1u;
  const std::uint32_t begin = warp.block().random() ? warp.block().draw(kWarp) : 0;
  for (std::uint32_t n = 0; n < kWarp; ++n) {
    const std::uint32_t lane = (begin + n) % kWarp;
    if (!(mask >> lane & 1)) continue;
    std::uint8_t* to =
        find_bytes(warp, i, lane, address_of(warp, i, i.operand[0], lane), count * sizeof(T), true);
    for (std::uint32_t k = 0; k < count; ++k) {
      const T value = static_cast<T>(warp.get(i.operand[1 + k], lane));
      std::memcpy(to + k * sizeof(T), &value, sizeof(T));
    }
  }
}

using Every = Types<std::uint16_t, std::uint32_t, std::uint64_t, std::int16_t, std::int32_t, std::int64_t>;

Handler find_access(bool write, const std::string& type) {
  const std::string name = type[0] == 'f' ? "u" + type.substr(1) : type;
  if (name == "s8") return write ? store<std::int8_t> : load<std::int8_t>;
  if (name == "u8" || name == "b8") return write ? store<std::uint8_t> : load<std::uint8_t>;
  return pick(Every{}, name,
              [write](auto t) -> Handler { return write ? store<decltype(t)> : load<decltype(t)>; });
}

// To and from generic addresses; global ones are the same.
template <bool kToGeneric>
void turn_address(Warp& warp, const Instruction& i, Mask mask) {
  const auto* from = warp.lanes<std::uint64_t>(i.operand[1]);
  const std::uint64_t window = i.space == Space::kShared  ? kSharedWindow
                               : i.space == Space::kLocal ? kLocalWindow
                                                          : 0;
  for (std::uint32_t lane = 0; lane < kWarp && !kToGeneric; ++lane)
    if (mask >> lane & 1 && (from[lane] & 0xFFull << 56) != window)
      warp.stop("an address of another space", lane);
  fill<std::uint64_t>(warp, i.operand[0], mask,
                      [=](std::uint32_t l) { return kToGeneric ? from[l] | window : from[l] & ~window; });
}

}  // namespace

Found find_memory(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  if (opcode.name == "cvta" && opcode.type() == "u64") {
    if (opcode.parts.size() == 3 && opcode.parts[0] == "to")
      return Form{.run = turn_address<false>, .widths = {8, 8}};
    if (opcode.parts.size() == 2) return Form{.run = turn_address<true>, .widths = {8, 8}};
    return {};
  }
  if (opcode.name != "ld" && opcode.name != "st") return {};
  int count = 1;
  for (std::size_t k = 0; k + 1 < opcode.parts.size(); ++k) {
    const std::string& part = opcode.parts[k];
    if (part == "v2" || part == "v4")
      count = part[1] - '0';
    else if (part != "global" && part != "shared" && part != "local" && part != "param" && part != "nc")
      return {};
  }
  const bool write = opcode.name == "st";
  Form form{.run = find_access(write, opcode.type()), .written = write ? 0 : count, .widths = {}};
  form.widths.assign(static_cast<std::size_t>(count) + 1, kAny);
  if (form.run == nullptr) return {};
  return form;
}

}  // namespace ptx
