// PTX's text, line by line: nvcc writes a statement to a line, and inline assembly several.
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <sstream>

#include "program.h"

namespace ptx {

namespace {

[[noreturn]] void refuse(const std::string& what, std::uint32_t line) {
  throw Fault("PTX line " + std::to_string(line) + ": not understood: " + what);
}

std::string trim(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\r");
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

// Splits at `at`, but not within braces or brackets.
std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> found(1);
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == at && depth == 0) {
      found.emplace_back();
    } else {
      found.back() += c;
    }
  }
  for (std::string& part : found) part = trim(part);
  return found;
}

std::uint32_t bytes_of_type(const std::string& type) {
  if (type == "pred") return 0;
  const int bits = std::atoi(type.c_str() + type.find_first_of("0123456789"));
  return static_cast<std::uint32_t>(bits / 8);
}

// The names of a scope's own registers, which may be those of another: each scope gives them its number.
class Scopes {
 public:
  void open() { open_.push_back({++number_, {}}); }
  void close() { open_.pop_back(); }
  std::string declare(const std::string& name) {
    open_.back().names.push_back(name);
    return rename(name, open_.back().number);
  }
  std::string find(const std::string& name) const {
    for (auto scope = open_.rbegin(); scope != open_.rend(); ++scope)
      for (const std::string& own : scope->names)
        if (own == name) return rename(name, scope->number);
    return name;
  }
  std::size_t depth() const { return open_.size(); }

 private:
  struct Scope {
    int number;
    std::vector<std::string> names;
  };
  static std::string rename(const std::string& name, int number) {
    return number == 1 ? name : name + "#" + std::to_string(number);
  }
  std::vector<Scope> open_;
  int number_ = 0;
};

class Reader {
 public:
  explicit Reader(const std::string& text) : lines_(text) {}

  ModuleText read() {
    for (std::string line; next(line);) read_line(line);
    if (entry_) refuse("an entry that does not end", number_);
    return std::move(module_);
  }

 private:
  std::istringstream lines_;
  std::uint32_t number_ = 0;
  ModuleText module_;
  EntryText* entry_ = nullptr;
  Scopes scopes_;
  Place place_;

  bool next(std::string& line) {
    if (!std::getline(lines_, line)) return false;
    ++number_;
    if (const auto comment = line.find("//"); comment != std::string::npos && line.find('"') > comment)
      line.resize(comment);
    line = trim(line);
    return true;
  }

  void read_line(const std::string& line) {
    if (line.empty() || starts(line, ".version") || starts(line, ".target") ||
        starts(line, ".address_size") || starts(line, ".minnctapersm"))
      return;
    if (starts(line, ".file")) return read_file(line);
    if (starts(line, ".section")) return skip_section();
    if (starts(line, ".loc ") || starts(line, ".loc\t")) return read_place(line);
    if (line.find(".entry ") != std::string::npos) return read_entry(line);
    if (starts(line, ".maxntid")) {
      entry_->most_threads = static_cast<std::uint32_t>(std::atoi(line.c_str() + 8));
      return;
    }
    if (entry_) return read_body(line);
    if (line.find(".shared ") != std::string::npos) return read_shared(line);
    if (starts(line, ".global ") || starts(line, ".const ")) return read_table(line);
    refuse(line, number_);
  }

  void read_file(const std::string& line) {
    const auto quote = line.find('"');
    module_.files[static_cast<std::uint32_t>(std::atoi(line.c_str() + 5))] =
        line.substr(quote + 1, line.rfind('"') - quote - 1);
  }

  void skip_section() {
    for (std::string line; next(line);)
      if (line == "}") return;
  }

  void read_place(const std::string& line) {
    std::istringstream words(line.substr(4));
    words >> place_.file >> place_.line;
  }

