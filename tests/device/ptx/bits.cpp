// Logic, shifts and fields of bits.
#include <bit>
#include <type_traits>

#include "forms.h"
#include "operations.h"

namespace ptx {

namespace {

struct Not {
  template <typename T>
  static T of(T a) {
    return static_cast<T>(~a);
  }
};
struct ShiftLeft {
  template <typename T>
  static T of(T a, std::uint32_t by) {
    return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << by);
  }
};
struct ShiftRight {
  template <typename T>
  static T of(T a, std::uint32_t by) {
    constexpr std::uint32_t kBits = 8 * sizeof(T);
    if (std::is_signed_v<T>) return static_cast<T>(a >> (by >= kBits ? kBits - 1 : by));
    return by >= kBits ? T{0} : static_cast<T>(a >> by);
  }
};
struct CountBits {
  template <typename T>
  static std::uint32_t of(T a) {
    return static_cast<std::uint32_t>(std::popcount(a));
  }
};
struct LeadingZeros {
  template <typename T>
  static std::uint32_t of(T a) {
    return static_cast<std::uint32_t>(std::countl_zero(a));
  }
};
struct Reverse {
  template <typename T>
  static T of(T a) {
    T found = 0;
    for (std::uint32_t i = 0; i < 8 * sizeof(T); ++i) found |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return found;
  }
};
// The highest bit that differs from the sign.
struct FindHighest {
  template <typename T>
  static std::uint32_t of(T a) {
    using U = std::make_unsigned_t<T>;
    const U bits = static_cast<U>(std::is_signed_v<T> && a < 0 ? ~a : a);
    return bits == 0 ? 0xFFFFFFFFu : static_cast<std::uint32_t>(8 * sizeof(T) - 1 - std::countl_zero(bits));
  }
};
struct InsertField {
  template <typename T>
  static T of(T field, T into, std::uint32_t at, std::uint32_t length) {
    constexpr std::uint32_t kBits = 8 * sizeof(T);
    at &= 0xFF, length &= 0xFF;
    if (at >= kBits) return into;
    const T ones = length >= kBits ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << length) - 1);
    return static_cast<T>((into & ~(ones << at)) | (field & ones) << at);
  }
};
struct ExtractField {
  template <typename T>
  static T of(T from, std::uint32_t at, std::uint32_t length) {
    constexpr std::uint32_t kBits = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    at &= 0xFF, length &= 0xFF;
    const auto bits = static_cast<U>(from);
    const std::uint32_t last = std::min(at + length - 1, kBits - 1);
    const bool sign = std::is_signed_v<T> && length != 0 && (bits >> last & 1);
    U found = 0;
    for (std::uint32_t i = 0; i < kBits; ++i)
      found |= static_cast<U>(i < length && at + i < kBits ? bits >> (at + i) & 1 : sign) << i;
    return static_cast<T>(found);
  }
};
struct Permute {
  static std::uint32_t of(std::uint32_t a, std::uint32_t b, std::uint32_t which) {
    const std::uint64_t both = std::uint64_t{b} << 32 | a;
    std::uint32_t found = 0;
    for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t choice = which >> 4 * i & 15;
      std::uint32_t byte = both >> 8 * (choice & 7) & 0xFF;
      if (choice & 8) byte = byte & 0x80 ? 0xFF : 0;
      found |= byte << 8 * i;
    }
    return found;
  }
};

template <bool kLeft, bool kWrap>
struct Funnel {
  static std::uint32_t of(std::uint32_t low, std::uint32_t high, std::uint32_t by) {
    const std::uint32_t n = kWrap ? by & 31 : std::min(by, 32u);
    const std::uint64_t both = std::uint64_t{high} << 32 | low;
    return static_cast<std::uint32_t>(kLeft ? both >> (32 - n) : both >> n);
  }
};

template <typename T>
void insert_field(Warp& warp, const Instruction& i, Mask mask) {
  const T *field = warp.lanes<T>(i.operand[1]), *into = warp.lanes<T>(i.operand[2]);
  const auto *at = warp.lanes<std::uint32_t>(i.operand[3]), *length = warp.lanes<std::uint32_t>(i.operand[4]);
  fill<T>(warp, i.operand[0], mask,
          [=](std::uint32_t l) { return InsertField::of(field[l], into[l], at[l], length[l]); });
}

// Any function of three bits: bit 4 a + 2 b + c of the table.
void look_up_three(Warp& warp, const Instruction& i, Mask mask) {
  const auto *a = warp.lanes<std::uint32_t>(i.operand[1]), *b = warp.lanes<std::uint32_t>(i.operand[2]),
             *c = warp.lanes<std::uint32_t>(i.operand[3]), *table = warp.lanes<std::uint32_t>(i.operand[4]);
  fill<std::uint32_t>(warp, i.operand[0], mask, [=](std::uint32_t l) {
    std::uint32_t found = 0;
    for (std::uint32_t of = 0; of < 8; ++of) {
      if (!(table[l] >> of & 1)) continue;
      found |= (of & 4 ? a[l] : ~a[l]) & (of & 2 ? b[l] : ~b[l]) & (of & 1 ? c[l] : ~c[l]);
    }
    return found;
  });
}

