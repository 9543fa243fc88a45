// Makes statements executable: finds each one's handler, and gives registers and numbers their places.
#include <algorithm>

#include "forms.h"

namespace ptx {

namespace {

constexpr Found (*kFamilies[])(const Statement&) = {find_integer, find_bits,       find_float,
                                                    find_choice,  find_conversion, find_memory,
                                                    find_atomic,  find_collective, find_matrix};

class Binder {
 public:
  Binder(const ModuleText& module, const EntryText& text) : module_(module), text_(text) {
    entry_.text = &text;
    for (const auto& [name, bytes] : text.registers) registers_[name] = add_register(bytes);
  }

  Entry run() {
    for (const Statement& statement : text_.statements) {
      statement_ = &statement;
      entry_.code.push_back(bind_one());
    }
    return std::move(entry_);
  }

 private:
  const ModuleText& module_;
  const EntryText& text_;
  Entry entry_;
  const Statement* statement_ = nullptr;
  std::map<std::string, Operand> registers_;
  std::map<std::pair<std::uint32_t, std::uint64_t>, Operand> constants_;

  [[noreturn]] void refuse(const std::string& what) const {
    throw Fault("PTX line " + std::to_string(statement_->line) + ": " + what + ": " + statement_->text);
  }

  Operand add_register(std::uint32_t bytes) {
    const std::uint32_t align = std::max(bytes, 1u) * (bytes ? kWarp : 4);
    const std::uint32_t at = (entry_.register_bytes + 63) / 64 * 64;
    entry_.register_bytes = at + align;
    return {at, entry_.register_count++, static_cast<std::uint8_t>(bytes)};
  }

  Operand constant(std::uint32_t bytes, std::uint64_t bits) {
    const auto [found, added] = constants_.try_emplace({bytes, bits});
    if (added) {
      found->second = add_register(bytes);
      entry_.constants.push_back({found->second, bits});
    }
    return found->second;
  }

  std::uint64_t address_of(const std::string& name) const {
    if (const auto local = text_.locals.find(name); local != text_.locals.end()) return local->second;
    if (name == text_.parameter) return 0;
    for (const std::string& shared : module_.shared)
      if (name == shared) return kSharedBegin;
    for (const Table& table : module_.tables)
      if (name == table.name) return reinterpret_cast<std::uint64_t>(table.begin);
    refuse("no such symbol as " + name);
  }

  std::uint32_t find_label(const std::string& name) const {
    const auto found = text_.labels.find(name);
    if (found == text_.labels.end()) refuse("no such label");
    return found->second;
  }

  Instruction bind_one() {
    Instruction found;
    if (statement_->guard.kind == Term::Kind::kRegister) {
      found.guarded = true;
      found.guard_negated = statement_->guard.negated;
      found.guard = registers_.at(statement_->guard.name);
    }
    const Opcode& opcode = statement_->opcode;
    if (opcode.text == "bra" || opcode.text == "bra.uni") {
      found.way = Way::kBranch;
      found.target = find_label(statement_->terms.at(0).name);
      return found;
    }
    Found form;
    for (const auto find : kFamilies)
      if (!form) form = find(*statement_);
    if (!form) refuse("not understood");
    found.way = form->way;
    found.run = form->run;
    found.detail = form->detail;
    found.written = static_cast<std::uint8_t>(form->written);
    found.space = find_space(opcode);
    bind_operands(found, *form);
    return found;
  }

  static Space find_space(const Opcode& opcode) {
    if (opcode.has("shared")) return Space::kShared;
    if (opcode.has("global")) return Space::kGlobal;
    if (opcode.has("local")) return Space::kLocal;
    if (opcode.has("param")) return Space::kParameter;
    return Space::kGeneric;
  }

  void bind_operands(Instruction& found, const Form& form) {
    std::vector<const Term*> terms;
    for (const Term& term : statement_->terms) {
      if (term.kind != Term::Kind::kVector) terms.push_back(&term);
      for (const Term& member : term.members) terms.push_back(&member);
    }
    // What is read from a special register has no operand: the handler knows.
    std::erase_if(terms, [](const Term* term) { return term->kind == Term::Kind::kSpecial; });
    if (terms.size() != form.widths.size() || terms.size() + 1 > found.operand.size())
      refuse("not as many operands as known");
    std::size_t addresses = 0;
    for (const Term* term : terms) {
      const int width = form.widths[found.operands];
      if (term->kind == Term::Kind::kAddress) bind_offset(found, *term, addresses++);
      if (term->negated) bind_negation(found);
      found.operand[found.operands++] = bind_term(*term, width);
    }
    if (form.member >= 0) {
      found.member = static_cast<std::uint8_t>(form.member);
      if (found.member == found.operands) found.operand[found.operands++] = constant(4, kAll);
    }
  }

  void bind_offset(Instruction& found, const Term& term, std::size_t nth) const {
    if (nth == 0) found.offset = static_cast<std::int64_t>(term.number);
    if (nth == 1) found.detail = static_cast<std::uint32_t>(term.number);
    if (nth == 1 && static_cast<std::int64_t>(term.number) != static_cast<std::int32_t>(term.number))
      refuse("a long offset");
  }

  void bind_negation(Instruction& found) const {
    if (statement_->opcode.name != "vote" && statement_->opcode.name != "setp") refuse("a negation");
    found.offset = 1;
  }

  Operand bind_term(const Term& term, int width) {
    const auto bytes = static_cast<std::uint32_t>(width == kAny ? 8 : width);
    switch (term.kind) {
      case Term::Kind::kNumber:
        return constant(bytes, bytes == 0 ? term.number != 0 : cut(term.number, bytes));
      case Term::Kind::kSymbol:
        return constant(bytes, address_of(term.name));
      case Term::Kind::kNothing:
        return add_register(bytes);
      case Term::Kind::kAddress:
        if (term.name.empty()) return constant(8, 0);
        if (const auto base = registers_.find(term.name); base != registers_.end()) return base->second;
        return constant(8, address_of(term.name));
      case Term::Kind::kRegister: {
        const Operand& found = registers_.at(term.name);
        if (width == kAny ? found.bytes == 0 : found.bytes != bytes)
          refuse(term.name + " has not as many bits as known");
        return found;
      }
      default:
        refuse("an operand that is not known");
    }
  }

  static std::uint64_t cut(std::uint64_t number, std::uint32_t bytes) {
    return bytes == 8 ? number : number & ((std::uint64_t{1} << 8 * bytes) - 1);
  }
};

}  // namespace

Entry bind(const ModuleText& module, const EntryText& text) { return Binder(module, text).run(); }

}  // namespace ptx
