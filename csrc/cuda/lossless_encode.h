// What the encode kernels share: a head's sizes, its scratch, and the way from pages to tiles of values.
#pragma once

#include "launch.h"
#include "pages.h"
#include "simt.h"
#include "sizes.h"

namespace kvs {

inline constexpr std::uint32_t kTileTokens = 8;

// A head's components are [layer][K or V][dim]; block b has those from 32 b on, one to a lane.
struct HeadSize {
  std::uint64_t components, tokens;

  KVS_HOST_DEVICE static HeadSize of(const KvsLosslessEncodeJob& job, std::uint32_t dim) {
    return {static_cast<std::uint64_t>(job.layers) * job.kinds * dim, job.tokens};
  }
  KVS_HOST_DEVICE std::uint32_t blocks() const {
    return static_cast<std::uint32_t>((components + kLanes - 1) / kLanes);
  }
  KVS_HOST_DEVICE std::uint32_t lanes(std::uint32_t block) const {
    const std::uint64_t left = components - static_cast<std::uint64_t>(block) * kLanes;
    return static_cast<std::uint32_t>(left < kLanes ? left : kLanes);
  }
  KVS_HOST_DEVICE std::uint32_t row_bytes(std::uint32_t block) const {
    return (lanes(block) * kLowBits + 7) / 8;
  }
  // Of all blocks before `block`: of the head where it is their number.
  KVS_HOST_DEVICE std::uint64_t row_bytes_before(std::uint32_t block) const {
    if (block < blocks()) return block * tokens * (kLanes * kLowBits / 8);
    return tokens * ((block - 1ull) * (kLanes * kLowBits / 8) + row_bytes(block - 1));
  }
  KVS_HOST_DEVICE std::uint64_t raw_bytes() const { return kRawHeader + 2 * components * tokens; }
};

// What the coding of a head came to.
struct EncodedHead {
  std::uint32_t words, escapes;
  std::uint32_t top_min, top_bits;
  std::uint32_t raw;  // 1: the coded stream would not be shorter
};

// Offsets in a coded stream, as the format lays it out.
struct EncodedParts {
  std::uint64_t words, rows, classes, escapes, escapes_end, end;

  KVS_HOST_DEVICE static EncodedParts of(const HeadSize& size, const EncodedHead& coded) {
    EncodedParts parts{};
    parts.words = kCodedHeader + 4 * size.lanes(0);
    parts.rows = parts.words + 2ull * coded.words;
    parts.classes = parts.rows + size.row_bytes_before(size.blocks());
    parts.escapes = parts.classes + (size.components * (kClassBits + coded.top_bits) + 7) / 8;
    parts.escapes_end = parts.escapes + coded.escapes;
    parts.end = round_up(parts.escapes_end, 4);
    return parts;
  }
};

// Offsets in a head's scratch. Words and escapes share what raw values would take less the rows: words are
// written from its end down, as the decoder reads them, escapes from its front up, so the other way round.
//
// Where both together are longer, they run into each other, and words into the rows: the stream is not
// shorter than raw then, and nothing of it is read. They never leave the scratch: words are at most 2 bytes a
// value, rows and what is shared together no fewer; escapes are at most 1, and what is shared no less.
struct HeadScratch {
  static constexpr std::uint64_t kStates = 32;  // after the EncodedHead
  static constexpr std::uint64_t kClasses = kStates + 4 * kLanes;

  std::uint64_t rows, shared, end;

