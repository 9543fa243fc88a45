// Small kernels with one mistake each, and the same without it: what the detector must find, and what it must
// not.
#include "../../../csrc/cuda/api.h"
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/scalable_tensor.h"

namespace kvs {
namespace {

enum class Mistake : std::uint32_t {
  kNoSyncWarp,      // lanes read what others wrote
  kVoteForSync,     // and take a ballot for a barrier
  kOverwritten,     // lanes overwrite what others still read
  kNoSyncBlock,     // warps read what others wrote, and meet but their own lanes
  kBlocksShare,     // two blocks write the same byte
  kEarlyCopy,       // lanes read what a copy of another is about to bring
  kPlainAndAtomic,  // lanes count, one of them not as the others do
  kCount
};

// One kernel for all: `to` is a word of device memory for each thread.
struct MistakenKernel {
  static constexpr std::uint32_t kThreads = 64;
  static constexpr std::uint32_t kSharedBytes = 16 * kThreads;

  Mistake mistake;
  bool mended;
  std::uint32_t* to;

  KVS_DEVICE void operator()() const {
    auto* words = reinterpret_cast<std::uint32_t*>(simt::shared_memory());
    const std::uint32_t thread = simt::thread(), neighbour = thread ^ 1;
    std::uint32_t* own = to + simt::block() * simt::threads() + thread;
    switch (mistake) {
      case Mistake::kNoSyncWarp:
      case Mistake::kVoteForSync:
        words[thread] = thread;
        if (mistake == Mistake::kVoteForSync) simt::ballot(true);
        if (mended) simt::sync_warp();
        *own = words[neighbour];
        break;
      case Mistake::kOverwritten:
        words[thread] = thread;
        simt::sync_warp();
        *own = words[neighbour];
        if (mended) simt::sync_warp();
        words[thread] = 7;
        break;
      case Mistake::kNoSyncBlock:
        words[thread] = thread;
        if (mended) {
          simt::sync_block();
        } else {
          simt::sync_warp();
        }
        *own = words[thread ^ 32];
        break;
      case Mistake::kBlocksShare:
        if (thread == 0) to[mended ? simt::block() : 0] = simt::block();
        break;
      case Mistake::kEarlyCopy:
        copy_later(shared_address() + 16 * thread, to + 4 * simt::kWarp, true);
        end_batch();
        if (mended) wait_for_batches<0>();
        simt::sync_block();
        *own = words[4 * neighbour];
        wait_for_batches<0>();
        break;
      default:
        if (thread == 0) words[0] = 0;
        simt::sync_block();
        if (mended || thread != 5) {
          simt::atomic_add(words, 1);
        } else {
          ++words[0];
        }
    }
  }
};

}  // namespace
}  // namespace kvs

// `to`: 128 words, of which the copies read. Answers how many mistakes there are.
extern "C" KVS_EXPORT std::uint32_t kvs_races_make_mistake(std::uint32_t which, int mended,
                                                           std::uint32_t* to) {
  using namespace kvs;
  const MistakenKernel kernel{static_cast<Mistake>(which), mended != 0, to};
  if (kernel.mistake < Mistake::kCount)
    launch(kernel, 2, MistakenKernel::kThreads, MistakenKernel::kSharedBytes, nullptr);
  return static_cast<std::uint32_t>(Mistake::kCount);
}
