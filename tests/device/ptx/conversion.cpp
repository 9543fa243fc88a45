// cvt between all types, with the roundings that nvcc uses.
#include <bit>
#include <cmath>
#include <limits>

#include "forms.h"

namespace ptx {

namespace {

float widen_half(std::uint32_t bits) {
  const std::uint32_t sign = bits >> 15 & 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = std::ldexp(static_cast<float>(exponent ? fraction | 1024 : fraction),
                           (exponent ? static_cast<int>(exponent) : 1) - 25);
  if (exponent == 31)
    value = fraction ? std::bit_cast<float>(0x7FFFFFFFu) : std::numeric_limits<float>::infinity();
  return sign && !(exponent == 31 && fraction) ? -value : value;
}

// To the nearest float of `fraction` bits whose smallest exponent is `least`, ties to even; 0x7FFF is no
// number.
std::uint32_t narrow(float value, int fraction, int exponents) {
  if (value != value) return 0x7FFF;
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(value) >> 31 << 15;
  const std::uint32_t infinite = ((1u << exponents) - 1) << fraction;
  const int bias = (1 << (exponents - 1)) - 1;
  int power = 0;
  if (value == 0) return sign;
  if (std::isinf(value)) return sign | infinite;
  std::frexp(value, &power);  // 2^(power - 1) <= |value|
  const int unit = std::max(power - 1, 1 - bias) - fraction;
  // Exact: a float has less bits than a double, and the unit is a power of two.
  const double steps = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(value)), -unit));
  const auto count = static_cast<std::uint32_t>(steps);
  // With the leading bit counted as an exponent's: what is rounded up carries into it.
  const auto above = static_cast<std::uint32_t>(unit + fraction + bias - 1) << fraction;
  return sign | std::min(above + count, infinite);
}

std::uint32_t to_half(float value) { return narrow(value, 10, 5); }
std::uint32_t to_bfloat(float value) { return narrow(value, 7, 8); }

using Lanes = std::uint64_t[kWarp];

void load(Warp& warp, const Operand& from, Lanes& to) {
  const auto take = [&](auto t) {
    const auto* lanes = warp.lanes<decltype(t)>(from);
    for (std::uint32_t l = 0; l < kWarp; ++l) to[l] = lanes[l];
  };
  if (from.bytes == 2) take(std::uint16_t{});
  if (from.bytes == 4) take(std::uint32_t{});
  if (from.bytes == 8) take(std::uint64_t{});
}

void store(Warp& warp, const Operand& to, Mask mask, const Lanes& from) {
  const auto give = [&](auto t) {
    using T = decltype(t);
    fill<T>(warp, to, mask, [&](std::uint32_t l) { return static_cast<T>(from[l]); });
  };
  if (to.bytes == 2) give(std::uint16_t{});
  if (to.bytes == 4) give(std::uint32_t{});
  if (to.bytes == 8) give(std::uint64_t{});
}

// The numbers that registers hold for each of the types; what is wider than the type is cut off.
template <typename T>
T number_of(std::uint64_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits));
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<double>(bits);
  else
    return static_cast<T>(bits);
}
template <typename T>
std::uint64_t bits_of(T number) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<std::uint32_t>(number == number ? number : std::bit_cast<float>(0x7FFFFFFFu));
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<std::uint64_t>(number);
  else
    return static_cast<std::uint64_t>(static_cast<std::int64_t>(number));
}

enum Rounding : std::uint32_t { kNone, kNearest, kZero, kDown, kUp };

template <typename T>
T round_to(T value, std::uint32_t how) {
  switch (how) {
    case kNearest:
      return std::nearbyint(value);
    case kZero:
      return std::trunc(value);
    case kDown:
      return std::floor(value);
    case kUp:
      return std::ceil(value);
    default:
      return value;
  }
}