  void read_entry(const std::string& line) {
    module_.entries.emplace_back();
    entry_ = &module_.entries.back();
    const auto begin = line.find(".entry ") + 7;
    entry_->name = line.substr(begin, line.find('(') - begin);
    const std::string text = demangle(entry_->name);
    const auto from = text.find("run_kernel<"), to = text.find(">(", from);
    if (from == std::string::npos || to == std::string::npos)
      refuse("a kernel that is no run_kernel", number_);
    entry_->functor = trim(text.substr(from + 11, to - from - 11));
    for (std::string of; next(of) && of != ")";) {
      const auto open = of.find('[');
      if (!entry_->parameter.empty() || open == std::string::npos)
        refuse("other arguments than one functor", number_);
      entry_->parameter = of.substr(of.rfind(' ', open) + 1, open - of.rfind(' ', open) - 1);
      entry_->parameter_bytes = static_cast<std::uint32_t>(std::atoi(of.c_str() + open + 1));
    }
  }

  void read_shared(const std::string& line) {
    const auto begin = line.rfind(' ') + 1;
    if (!starts(line, ".extern") || line.find("[]") == std::string::npos)
      refuse("shared memory that is not the dynamic piece: " + line, number_);
    module_.shared.push_back(line.substr(begin, line.find('[', begin) - begin));
  }

  void read_table(const std::string& line) {
    const auto open = line.find('['), values = line.find('{');
    const auto name = line.rfind(' ', open) + 1;
    if (line.find(" .b8 ") == std::string::npos || values == std::string::npos)
      refuse("a table that is not of bytes", number_);
    Table table;
    table.name = line.substr(name, open - name);
    table.bytes = static_cast<std::size_t>(std::atoi(line.c_str() + open + 1));
    table.storage.assign(table.bytes + 64, 0);
    const auto skew = reinterpret_cast<std::uintptr_t>(table.storage.data()) % 64;
    table.begin = table.storage.data() + (64 - skew);
    std::istringstream numbers(line.substr(values + 1));
    std::size_t i = 0;
    for (std::string one; std::getline(numbers, one, ',') && i < table.bytes;)
      table.begin[i++] = static_cast<std::uint8_t>(std::atoi(one.c_str()));
    module_.tables.push_back(std::move(table));
  }

  // Braces open and close scopes, but for those behind an opcode, which hold a vector.
  void read_body(const std::string& line) {
    std::string rest = line;
    while (!(rest = trim(rest)).empty()) {
      if (rest[0] == '{') {
        scopes_.open();
        rest.erase(0, 1);
      } else if (rest[0] == '}') {
        scopes_.close();
        rest.erase(0, 1);
        if (scopes_.depth() == 0) entry_ = nullptr;
      } else if (const auto colon = rest.find(':'); starts(rest, "$") && colon != std::string::npos) {
        entry_->labels[rest.substr(0, colon)] = static_cast<std::uint32_t>(entry_->statements.size());
        rest.erase(0, colon + 1);
      } else {
        const auto end = rest.find(';');
        if (end == std::string::npos) refuse(rest, number_);
        read_statement(trim(rest.substr(0, end)));
        rest.erase(0, end + 1);
      }
    }
  }

  void read_statement(const std::string& text) {
    if (text.empty() || starts(text, ".pragma")) return;
    if (starts(text, ".reg")) return declare(text.substr(4));
    if (starts(text, ".local")) return declare_local(text);
    if (text[0] == '.') refuse(text, number_);
    Statement found;
    found.text = text;
    found.line = number_;
    found.place = place_;
    std::string rest = text;
    if (rest[0] == '@') {
      const auto end = rest.find_first_of(" \t");
      found.guard = read_term(rest.substr(1, end - 1));
      rest = trim(rest.substr(end));
    }
    const auto end = std::min(rest.find_first_of(" \t"), rest.size());
    found.opcode.text = rest.substr(0, end);
    const auto parts = split(found.opcode.text, '.');
    found.opcode.name = parts[0];
    found.opcode.parts.assign(parts.begin() + 1, parts.end());
    if (rest = trim(rest.substr(end)); !rest.empty())
      for (const std::string& term : split(rest, ',')) found.terms.push_back(read_term(term));
    entry_->statements.push_back(std::move(found));
  }

