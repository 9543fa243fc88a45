// Finds data races between the threads of an emulated kernel: two accesses to the same byte by different
// threads, one of which writes, that no sync_warp or sync_block orders (csrc/cuda/emulator_races.h has the
// model).
//
// The kernels are compiled with -fsanitize=thread, whose calls before each access end here instead of in a
// runtime for threads of a CPU: that one knows neither barriers of warps nor that a vote orders nothing, and
// keeps four accesses of a word, while a warp has 32. Here nothing is forgotten: what is kept of a byte's
// readers stands for all of them that a later write could race with.
//
// One host thread at a time is watched.
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "../../../csrc/cuda/emulator_races.h"

namespace kvs::emulator::races {

namespace {

const Moment* watched = nullptr;

// Who made accesses: one thread, several lanes of a warp, several warps of a block, several blocks; and when,
// counted in meetings of its block and its warp. In one word, 0 for nobody, for there is one for every byte.
struct Stamp {
  enum Who : std::uint64_t { kNobody, kThread, kWarp, kBlock, kBlocks };

  std::uint64_t bits = 0;

  static Stamp of(const Moment& now) {
    if (now.block >> 13 != 0 || now.of_block >> 14 != 0 || now.of_warp >> 24 != 0 || now.thread >> 10 != 0) {
      std::fputs("race detector: a launch is larger than it can count\n", stderr);
      std::abort();
    }
    return {std::uint64_t{kThread} << 61 | std::uint64_t{now.block} << 48 |
            std::uint64_t{now.of_block} << 34 | std::uint64_t{now.of_warp} << 10 | now.thread};
  }

  Who who() const { return static_cast<Who>(bits >> 61); }
  std::uint32_t block() const { return bits >> 48 & 0x1FFF; }
  std::uint32_t of_block() const { return bits >> 34 & 0x3FFF; }
  std::uint32_t of_warp() const { return bits >> 10 & 0xFFFFFF; }
  std::uint32_t thread() const { return bits & 0x3FF; }
  std::uint32_t warp() const { return thread() / 32; }

  // Whether all that this stands for came before what one thread does `now`.
  bool is_before(Stamp now) const {
    if (who() == kNobody) return true;
    if (who() == kBlocks || block() != now.block()) return false;
    if (of_block() != now.of_block()) return of_block() < now.of_block();
    if (who() == kBlock || warp() != now.warp()) return false;
    if (of_warp() != now.of_warp()) return of_warp() < now.of_warp();
    return who() == kThread && thread() == now.thread();
  }

  // Takes in one more thread. Who came before it need not be kept: whoever races with them races with it.
  void add(Stamp now) {
    if (is_before(now)) {
      *this = now;
    } else if (who() == kBlocks || block() != now.block()) {
      widen(kBlocks);
    } else if (who() == kBlock || warp() != now.warp()) {
      widen(kBlock);
    } else {
      widen(kWarp);
    }
  }

 private:
  void widen(std::uint64_t to) { bits = (bits & ~std::uint64_t{0} >> 3) | to << 61; }
};

enum Access : std::uint8_t { kRead, kWrite, kAtomic };
constexpr const char* kNames[] = {"read", "write", "atomic"};

struct Cell {
  Stamp last[3];           // by Access
  std::uint32_t place[3];  // in the library's code
};

constexpr std::uintptr_t kPage = 1024;

struct Page {
  std::uint64_t launch = 0;
  std::array<Cell, kPage> cells;
};

struct Found {
  std::uint64_t times = 0;
  Stamp before, now;
};

struct Detector {
  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages;
  std::pair<std::uintptr_t, Page*> recent[64] = {};
  std::uint64_t launch = 1, accesses = 0;
  std::uintptr_t base = 0;
  bool votes_order = false;
  // Earlier access and place, later access and place.
  std::map<std::array<std::uint32_t, 4>, Found> found;

  Page& page_of(std::uintptr_t address) {
    const std::uintptr_t number = address / kPage;
    auto& [of, page] = recent[number % 64];
    if (of != number || page == nullptr) {
      auto& owned = pages[number];
      if (!owned) owned = std::make_unique<Page>();
      of = number;
      page = owned.get();
    }
    if (page->launch != launch) {
      page->cells.fill({});
      page->launch = launch;
    }
    return *page;
  }

  Cell& cell_of(std::uintptr_t address) { return page_of(address).cells[address % kPage]; }

  void report(const Cell& cell, Access before, Access now, std::uint32_t place, Stamp stamp) {
    Found& one = found[{before, cell.place[before], now, place}];
    if (one.times++ == 0) {
      one.before = cell.last[before];
      one.now = stamp;
    }
  }