template <typename To, typename From>
To convert(From from, std::uint32_t how) {
  constexpr bool kFromFloat = std::is_floating_point_v<From>, kToFloat = std::is_floating_point_v<To>;
  if constexpr (kFromFloat && kToFloat) {
    return static_cast<To>(sizeof(To) == sizeof(From) ? round_to(from, how) : from);
  } else if constexpr (kFromFloat) {  // what does not fit becomes the nearest that does; what is no number 0
    const double value = round_to(static_cast<double>(from), how);
    if (value != value) return 0;
    if (value <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (value >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return static_cast<To>(value);
  } else {
    return static_cast<To>(from);
  }
}

// detail: Rounding.
template <typename To, typename From>
void run_convert(Warp& warp, const Instruction& i, Mask mask) {
  Lanes lanes;
  load(warp, i.operand[1], lanes);
  for (std::uint32_t l = 0; l < kWarp; ++l)
    if (mask >> l & 1) lanes[l] = bits_of(convert<To>(number_of<From>(lanes[l]), i.detail));
  store(warp, i.operand[0], mask, lanes);
}

// From one whole number to a wider or narrower one.
template <typename To, typename From>
void resize(Warp& warp, const Instruction& i, Mask mask) {
  Lanes lanes;
  load(warp, i.operand[1], lanes);
  for (std::uint32_t l = 0; l < kWarp; ++l) lanes[l] = bits_of(static_cast<To>(static_cast<From>(lanes[l])));
  store(warp, i.operand[0], mask, lanes);
}

template <std::uint32_t (*kNarrow)(float)>
void narrow_one(Warp& warp, const Instruction& i, Mask mask) {
  const float* from = warp.lanes<float>(i.operand[1]);
  fill<std::uint16_t>(warp, i.operand[0], mask, [=](std::uint32_t l) { return kNarrow(from[l]); });
}
// The first operand becomes the upper half.
template <std::uint32_t (*kNarrow)(float)>
void narrow_two(Warp& warp, const Instruction& i, Mask mask) {
  const float *upper = warp.lanes<float>(i.operand[1]), *lower = warp.lanes<float>(i.operand[2]);
  fill<std::uint32_t>(warp, i.operand[0], mask,
                      [=](std::uint32_t l) { return kNarrow(upper[l]) << 16 | kNarrow(lower[l]); });
}

struct WidenHalf {
  static float of(std::uint16_t bits) { return widen_half(bits); }
};
struct WidenBfloat {
  static float of(std::uint16_t bits) {
    return (bits & 0x7FFF) > 0x7F80 ? std::bit_cast<float>(0x7FFFFFFFu)
                                    : std::bit_cast<float>(std::uint32_t{bits} << 16);
  }
};

template <typename To>
Handler from_type(const std::string& type) {
  if (type == "u8") return run_convert<To, std::uint8_t>;
  if (type == "s8") return run_convert<To, std::int8_t>;
  return pick(Numbers{}, type, [](auto t) -> Handler {
    using From = decltype(t);
    if constexpr (std::is_integral_v<To> && std::is_integral_v<From>)
      return resize<To, From>;
    else
      return run_convert<To, From>;
  });
}

Handler of_types(const std::string& to, const std::string& from) {
  if (to == "u8") return from_type<std::uint8_t>(from);
  if (to == "s8") return from_type<std::int8_t>(from);
  return pick(Numbers{}, to, [&](auto t) -> Handler { return from_type<decltype(t)>(from); });
}

Found find_halves(const std::string& text) {
  if (text == "cvt.f32.f16") return Form{.run = run_one<WidenHalf, float, std::uint16_t>, .widths = {4, 2}};
  if (text == "cvt.f32.bf16")
    return Form{.run = run_one<WidenBfloat, float, std::uint16_t>, .widths = {4, 2}};
  if (text == "cvt.rn.f16.f32") return Form{.run = narrow_one<to_half>, .widths = {2, 4}};
  if (text == "cvt.rn.bf16.f32") return Form{.run = narrow_one<to_bfloat>, .widths = {2, 4}};
  if (text == "cvt.rn.f16x2.f32") return Form{.run = narrow_two<to_half>, .widths = {4, 4, 4}};
  if (text == "cvt.rn.bf16x2.f32") return Form{.run = narrow_two<to_bfloat>, .widths = {4, 4, 4}};
  return {};
}

}  // namespace

Found find_conversion(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  if (opcode.name != "cvt" || opcode.parts.size() < 2) return {};
  if (Found found = find_halves(opcode.text)) return found;
  const std::string to = opcode.type(1), from = opcode.type(0);
  std::uint32_t how = kNone;
  if (opcode.parts.size() > 3) return {};
  const bool integers = to[0] != 'f' && from[0] != 'f';
  if (opcode.parts.size() == 3) {
    const std::string& rounding = opcode.parts[0];
    const bool to_whole = from[0] == 'f' && (to[0] != 'f' || to == from);
    if (to_whole)
      how = rounding == "rni"   ? kNearest
            : rounding == "rzi" ? kZero
            : rounding == "rmi" ? kDown
            : rounding == "rpi" ? kUp
                                : kNone;
    if (to_whole ? how == kNone : rounding != "rn" || integers) return {};
  } else if (!integers && !(to == "f64" && from == "f32")) {
    return {};  // it rounds, and must say how
  }
  Form form{.run = of_types(to, from), .widths = {kAny, kAny}, .detail = how};
  if (form.run == nullptr) return {};
  return form;
}

}  // namespace ptx