  // .reg .b32 %r<1047>, or .reg .u16 half
  void declare(const std::string& text) {
    const std::string rest = trim(text);
    const auto end = rest.find_first_of(" \t");
    const std::uint32_t bytes = bytes_of_type(rest.substr(1, end - 1));
    for (const std::string& name : split(rest.substr(end), ',')) {
      const auto open = name.find('<');
      if (open == std::string::npos) {
        entry_->registers[scopes_.declare(name)] = bytes;
        continue;
      }
      const int count = std::atoi(name.c_str() + open + 1);
      for (int i = 0; i < count; ++i) entry_->registers[name.substr(0, open) + std::to_string(i)] = bytes;
    }
  }

  // .local .align 16 .b8 __local_depot1[144]
  void declare_local(const std::string& text) {
    const auto open = text.find('['), name = text.find_last_of(" \t", open) + 1;
    entry_->local_bytes = (entry_->local_bytes + 15) / 16 * 16;
    entry_->locals[text.substr(name, open - name)] = entry_->local_bytes;
    entry_->local_bytes += static_cast<std::uint32_t>(std::atoi(text.c_str() + open + 1));
  }

  Term read_term(const std::string& text) {
    Term term;
    if (text.empty()) refuse("an operand that is missing", number_);
    if (text[0] == '!') {
      term = read_term(text.substr(1));
      term.negated = true;
    } else if (text[0] == '{') {
      term.kind = Term::Kind::kVector;
      for (const std::string& one : split(text.substr(1, text.size() - 2), ','))
        term.members.push_back(read_term(one));
    } else if (text[0] == '[') {
      term = read_address(text.substr(1, text.size() - 2));
    } else if (text.find('|') != std::string::npos) {
      term.kind = Term::Kind::kVector;
      for (const std::string& one : split(text, '|')) term.members.push_back(read_term(one));
    } else if (const std::string own = scopes_.find(text); entry_->registers.contains(own)) {
      term.kind = Term::Kind::kRegister;
      term.name = own;
    } else if (text[0] == '%') {
      term.kind = Term::Kind::kSpecial;
      term.name = text;
    } else if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
      term.kind = Term::Kind::kNumber;
      term.number = read_number(text);
    } else if (text != "_") {
      term.kind = Term::Kind::kSymbol;
      term.name = text;
    }
    return term;
  }

  Term read_address(const std::string& text) {
    Term term;
    term.kind = Term::Kind::kAddress;
    const auto plus = text.find('+');
    const std::string base = trim(text.substr(0, plus));
    if (plus != std::string::npos) term.number = read_number(trim(text.substr(plus + 1)));
    if (const Term of = read_term(base); of.kind == Term::Kind::kNumber) {
      term.number += of.number;
    } else {
      term.name = of.name;
    }
    return term;
  }

  std::uint64_t read_number(const std::string& text) {
    char* end = nullptr;
    const bool floating = starts(text, "0f") || starts(text, "0d");
    const std::uint64_t found = floating ? std::strtoull(text.c_str() + 2, &end, 16)
                                : text[0] == '-'
                                    ? static_cast<std::uint64_t>(std::strtoll(text.c_str(), &end, 0))
                                    : std::strtoull(text.c_str(), &end, 0);
    if (*end != 0 && std::strcmp(end, "U") != 0) refuse("the number " + text, number_);
    return found;
  }
};

}  // namespace

bool Opcode::has(std::string_view part) const {
  for (const std::string& own : parts)
    if (own == part) return true;
  return false;
}

std::string Opcode::type(std::size_t from_the_end) const {
  return from_the_end < parts.size() ? parts[parts.size() - 1 - from_the_end] : "";
}

std::string demangle(const std::string& symbol) {
  int status = 0;
  char* found = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string text = status == 0 ? found : symbol;
  std::free(found);
  return text;
}

ModuleText read_module(const std::string& text) { return Reader(text).read(); }

}  // namespace ptx