  // `since`: what the access must not race with has ended then; `now` is when it is over.
  void access(std::uintptr_t address, std::size_t bytes, Access kind, std::uint32_t place, Stamp since,
              Stamp now) {
    ++accesses;
    for (std::uintptr_t at = address; at < address + bytes; ++at) {
      Cell& cell = cell_of(at);
      if (kind == kRead && cell.last[kRead].bits == now.bits && cell.last[kAtomic].bits == 0) continue;
      for (const Access other : {kRead, kWrite, kAtomic}) {
        if (other == kind && kind != kWrite) continue;
        if (!cell.last[other].is_before(since)) report(cell, other, kind, place, now);
      }
      if (kind == kWrite) cell.last[kRead] = cell.last[kAtomic] = cell.last[kWrite] = {};
      cell.last[kind].add(now);
      cell.place[kind] = place;
    }
  }
};

Detector& detector() {
  static Detector one;
  return one;
}

std::uint32_t place_of(const void* code) {
  Detector& own = detector();
  if (own.base == 0) {
    Dl_info info{};
    dladdr(code, &info);
    own.base = reinterpret_cast<std::uintptr_t>(info.dli_fbase);
  }
  return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(code) - own.base);
}

void see(const void* at, std::size_t bytes, Access kind, const void* code) {
  const Moment* now = watched;
  if (now == nullptr) return;
  const auto* octet = static_cast<const std::uint8_t*>(at);
  if (octet >= now->stack && octet < now->end) return;
  detector().access(reinterpret_cast<std::uintptr_t>(at), bytes, kind, place_of(code), Stamp::of(*now),
                    Stamp::of(*now));
}

}  // namespace

const Moment* watch(const Moment* thread) {
  const Moment* before = watched;
  watched = thread;
  return before;
}

void begin_launch() { ++detector().launch; }

void forget(const void* begin, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  for (std::size_t i = 0; i < bytes; ++i) detector().cell_of(address + i) = {};
}

void access_atomically(const void* at, std::size_t bytes) {
  see(at, bytes, kAtomic, __builtin_return_address(0));
}

void copy_since(const Moment& begun, const Moment& now, const void* to, const void* from) {
  Detector& own = detector();
  const Stamp first = Stamp::of(begun), last = Stamp::of(now);
  const std::uint32_t place = place_of(__builtin_return_address(0));
  if (from != nullptr) own.access(reinterpret_cast<std::uintptr_t>(from), 16, kRead, place, first, last);
  own.access(reinterpret_cast<std::uintptr_t>(to), 16, kWrite, place, first, last);
}

bool votes_order_memory() { return detector().votes_order; }

}  // namespace kvs::emulator::races

// What tests ask.
extern "C" {

// Forgets what was found. `votes_order`: ballots, shuffles and products are taken to order memory.
void kvs_races_begin(int votes_order) {
  kvs::emulator::races::Detector& own = kvs::emulator::races::detector();
  own.found.clear();
  own.accesses = 0;
  own.votes_order = votes_order != 0;
}

// How many accesses were looked at.
std::uint64_t kvs_races_accesses() { return kvs::emulator::races::detector().accesses; }

// Writes a line for each pair of places in the code that raced; offsets in the library, for addr2line.
// Answers how many pairs there are, whatever `bytes` hold.
std::uint64_t kvs_races_report(char* to, std::size_t bytes) {
  using namespace kvs::emulator::races;
  std::string lines;
  for (const auto& [key, one] : detector().found) {
    const char* few = one.before.who() == Stamp::kThread ? "" : "several, one of them ";
    char line[256];
    std::snprintf(line, sizeof line, "%s %x %s %x %llu %sthread %u of block %u, then thread %u of block %u\n",
                  kNames[key[0]], key[1], kNames[key[2]], key[3], static_cast<unsigned long long>(one.times),
                  few, one.before.thread(), one.before.block(), one.now.thread(), one.now.block());
    lines += line;
  }
  if (bytes != 0) {
    const std::size_t fits = lines.size() < bytes - 1 ? lines.size() : bytes - 1;
    std::memcpy(to, lines.data(), fits);
    to[fits] = 0;
  }
  return detector().found.size();
}

// The compiler's calls, named by it.
#define KVS_ACCESS(name, bytes, kind)                                                              \
  void __tsan_##name(void* at) {                                                                   \
    kvs::emulator::races::see(at, bytes, kvs::emulator::races::kind, __builtin_return_address(0)); \
  }
#define KVS_ACCESSES(bytes)                       \
  KVS_ACCESS(read##bytes, bytes, kRead)           \
  KVS_ACCESS(write##bytes, bytes, kWrite)         \
  KVS_ACCESS(unaligned_read##bytes, bytes, kRead) \
  KVS_ACCESS(unaligned_write##bytes, bytes, kWrite)
KVS_ACCESSES(1)
KVS_ACCESSES(2)
KVS_ACCESSES(4)
KVS_ACCESSES(8)
KVS_ACCESSES(16)
#undef KVS_ACCESSES
#undef KVS_ACCESS

void __tsan_read_range(void* at, unsigned long bytes) {
  kvs::emulator::races::see(at, bytes, kvs::emulator::races::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* at, unsigned long bytes) {
  kvs::emulator::races::see(at, bytes, kvs::emulator::races::kWrite, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Atomics of the host's part, and what clang makes of copies.
unsigned char __tsan_atomic8_load(const volatile unsigned char* from, int) {
  return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}
unsigned int __tsan_atomic32_load(const volatile unsigned int* from, int) {
  return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}
unsigned long __tsan_atomic64_load(const volatile unsigned long* from, int) {
  return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}
void __tsan_atomic64_store(volatile unsigned long* to, unsigned long value, int) {
  __atomic_store_n(to, value, __ATOMIC_SEQ_CST);
}
void __tsan_atomic32_store(volatile unsigned int* to, unsigned int value, int) {
  __atomic_store_n(to, value, __ATOMIC_SEQ_CST);
}
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  __tsan_write_range(to, bytes);
  return std::memset(to, value, bytes);
}

}  // extern "C"
