// PTX as nvcc writes it: the text (text.cpp), and what is executed (bind.cpp makes the one of the other).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

inline constexpr std::uint32_t kWarp = 32;
inline constexpr std::uint32_t kNowhere = 0xFFFFFFFF;

// A bit for each lane.
using Mask = std::uint32_t;
inline constexpr Mask kAll = 0xFFFFFFFF;

// What stops a run: bytes or a launch that the machine would not stand, or PTX that is not understood.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- The text.

struct Term {
  enum class Kind { kRegister, kNumber, kSymbol, kSpecial, kAddress, kVector, kNothing };
  Kind kind = Kind::kNothing;
  std::string name;           // of a register, symbol, special register, or an address's base ("": a number)
  std::uint64_t number = 0;   // of a number its bits; of an address what is added
  bool negated = false;       // !%p
  std::vector<Term> members;  // of a vector {a, b}, or of what is written a|b
};

// setp.ge.u32 is "setp", {"ge", "u32"}.
struct Opcode {
  std::string text, name;
  std::vector<std::string> parts;

  bool has(std::string_view part) const;
  std::string type(std::size_t from_the_end = 0) const;  // the last parts are types
};

// Where in the sources: the innermost .loc.
struct Place {
  std::uint32_t file = 0, line = 0;
};

struct Statement {
  std::string text;
  std::uint32_t line = 0;  // of the PTX
  Place place;
  Opcode opcode;
  std::vector<Term> terms;
  Term guard;  // kNothing: none
};

struct EntryText {
  std::string name, functor;  // as the linker has it; what launch.h's run_kernel was made for, demangled
  std::map<std::string, std::uint32_t> registers;  // bytes of each; 0 is a predicate
  std::map<std::string, std::uint32_t> labels;     // -> index of the next statement
  std::map<std::string, std::uint32_t> locals;     // -> where in a thread's memory
  std::string parameter;
  std::uint32_t parameter_bytes = 0, local_bytes = 0, most_threads = 0;
  std::vector<Statement> statements;
};

struct Table {
  std::string name;
  std::vector<std::uint8_t> storage;
  std::uint8_t* begin = nullptr;  // in `storage`, aligned
  std::size_t bytes = 0;
};

struct ModuleText {
  std::map<std::uint32_t, std::string> files;
  std::vector<Table> tables;
  std::vector<std::string> shared;  // names of the one dynamic piece
  std::vector<EntryText> entries;
};

ModuleText read_module(const std::string& text);
std::string demangle(const std::string& symbol);

// ---- What is executed.

class Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

// A register: 32 numbers of `bytes` each, side by side; of a predicate one Mask.
struct Operand {
  std::uint32_t at = 0;     // where in the warp's registers
  std::uint32_t index = 0;  // where in what is known to be defined
  std::uint8_t bytes = 0;   // 0: a predicate
};

enum class Space : std::uint8_t { kGeneric, kGlobal, kShared, kLocal, kParameter };

enum class Way : std::uint8_t {
  kPlain,
  kCopy,  // hands on what is undefined
  kBranch,
  kReturn,
  kMeetWarp,
  kMeetBlock
};

struct Instruction {
  Way way = Way::kPlain;
  Handler run = nullptr;
  std::uint8_t written = 0, operands = 0;  // the first `written` of them
  Space space = Space::kGeneric;
  bool guarded = false, guard_negated = false, read_only = false;
  std::uint8_t member = 0;  // of a kMeetWarp: which operand says who takes part
  std::uint32_t target = kNowhere;
  Operand guard;
  std::array<Operand, 16> operand;
  std::int64_t offset = 0;   // of an address, or whatever number the handler wants
  std::uint32_t detail = 0;  // likewise
  mutable std::size_t region = 0;
  mutable std::uint64_t executed = 0;
};

struct Constant {
  Operand operand;
  std::uint64_t bits;
};

struct Entry {
  const EntryText* text = nullptr;
  std::vector<Instruction> code;
  std::vector<Constant> constants;
  std::uint32_t register_bytes = 0, register_count = 0;
};

// Where shared memory begins; not 0, as on most GPUs: 1,024 bytes are the system's.
inline constexpr std::uint64_t kSharedBegin = 1024;
// Where generic addresses mean shared and local memory.
inline constexpr std::uint64_t kSharedWindow = 0xF1ull << 56, kLocalWindow = 0xF2ull << 56;

Entry bind(const ModuleText& module, const EntryText& text);

}  // namespace ptx
