// Comparisons, choices and moves.
#include "forms.h"

namespace ptx {

namespace {

struct Equal {
  template <typename T>
  static bool of(T a, T b) {
    return a == b;
  }
};
struct Less {
  template <typename T>
  static bool of(T a, T b) {
    return a < b;
  }
};
struct LessOrEqual {
  template <typename T>
  static bool of(T a, T b) {
    return a <= b;
  }
};
struct Greater {
  template <typename T>
  static bool of(T a, T b) {
    return a > b;
  }
};
struct GreaterOrEqual {
  template <typename T>
  static bool of(T a, T b) {
    return a >= b;
  }
};
struct LessOrGreater {
  template <typename T>
  static bool of(T a, T b) {
    return a < b || a > b;
  }
};
struct Ordered {
  template <typename T>
  static bool of(T a, T b) {
    return a == a && b == b;
  }
};
// True where the opposite is false: for floats also where one is not a number.
template <typename Opposite>
struct Not {
  template <typename T>
  static bool of(T a, T b) {
    return !Opposite::of(a, b);
  }
};

enum Boolean : std::uint32_t { kNone, kAnd, kOr, kXor };

Mask combine(std::uint32_t how, Mask a, Mask b) {
  switch (how) {
    case kAnd:
      return a & b;
    case kOr:
      return a | b;
    case kXor:
      return a ^ b;
    default:
      return a;
  }
}

// detail: how the comparison and a further predicate are combined, and 16 times the predicates that are
// written.
template <typename T, typename Compare>
void compare(Warp& warp, const Instruction& i, Mask mask) {
  const std::uint32_t how = i.detail & 15, written = i.detail / 16;
  const T *a = warp.lanes<T>(i.operand[written]), *b = warp.lanes<T>(i.operand[written + 1]);
  std::uint32_t yes[kWarp];
#pragma GCC ivdep
  for (std::uint32_t l = 0; l < kWarp; ++l) yes[l] = Compare::of(a[l], b[l]) ? 1u << l : 0;
  Mask found = 0;
  for (std::uint32_t l = 0; l < kWarp; ++l) found |= yes[l];
  Mask further = 0;
  if (how != kNone) {
    further = warp.predicate(i.operand[written + 2]);
    if (i.offset) further = ~further;
  }
  Mask& to = warp.predicate(i.operand[0]);
  const Mask opposite = combine(how, ~found, further);
  to = (to & ~mask) | (combine(how, found, further) & mask);
  if (written == 2) {
    Mask& second = warp.predicate(i.operand[1]);
    second = (second & ~mask) | (opposite & mask);
  }
}

template <typename Compare, typename List>
Handler of_type(List list, const std::string& type) {
  return pick(list, type, [](auto t) -> Handler { return compare<decltype(t), Compare>; });
}

Handler find_comparison(const std::string& how, const std::string& type) {
  const bool bits = type[0] == 'b';
  if (how == "eq") return of_type<Equal>(Numbers{}, type);
  if (type[0] == 'f') {
    if (how == "ne") return of_type<LessOrGreater>(Floats{}, type);
    if (how == "num") return of_type<Ordered>(Floats{}, type);
    if (how == "nan") return of_type<Not<Ordered>>(Floats{}, type);
    if (how == "equ") return of_type<Not<LessOrGreater>>(Floats{}, type);
    if (how == "neu") return of_type<Not<Equal>>(Floats{}, type);
    if (how == "ltu") return of_type<Not<GreaterOrEqual>>(Floats{}, type);
    if (how == "leu") return of_type<Not<Greater>>(Floats{}, type);
    if (how == "gtu") return of_type<Not<LessOrEqual>>(Floats{}, type);
    if (how == "geu") return of_type<Not<Less>>(Floats{}, type);
  } else if (how == "ne") {
    return of_type<Not<Equal>>(Numbers{}, type);
  }
  if (bits) return nullptr;
  const bool is_unsigned = type[0] == 'u';
  if (how == "lt" || (is_unsigned && how == "lo")) return of_type<Less>(Numbers{}, type);
  if (how == "le" || (is_unsigned && how == "ls")) return of_type<LessOrEqual>(Numbers{}, type);
  if (how == "gt" || (is_unsigned && how == "hi")) return of_type<Greater>(Numbers{}, type);
  if (how == "ge" || (is_unsigned && how == "hs")) return of_type<GreaterOrEqual>(Numbers{}, type);
  return nullptr;
}

Found find_setp(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  const std::size_t parts = opcode.parts.size();
  const bool two = !statement.terms.empty() && statement.terms[0].kind == Term::Kind::kVector;
  if (parts < 2 || parts > 3) return {};
  std::uint32_t how = kNone;
  if (parts == 3) {
    const std::string& boolean = opcode.parts[1];
    how = boolean == "and" ? kAnd : boolean == "or" ? kOr : boolean == "xor" ? kXor : kNone;
    if (how == kNone) return {};
  }
  const int bytes = bytes_of(opcode.type());
  Form form{.run = find_comparison(opcode.parts[0], opcode.type()), .written = two ? 2 : 1, .widths = {0}};
  if (two) form.widths.push_back(0);
  form.widths.insert(form.widths.end(), {bytes, bytes});
  if (how != kNone) form.widths.push_back(0);
  form.detail = how + 16 * (two ? 2 : 1);
  if (form.run == nullptr) return {};
  return form;
}

// The chosen one may be undefined, then so is the result; the other one may be anything.
template <typename T>
void select(Warp& warp, const Instruction& i, Mask mask) {
  const Mask missing = mask & ~warp.defined(i.operand[3]);
  if (missing)
    warp.stop("its predicate was never written", static_cast<std::uint32_t>(__builtin_ctz(missing)));
  const Mask first = warp.predicate(i.operand[3]);
  const Mask defined = (warp.defined(i.operand[1]) & first) | (warp.defined(i.operand[2]) & ~first);
  const T *a = warp.lanes<T>(i.operand[1]), *b = warp.lanes<T>(i.operand[2]);
  fill<T>(warp, i.operand[0], mask, [=](std::uint32_t l) { return first >> l & 1 ? a[l] : b[l]; });
  Mask& to = warp.defined(i.operand[0]);
  to = (to & ~mask) | (defined & mask);
}

template <typename T>
void copy(Warp& warp, const Instruction& i, Mask mask) {
  const T* from = warp.lanes<T>(i.operand[1]);
  fill<T>(warp, i.operand[0], mask, [=](std::uint32_t l) { return from[l]; });
  Mask& to = warp.defined(i.operand[0]);
  to = (to & ~mask) | (warp.defined(i.operand[1]) & mask);
}
void copy_predicate(Warp& warp, const Instruction& i, Mask mask) {
  Mask& to = warp.predicate(i.operand[0]);
  to = (to & ~mask) | (warp.predicate(i.operand[1]) & mask);
  Mask& defined = warp.defined(i.operand[0]);
  defined = (defined & ~mask) | (warp.defined(i.operand[1]) & mask);
}

// Several into one, or one into several; the first has the lowest bits.
void repack(Warp& warp, const Instruction& i, Mask mask) {
  for (; mask; mask &= mask - 1) {
    const auto lane = static_cast<std::uint32_t>(__builtin_ctz(mask));
    std::uint64_t bits = 0;
    std::uint32_t at = 0;
    for (std::uint32_t k = i.written; k < i.operands; at += 8 * i.operand[k++].bytes)
      bits |= warp.get(i.operand[k], lane) << at;
    at = 0;
    for (std::uint32_t k = 0; k < i.written; at += 8 * i.operand[k++].bytes)
      warp.set(i.operand[k], lane, bits >> at);
  }
}

enum Special : std::uint32_t { kThread, kThreads, kBlock, kBlocks, kLane, kZero, kOne, kLanesBefore };

void read_special(Warp& warp, const Instruction& i, Mask mask) {
  const Launch& launch = warp.block().launch();
  const std::uint32_t first = warp.thread(0), block = warp.block().number();
  fill<std::uint32_t>(warp, i.operand[0], mask, [&](std::uint32_t l) {
    switch (i.detail) {
      case kThread:
        return first + l;
      case kThreads:
        return launch.threads;
      case kBlock:
        return block;
      case kBlocks:
        return launch.blocks;
      case kLane:
        return l;
      case kLanesBefore:
        return (1u << l) - 1;
      default:
        return i.detail == kOne ? 1u : 0u;
    }
  });
}

Found find_special(const std::string& name) {
  constexpr std::pair<const char*, Special> kNames[] = {
      {"%tid.x", kThread},    {"%tid.y", kZero},
      {"%tid.z", kZero},      {"%ntid.x", kThreads},
      {"%ntid.y", kOne},      {"%ntid.z", kOne},
      {"%ctaid.x", kBlock},   {"%ctaid.y", kZero},
      {"%ctaid.z", kZero},    {"%laneid", kLane},
      {"%nctaid.x", kBlocks}, {"%nctaid.y", kOne},
      {"%nctaid.z", kOne},    {"%lanemask_lt", kLanesBefore}};
  for (const auto& [own, special] : kNames)
    if (name == own) return Form{.run = read_special, .widths = {4}, .detail = special};
  return {};
}

Found find_mov(const Statement& statement) {
  if (statement.opcode.parts.size() != 1 || statement.terms.size() != 2) return {};
  const std::string type = statement.opcode.type();
  const int bytes = bytes_of(type);
  const Term &to = statement.terms[0], &from = statement.terms[1];
  if (from.kind == Term::Kind::kSpecial) return find_special(from.name);
  if (to.kind == Term::Kind::kVector || from.kind == Term::Kind::kVector) {
    const auto count = [](const Term& term) { return std::max<std::size_t>(1, term.members.size()); };
    Form form{.run = repack, .written = static_cast<int>(count(to)), .widths = {}};
    form.widths.assign(count(to), bytes / static_cast<int>(count(to)));
    form.widths.insert(form.widths.end(), count(from), bytes / static_cast<int>(count(from)));
    return form;
  }
  Form form{.run = nullptr, .widths = {bytes, bytes}, .way = Way::kCopy};
  if (bytes == 0) form.run = copy_predicate;
  if (bytes == 2) form.run = copy<std::uint16_t>;
  if (bytes == 4) form.run = copy<std::uint32_t>;
  if (bytes == 8) form.run = copy<std::uint64_t>;
  return form;
}

Found find_selp(const Statement& statement) {
  const int bytes = bytes_of(statement.opcode.type());
  Form form{.run = nullptr, .widths = {bytes, bytes, bytes, 0}, .way = Way::kCopy};
  if (bytes == 2) form.run = select<std::uint16_t>;
  if (bytes == 4) form.run = select<std::uint32_t>;
  if (bytes == 8) form.run = select<std::uint64_t>;
  return form;
}

}  // namespace

Found find_choice(const Statement& statement) {
  const Opcode& opcode = statement.opcode;
  if (opcode.name == "setp") return find_setp(statement);
  if (opcode.name == "mov") return find_mov(statement);
  if (opcode.name == "selp" && opcode.parts.size() == 1) return find_selp(statement);
  return {};
}

}  // namespace ptx