template <typename Operation>
void of_predicates(Warp& warp, const Instruction& i, Mask mask) {
  const Mask found = Operation::of(warp.predicate(i.operand[1]), warp.predicate(i.operand[2]));
  Mask& to = warp.predicate(i.operand[0]);
  to = (to & ~mask) | (found & mask);
}
void not_predicate(Warp& warp, const Instruction& i, Mask mask) {
  Mask& to = warp.predicate(i.operand[0]);
  to = (to & ~mask) | (~warp.predicate(i.operand[1]) & mask);
}

template <typename Operation>
Handler logic(const std::string& type) {
  if (type == "pred") return of_predicates<Operation>;
  return pick(Unsigned{}, type, [](auto t) -> Handler {
    using T = decltype(t);
    return run_two<Operation, T, T, T>;
  });
}
template <typename Operation>
Handler shift(const std::string& type) {
  return pick(Integers{}, type, [](auto t) -> Handler {
    using T = decltype(t);
    return run_two<Operation, T, T, std::uint32_t>;
  });
}
using Wide = Types<std::uint32_t, std::uint64_t>;
template <typename Operation>
Handler count(const std::string& type) {
  return pick(Wide{}, type, [](auto t) -> Handler { return run_one<Operation, std::uint32_t, decltype(t)>; });
}

Found find_one_part(const std::string& name, const std::string& type, int bytes) {
  Form form{.run = nullptr, .widths = {bytes, bytes, bytes}};
  if (name == "and") form.run = logic<And>(type);
  if (name == "or") form.run = logic<Or>(type);
  if (name == "xor") form.run = logic<Xor>(type);
  if (form.run) return form;
  form.widths = {bytes, bytes};
  if (name == "not" && bytes == 0) form.run = not_predicate;
  if (name == "not" && bytes != 0)
    form.run =
        pick(Unsigned{}, type, [](auto t) -> Handler { return run_one<Not, decltype(t), decltype(t)>; });
  if (name == "brev")
    form.run =
        pick(Wide{}, type, [](auto t) -> Handler { return run_one<Reverse, decltype(t), decltype(t)>; });
  if (form.run) return form;
  form.widths = {4, bytes};
  if (name == "popc") form.run = count<CountBits>(type);
  if (name == "clz") form.run = count<LeadingZeros>(type);
  if (name == "bfind")
    form.run = pick(Types<std::uint32_t, std::uint64_t, std::int32_t, std::int64_t>{}, type,
                    [](auto t) -> Handler { return run_one<FindHighest, std::uint32_t, decltype(t)>; });
  if (form.run) return form;
  form.widths = {bytes, bytes, 4};
  if (name == "shl") form.run = shift<ShiftLeft>(type);
  if (name == "shr") form.run = shift<ShiftRight>(type);
  if (form.run) return form;
  if (name == "bfe") {
    form.widths = {bytes, bytes, 4, 4};
    form.run =
        pick(Types<std::uint32_t, std::uint64_t, std::int32_t, std::int64_t>{}, type, [](auto t) -> Handler {
          using T = decltype(t);
          return run_three<ExtractField, T, T, std::uint32_t, std::uint32_t>;
        });
  }
  if (name == "bfi") {
    form.widths = {bytes, bytes, bytes, 4, 4};
    form.run = pick(Wide{}, type, [](auto t) -> Handler { return insert_field<decltype(t)>; });
  }
  if (form.run) return form;
  return {};
}

}  // namespace

Found find_bits(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  using W = std::uint32_t;
  if (opcode.text == "prmt.b32") return Form{.run = run_three<Permute, W, W, W, W>, .widths = {4, 4, 4, 4}};
  if (opcode.text == "lop3.b32") return Form{.run = look_up_three, .widths = {4, 4, 4, 4, 4}};
  if (opcode.name == "shf" && opcode.type() == "b32") {
    Form form{.run = nullptr, .widths = {4, 4, 4, 4}};
    if (opcode.text == "shf.l.wrap.b32") form.run = run_three<Funnel<true, true>, W, W, W, W>;
    if (opcode.text == "shf.r.wrap.b32") form.run = run_three<Funnel<false, true>, W, W, W, W>;
    if (opcode.text == "shf.l.clamp.b32") form.run = run_three<Funnel<true, false>, W, W, W, W>;
    if (opcode.text == "shf.r.clamp.b32") form.run = run_three<Funnel<false, false>, W, W, W, W>;
    if (form.run) return form;
  }
  if (opcode.parts.size() != 1) return {};
  return find_one_part(opcode.name, opcode.type(), bytes_of(opcode.type()));
}

}  // namespace ptx
