// Integer arithmetic. Compiled with -fwrapv: numbers wrap around, as the machine's do.
#include <type_traits>

#include "forms.h"
#include "operations.h"

namespace ptx {

namespace {

template <typename T>
struct Wider;
template <>
struct Wider<std::uint16_t> {
  using Type = std::uint32_t;
};
template <>
struct Wider<std::uint32_t> {
  using Type = std::uint64_t;
};
template <>
struct Wider<std::uint64_t> {
  using Type = unsigned __int128;
};
template <>
struct Wider<std::int16_t> {
  using Type = std::int32_t;
};
template <>
struct Wider<std::int32_t> {
  using Type = std::int64_t;
};
template <>
struct Wider<std::int64_t> {
  using Type = __int128;
};
template <typename T>
using Wide = typename Wider<T>::Type;

template <typename T>
T high(T a, T b) {
  return static_cast<T>(Wide<T>{a} * Wide<T>{b} >> 8 * sizeof(T));
}

struct Add {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Subtract {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(a - b);
  }
};
struct MultiplyLow {
  template <typename T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<Wide<T>>(a) * b);
  }
};
struct MultiplyLow64 {
  template <typename T>
  static T of(T a, T b) {
    return a * b;
  }
};
struct MultiplyHigh {
  template <typename T>
  static T of(T a, T b) {
    return high(a, b);
  }
};
struct MultiplyWide {
  template <typename T>
  static Wide<T> of(T a, T b) {
    return Wide<T>{a} * Wide<T>{b};
  }
};
struct MultiplyLowAdd {
  template <typename T>
  static T of(T a, T b, T c) {
    return static_cast<T>(a * b + c);
  }
};
struct MultiplyHighAdd {
  template <typename T>
  static T of(T a, T b, T c) {
    return static_cast<T>(high(a, b) + c);
  }
};
struct MultiplyWideAdd {
  template <typename T>
  static Wide<T> of(T a, T b, Wide<T> c) {
    return Wide<T>{a} * Wide<T>{b} + c;
  }
};
struct LeastNotNegative {
  template <typename T>
  static T of(T a, T b) {
    return Most::of(Least::of(a, b), T{0});
  }
};
struct MostNotNegative {
  template <typename T>
  static T of(T a, T b) {
    return Most::of(Most::of(a, b), T{0});
  }
};
struct Negate {
  template <typename T>
  static T of(T a) {
    return static_cast<T>(-a);
  }
};
struct Absolute {
  template <typename T>
  static T of(T a) {
    return static_cast<T>(a < 0 ? -a : a);
  }
};

template <typename T, bool kRemainder>
void divide(Warp& warp, const Instruction& i, Mask mask) {
  const T* a = warp.lanes<T>(i.operand[1]);
  const T* b = warp.lanes<T>(i.operand[2]);
  for (std::uint32_t lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (b[lane] == 0) warp.stop("a division by zero, whose result is not specified", lane);
    const bool wraps = std::is_signed_v<T> && b[lane] == static_cast<T>(-1);  // the least by -1
    const T quotient = wraps ? static_cast<T>(-a[lane]) : static_cast<T>(a[lane] / b[lane]);
    warp.lanes<T>(i.operand[0])[lane] = kRemainder ? static_cast<T>(a[lane] - quotient * b[lane]) : quotient;
  }
}

template <typename Operation>
Handler one(const std::string& type) {
  return pick(Integers{}, type,
              [](auto t) -> Handler { return run_one<Operation, decltype(t), decltype(t)>; });
}
template <typename Operation>
Handler two(const std::string& type) {
  return pick(Integers{}, type, [](auto t) -> Handler {
    using T = decltype(t);
    return run_two<Operation, T, T, T>;
  });
}
template <typename Operation>
Handler three(const std::string& type) {
  return pick(Integers{}, type, [](auto t) -> Handler {
    using T = decltype(t);
    return run_three<Operation, T, T, T, T>;
  });
}

using Narrow = Types<std::uint16_t, std::uint32_t, std::int16_t, std::int32_t>;

Handler multiply(const std::string& how, const std::string& type) {
  if (how == "lo" && bytes_of(type) == 8) return two<MultiplyLow64>(type);
  if (how == "lo") return two<MultiplyLow>(type);
  if (how == "hi") return two<MultiplyHigh>(type);
  return pick(Narrow{}, type, [](auto t) -> Handler {
    using T = decltype(t);
    return run_two<MultiplyWide, Wide<T>, T, T>;
  });
}

Handler multiply_add(const std::string& how, const std::string& type) {
  if (how == "lo") return three<MultiplyLowAdd>(type);
  if (how == "hi") return three<MultiplyHighAdd>(type);
  return pick(Narrow{}, type, [](auto t) -> Handler {
    using T = decltype(t);
    return run_three<MultiplyWideAdd, Wide<T>, T, T, Wide<T>>;
  });
}

bool is_product(const std::string& how) { return how == "lo" || how == "hi" || how == "wide"; }

}  // namespace

Found find_integer(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  const std::string &name = opcode.name, type = opcode.type();
  const std::size_t parts = opcode.parts.size();
  if (opcode.text == "min.s32.relu") return Form{.run = two<LeastNotNegative>("s32"), .widths = {4, 4, 4}};
  if (opcode.text == "max.s32.relu") return Form{.run = two<MostNotNegative>("s32"), .widths = {4, 4, 4}};
  if (type.empty() || (type[0] != 'u' && type[0] != 's')) return {};
  const int bytes = bytes_of(type);
  Form form{.run = nullptr, .widths = {bytes, bytes, bytes}};
  if (parts == 1) {
    if (name == "add") form.run = two<Add>(type);
    if (name == "sub") form.run = two<Subtract>(type);
    if (name == "min") form.run = two<Least>(type);
    if (name == "max") form.run = two<Most>(type);
    if (name == "div")
      form.run = pick(Integers{}, type, [](auto t) -> Handler { return divide<decltype(t), false>; });
    if (name == "rem")
      form.run = pick(Integers{}, type, [](auto t) -> Handler { return divide<decltype(t), true>; });
    if (name == "neg" || name == "abs") {
      form.widths = {bytes, bytes};
      form.run = name == "neg" ? one<Negate>(type) : one<Absolute>(type);
    }
  } else if (parts == 2 && (name == "mul" || name == "mad") && is_product(opcode.parts[0])) {
    const int to = opcode.parts[0] == "wide" ? 2 * bytes : bytes;
    form.run = name == "mul" ? multiply(opcode.parts[0], type) : multiply_add(opcode.parts[0], type);
    form.widths = {to, bytes, bytes};
    if (name == "mad") form.widths.push_back(to);
  }
  if (form.run == nullptr) return {};
  return form;
}

}  // namespace ptx