  KVS_HOST_DEVICE static HeadScratch of(const HeadSize& size) {
    const std::uint64_t row_bytes = size.row_bytes_before(size.blocks());
    HeadScratch scratch{};
    scratch.rows = round_up(kClasses + 2 * size.components, 16);
    scratch.shared = scratch.rows + round_up(row_bytes, 16);
    scratch.end = scratch.shared + round_up(2 * size.components * size.tokens - row_bytes, 16);
    return scratch;
  }
};
static_assert(sizeof(EncodedHead) <= HeadScratch::kStates);

KVS_DEVICE std::uint8_t* scratch_of(const KvsLosslessEncodeJob& job) {
  return reinterpret_cast<std::uint8_t*>(job.scratch);
}

KVS_DEVICE std::uint16_t* classes_of(const KvsLosslessEncodeJob& job) {
  return reinterpret_cast<std::uint16_t*>(scratch_of(job) + HeadScratch::kClasses);
}

struct alignas(16) SixteenBytes {
  std::uint32_t part[4];
};

KVS_DEVICE std::int64_t token_offset(const KvsPages& pages, std::uint32_t token) {
  return find_token_run(pages, token, token + 1).offset;
}

KVS_DEVICE const std::uint16_t* find_component(const KvsPages& pages, const KvsLosslessEncodeJob& job,
                                               std::uint64_t component) {
  const auto plane = static_cast<std::uint32_t>(component / pages.dim);
  const std::uint32_t layer = job.layer_begin + plane / job.kinds;
  const std::uint32_t kind = job.kind_begin + plane % job.kinds;
  return find_head<const std::uint16_t>(pages, layer, kind, job.head) + component % pages.dim;
}

// The values of one block of components, [token][lane], tile by tile of eight tokens.
//
// Where eight neighbouring components lie in 16 aligned bytes, a lane loads those of one token: an
// instruction of the warp loads 8 x 64 bytes, in whole sectors. Where they do not, each lane loads its own
// component's eight values, two bytes at a time. Either way a lane holds 16 bytes, so that the next tile is
// on its way while this one is worked on; to the lanes that want it, it goes through 512 bytes of shared
// memory.
class BlockValues {
 public:
  static constexpr std::uint32_t kTileBytes = 2 * kTileTokens * kLanes;

  KVS_DEVICE BlockValues(const KvsPages& pages, const KvsLosslessEncodeJob& job, std::uint32_t block)
      : pages_(pages), token_begin_(job.token_begin), tokens_(job.tokens) {
    const HeadSize size = HeadSize::of(job, pages.dim);
    const std::uint64_t first = static_cast<std::uint64_t>(block) * kLanes;
    const std::uint64_t own = first + simt::lane(), eight = first + simt::lane() % 4 * 8;
    own_ = own < size.components ? find_component(pages, job, own) : nullptr;
    loaded_ = eight < size.components ? find_component(pages, job, eight) : nullptr;
    const std::int64_t strides =
        pages.head_stride | pages.token_stride | (pages.block_table ? pages.block_stride : 0);
    const bool aligned =
        pages.dim % 8 == 0 && strides % 8 == 0 && reinterpret_cast<std::uintptr_t>(loaded_) % 16 == 0;
    wide_ = simt::ballot(aligned) == 0xFFFFFFFFu;
    if (!wide_) loaded_ = own_;
  }

  // Loads tokens `first` to `first` + 7; those that are not there are 0.
  KVS_DEVICE void fetch(std::uint32_t first) {
    held_ = {};
    if (!loaded_) return;
    if (wide_) {
      const std::uint32_t token = first + simt::lane() / 4;
      if (token < tokens_) held_ = *reinterpret_cast<const SixteenBytes*>(loaded_ + offset(token));
    } else {
      KVS_UNROLL for (std::uint32_t i = 0; i < kTileTokens; ++i) {
        if (first + i < tokens_) held_.part[i / 2] |= loaded_[offset(first + i)] << 16 * (i % 2);
      }
    }
  }

  // Writes what was fetched to `tile`, [8 tokens][32 lanes]. sync_warp before and after.
  KVS_DEVICE void put(std::uint16_t* tile) const {
    if (wide_) {
      reinterpret_cast<SixteenBytes*>(tile)[simt::lane()] = held_;
    } else {
      KVS_UNROLL for (std::uint32_t i = 0; i < kTileTokens; ++i) {
        tile[i * kLanes + simt::lane()] = static_cast<std::uint16_t>(held_.part[i / 2] >> 16 * (i % 2));
      }
    }
  }

  // One value of the lane's component, which must be there.
  KVS_DEVICE std::uint32_t at(std::uint32_t token) const { return own_[offset(token)]; }

 private:
  KVS_DEVICE std::int64_t offset(std::uint32_t token) const {
    return token_offset(pages_, token_begin_ + token);
  }

  const KvsPages& pages_;
  std::uint32_t token_begin_, tokens_;
  const std::uint16_t* own_;     // the lane's component at offset 0; null where there is none
  const std::uint16_t* loaded_;  // what the lane loads: that, or eight components if `wide_`
  bool wide_;
  SixteenBytes held_{};
};

}  // namespace kvs
