// Floats, rounded to nearest: what IEEE 754 says, and what is not a number becomes the one that the machine
// gives.
#include <bit>
#include <cmath>

#include "forms.h"

namespace ptx {

namespace {

inline float canonical(float a) { return a == a ? a : std::bit_cast<float>(0x7FFFFFFFu); }
// Of doubles the machine hands on what it was given; none of our kernels looks.
inline double canonical(double a) { return a; }

struct Add {
  template <typename T>
  static T of(T a, T b) {
    return canonical(a + b);
  }
};
struct Subtract {
  template <typename T>
  static T of(T a, T b) {
    return canonical(a - b);
  }
};
struct Multiply {
  template <typename T>
  static T of(T a, T b) {
    return canonical(a * b);
  }
};
struct Divide {
  template <typename T>
  static T of(T a, T b) {
    return canonical(a / b);
  }
};
struct Fused {
  template <typename T>
  static T of(T a, T b, T c) {
    return canonical(std::fma(a, b, c));
  }
};
struct Root {
  template <typename T>
  static T of(T a) {
    return canonical(std::sqrt(a));
  }
};
// The other one where one is not a number; -0 is less than 0.
struct Least {
  template <typename T>
  static T of(T a, T b) {
    if (a != a || b != b) return canonical(a != a ? b : a);
    return a < b || (a == b && std::signbit(a)) ? a : b;
  }
};
struct Most {
  template <typename T>
  static T of(T a, T b) {
    if (a != a || b != b) return canonical(a != a ? b : a);
    return a > b || (a == b && !std::signbit(a)) ? a : b;
  }
};
struct Negate {
  template <typename T>
  static T of(T a) {
    return canonical(-a);
  }
};
struct Absolute {
  template <typename T>
  static T of(T a) {
    return canonical(std::fabs(a));
  }
};

template <typename Operation>
Handler one(const std::string& type) {
  return pick(Floats{}, type, [](auto t) -> Handler { return run_one<Operation, decltype(t), decltype(t)>; });
}
template <typename Operation>
Handler two(const std::string& type) {
  return pick(Floats{}, type, [](auto t) -> Handler {
    using T = decltype(t);
    return run_two<Operation, T, T, T>;
  });
}

}  // namespace

Found find_float(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  const std::string &name = opcode.name, type = opcode.type();
  if (type != "f32" && type != "f64") return {};
  const int bytes = bytes_of(type);
  const bool rounded = opcode.parts.size() == 2 && opcode.parts[0] == "rn";
  Form form{.run = nullptr, .widths = {bytes, bytes, bytes}};
  if (rounded) {
    if (name == "add") form.run = two<Add>(type);
    if (name == "sub") form.run = two<Subtract>(type);
    if (name == "mul") form.run = two<Multiply>(type);
    if (name == "div") form.run = two<Divide>(type);
    if (name == "sqrt") form = {.run = one<Root>(type), .widths = {bytes, bytes}};
    if (name == "fma") {
      form.widths.push_back(bytes);
      form.run = pick(Floats{}, type, [](auto t) -> Handler {
        using T = decltype(t);
        return run_three<Fused, T, T, T, T>;
      });
    }
  } else if (opcode.parts.size() == 1) {
    if (name == "min") form.run = two<Least>(type);
    if (name == "max") form.run = two<Most>(type);
    if (name == "neg") form = {.run = one<Negate>(type), .widths = {bytes, bytes}};
    if (name == "abs") form = {.run = one<Absolute>(type), .widths = {bytes, bytes}};
  }
  if (form.run == nullptr) return {};
  return form;
}

}  // namespace ptx
