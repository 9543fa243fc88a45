// What there is to execute, by the opcode; each family in its own file.
#pragma once

#include <optional>

#include "machine.h"

namespace ptx {

inline constexpr int kAny = -1;  // any register that is wide enough

struct Form {
  Handler run = nullptr;
  int written = 1;  // operands, from the first on
  std::vector<int>
      widths;  // bytes of each operand, as the text has them, vectors taken apart; 0: a predicate
  Way way = Way::kPlain;
  std::uint32_t detail = 0;
  int member = -1;  // for .sync: which operand names who takes part; one past the last: all
};

using Found = std::optional<Form>;

Found find_integer(const Statement& statement);
Found find_bits(const Statement& statement);
Found find_float(const Statement& statement);
Found find_choice(const Statement& statement);  // setp, selp, mov
Found find_conversion(const Statement& statement);
Found find_memory(const Statement& statement);
Found find_atomic(const Statement& statement);
Found find_collective(const Statement& statement);
Found find_matrix(const Statement& statement);

inline int bytes_of(const std::string& type) {
  return type == "pred" ? 0 : std::atoi(type.c_str() + type.find_first_of("0123456789")) / 8;
}

template <typename T>
constexpr const char* kNameOf = nullptr;
template <>
inline constexpr const char* kNameOf<std::uint16_t> = "u16";
template <>
inline constexpr const char* kNameOf<std::uint32_t> = "u32";
template <>
inline constexpr const char* kNameOf<std::uint64_t> = "u64";
template <>
inline constexpr const char* kNameOf<std::int16_t> = "s16";
template <>
inline constexpr const char* kNameOf<std::int32_t> = "s32";
template <>
inline constexpr const char* kNameOf<std::int64_t> = "s64";
template <>
inline constexpr const char* kNameOf<float> = "f32";
template <>
inline constexpr const char* kNameOf<double> = "f64";

template <typename... T>
struct Types {};
using Unsigned = Types<std::uint16_t, std::uint32_t, std::uint64_t>;
using Integers = Types<std::uint16_t, std::uint32_t, std::uint64_t, std::int16_t, std::int32_t, std::int64_t>;
using Floats = Types<float, double>;
using Numbers = Types<std::uint16_t, std::uint32_t, std::uint64_t, std::int16_t, std::int32_t, std::int64_t,
                      float, double>;

// Calls `make` with the one of the types that is called so; bits are unsigned numbers.
template <typename... T, typename Make>
Handler pick(Types<T...>, const std::string& type, Make make) {
  const std::string name = type[0] == 'b' ? "u" + type.substr(1) : type;
  Handler found = nullptr;
  ((found = found == nullptr && name == kNameOf<T> ? make(T{}) : found), ...);
  return found;
}

// Sets each lane of the mask to what `give` makes of its number.
template <typename To, typename Give>
inline void fill(Warp& warp, const Operand& operand, Mask mask, Give give) {
  To* to = warp.lanes<To>(operand);
  if (mask == kAll) {
#pragma GCC ivdep
    for (std::uint32_t lane = 0; lane < kWarp; ++lane) to[lane] = give(lane);
  } else {
    for (Mask left = mask; left; left &= left - 1) {
      const auto lane = static_cast<std::uint32_t>(__builtin_ctz(left));
      to[lane] = give(lane);
    }
  }
}

// Handlers of operations on lanes: Operation::of(a, ...) for operands of the types A, ...
template <typename Operation, typename To, typename A>
void run_one(Warp& warp, const Instruction& i, Mask mask) {
  const A* a = warp.lanes<A>(i.operand[1]);
  fill<To>(warp, i.operand[0], mask, [=](std::uint32_t l) { return Operation::of(a[l]); });
}
template <typename Operation, typename To, typename A, typename B>
void run_two(Warp& warp, const Instruction& i, Mask mask) {
  const A* a = warp.lanes<A>(i.operand[1]);
  const B* b = warp.lanes<B>(i.operand[2]);
  fill<To>(warp, i.operand[0], mask, [=](std::uint32_t l) { return Operation::of(a[l], b[l]); });
}
template <typename Operation, typename To, typename A, typename B, typename C>
void run_three(Warp& warp, const Instruction& i, Mask mask) {
  const A* a = warp.lanes<A>(i.operand[1]);
  const B* b = warp.lanes<B>(i.operand[2]);
  const C* c = warp.lanes<C>(i.operand[3]);
  fill<To>(warp, i.operand[0], mask, [=](std::uint32_t l) { return Operation::of(a[l], b[l], c[l]); });
}

}  // namespace ptx
