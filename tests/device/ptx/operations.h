// Operations on two numbers that statements of several kinds have: of arithmetic, of bits, of atomics.
#pragma once

namespace ptx {

struct Least {
  template <typename T>
  static T of(T a, T b) {
    return a < b ? a : b;
  }
};
struct Most {
  template <typename T>
  static T of(T a, T b) {
    return a < b ? b : a;
  }
};
struct And {
  template <typename T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <typename T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <typename T>
  static T of(T a, T b) {
    return a ^ b;
  }
};

}  // namespace ptx
