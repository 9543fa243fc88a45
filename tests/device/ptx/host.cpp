// What the host sees: modules that are loaded, memory that kernels may reach, launches, and what was
// executed. A fault ends the process, as one of the emulation does, unless whoever tests it asked to be told
// instead.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>

#include "machine.h"

namespace ptx {

namespace {

struct Loaded {
  Entry entry;
  const ModuleText* module;
};

struct State {
  std::mutex mutex;
  std::deque<ModuleText> modules;
  std::map<std::string, Loaded> entries;  // by functor
  Memory memory;
  Order order = Order::kLowest;
  std::uint64_t most = std::uint64_t{1} << 33;
  std::mt19937 random;
  bool tell = false;
  std::string fault, report;
};

State& state() {
  static State the_one;
  return the_one;
}

void add_region(Memory& memory, const Region& region) {
  auto& regions = memory.regions;
  const auto after =
      std::find_if(regions.begin(), regions.end(), [&](const Region& of) { return region.begin < of.begin; });
  regions.insert(after, region);
}

void report_fault(const std::string& what) {
  if (state().fault.empty()) state().fault = what;
  if (state().tell) return;
  std::fprintf(stderr, "PTX: %s\n", what.c_str());
  std::abort();
}

void run(const char* functor, const void* bytes, std::size_t size, std::uint32_t blocks,
         std::uint32_t threads, std::size_t shared_bytes) {
  State& own = state();
  const std::string name = demangle(functor);
  const auto found = own.entries.find(name);
  if (found == own.entries.end()) throw Fault("no kernel was compiled for " + name);
  const Entry& entry = found->second.entry;
  if (size != entry.text->parameter_bytes) throw Fault(name + " has another size on the device");
  if (threads % kWarp != 0 || threads == 0 || threads > entry.text->most_threads)
    throw Fault(name + " cannot have " + std::to_string(threads) + " threads in a block");
  run_launch({&entry, static_cast<const std::uint8_t*>(bytes), blocks, threads,
              static_cast<std::uint32_t>(shared_bytes), own.order, own.most},
             own.memory, own.random);
}

}  // namespace

void launch(const char* functor, const void* bytes, std::size_t size, std::uint32_t blocks,
            std::uint32_t threads, std::size_t shared_bytes) {
  const std::lock_guard lock(state().mutex);
  if (!state().fault.empty()) return;
  try {
    run(functor, bytes, size, blocks, threads, shared_bytes);
  } catch (const Fault& fault) {
    report_fault(fault.what());
  }
}

}  // namespace ptx

#define PTX_EXPORT extern "C" __attribute__((visibility("default")))

// The text of one module; its kernels take the place of others that are called so. Answers what is wrong, or
// null.
PTX_EXPORT const char* ptx_load(const char* text) {
  using namespace ptx;
  static std::string wrong;
  const std::lock_guard lock(state().mutex);
  try {
    state().modules.push_back(read_module(text));
    const ModuleText& module = state().modules.back();
    for (const Table& table : module.tables) {
      const auto begin = reinterpret_cast<std::uint64_t>(table.begin);
      add_region(state().memory, {begin, begin + table.bytes, false});
    }
    for (const EntryText& entry : module.entries)
      state().entries[entry.functor] = {bind(module, entry), &module};
  } catch (const Fault& fault) {
    wrong = fault.what();
    return wrong.c_str();
  }
  return nullptr;
}

PTX_EXPORT void ptx_add_memory(std::uint64_t begin, std::uint64_t bytes) {
  const std::lock_guard lock(ptx::state().mutex);
  ptx::add_region(ptx::state().memory, {begin, begin + bytes, true});
}

PTX_EXPORT void ptx_remove_memory(std::uint64_t begin) {
  const std::lock_guard lock(ptx::state().mutex);
  std::erase_if(ptx::state().memory.regions,
                [&](const ptx::Region& region) { return region.begin == begin; });
}

// Whether kernels may reach whatever this process has, and not only what it added.
PTX_EXPORT void ptx_allow_anything(bool allow) { ptx::state().memory.anything = allow; }

// 0: lowest first; 1: at random, from `seed` on.
PTX_EXPORT void ptx_set_order(std::uint32_t order, std::uint32_t seed) {
  ptx::state().order = static_cast<ptx::Order>(order);
  ptx::state().random.seed(seed);
}

// How many statements a launch may execute before it counts as one that does not end.
PTX_EXPORT void ptx_set_most(std::uint64_t most) { ptx::state().most = most; }

// With `tell`, a fault is kept and nothing is launched after it; the call before may have stopped in between.
PTX_EXPORT void ptx_tell_faults(bool tell) { ptx::state().tell = tell; }
PTX_EXPORT const char* ptx_fault() {
  return ptx::state().fault.empty() ? nullptr : ptx::state().fault.c_str();
}
PTX_EXPORT void ptx_forget_fault() { ptx::state().fault.clear(); }

// A kernel by its functor's name, demangled or not.
PTX_EXPORT void ptx_launch(const char* functor, const void* bytes, std::uint64_t size, std::uint32_t blocks,
                           std::uint32_t threads, std::uint64_t shared_bytes) {
  ptx::launch(functor, bytes, size, blocks, threads, shared_bytes);
}

// A line for each statement: kernel, line of the PTX, how often it ran, source file, source line, text; tabs
// between.
PTX_EXPORT const char* ptx_report() {
  using namespace ptx;
  const std::lock_guard lock(state().mutex);
  std::string& report = state().report;
  report.clear();
  for (const auto& [name, loaded] : state().entries) {
    for (std::size_t k = 0; k < loaded.entry.code.size(); ++k) {
      const Statement& statement = loaded.entry.text->statements[k];
      const auto file = loaded.module->files.find(statement.place.file);
      report += name + "\t" + std::to_string(statement.line) + "\t" +
                std::to_string(loaded.entry.code[k].executed) + "\t" +
                (file == loaded.module->files.end() ? "" : file->second) + "\t" +
                std::to_string(statement.place.line) + "\t" + statement.text + "\n";
    }
  }
  return report.c_str();
}
