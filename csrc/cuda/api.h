// The C interface of the GPU code. Two libraries have it: the one that nvcc builds, and its emulation on the
// host (emulator.h), where every pointer is the host's, `stream` is ignored, and a call has ended when it
// returns.
//
// On a GPU all calls are queued on `stream` (a cudaStream_t) and return at once; none of them synchronises,
// allocates or reads device memory on the host. "device" marks pointers that kernels follow. A call answers
// 0, or a cudaError_t.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define KVS_EXPORT __declspec(dllexport)
#else
#define KVS_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

// Where values lie: value (layer, kind, token, head, dim) is at
//   planes[2 * layer + kind] + block_table[token / block_tokens] * block_stride
//     + token % block_tokens * token_stride + head * head_stride + dim,
// in elements. Engines' pages are this with their block table; a plain tensor is this with block_table null,
// where `token` is multiplied by token_stride as it is. `dim` is contiguous, at least 2 bytes aligned.
struct KvsPages {
  const std::uint64_t* planes;       // device, [layers][2]: addresses of layer's K and V
  const std::uint32_t* block_table;  // device, or null
  std::uint32_t block_tokens;
  std::uint32_t dim;
  std::int64_t block_stride, token_stride, head_stride;
};

// One head's stream of a section in codec 1 (docs/format-lossless.md), whose mode byte the kernel reads.
struct KvsLosslessJob {
  std::uint64_t stream;       // device address, at least 2 bytes aligned
  std::uint32_t length;       // bytes, as the payload's table of lengths says
  std::uint32_t tokens;       // of the section
  std::uint32_t token_begin;  // where the section's first token lies in the pages
  std::uint32_t layer_begin;  // in the pages
  std::uint16_t layers;       // of the section
  std::uint8_t kind_begin;    // 0: K, 1: V
  std::uint8_t kinds;         // 1 or 2
  std::uint32_t head;         // in the pages
};

// Decodes bf16 heads into pages. `faults` [count] gets a kvs::Fault for each job, 0 where it is good; where
// it is not, the job's places in the pages are undefined, and nothing outside of them was touched. Whatever
// the bytes.
KVS_EXPORT int kvs_lossless_decode(const KvsLosslessJob* jobs /* device */, std::uint32_t count,
                                   const KvsPages* pages, std::uint32_t* faults /* device */, void* stream);

// One head of a section to encode in codec 1. The jobs of a section are neighbours, head by head; the first
// of them is the first stream of the payload. Where the values lie is said as in KvsLosslessJob.
struct KvsLosslessEncodeJob {
  std::uint64_t
      payload;  // device address, at least 2 bytes aligned: the section's, with room for
                // heads * (8 + 2 * layers * kinds * dim * tokens) bytes; the same in all of its jobs
  std::uint64_t
      scratch;  // device address, 16 bytes aligned: kvs_lossless_encode_scratch bytes for this job alone
  std::uint32_t tokens, token_begin, layer_begin;
  std::uint32_t head;          // in the pages
  std::uint32_t heads, index;  // of the section: how many, and which of them this is
  std::uint16_t layers;
  std::uint8_t kind_begin, kinds;
  std::uint32_t reserved;  // 0
};

// Bytes of scratch for a head of layers * kinds * dim components: what its values take, 2 for each component,
// and at most 208 more. Host.
KVS_EXPORT std::uint64_t kvs_lossless_encode_scratch(std::uint64_t components, std::uint64_t tokens);

// Encodes bf16 heads from pages: the bytes of the host's encoder. `lengths` [count] gets the bytes of each
// job's stream; a section's payload is 4 * heads bytes and its streams. Heads of 2^31 bytes or more are the
// caller's to refuse.
KVS_EXPORT int kvs_lossless_encode(const KvsLosslessEncodeJob* jobs /* device */, std::uint32_t count,
                                   const KvsPages* pages, std::uint32_t* lengths /* device */, void* stream);

// Lets calls from now on take no more blocks than `most` multiprocessors hold at once, so that an engine
// keeps the others; 0: all that there are. For the whole process, from any thread.
KVS_EXPORT int kvs_limit_multiprocessors(std::uint32_t most);

// Whether kernels can run on the current device: 0, or the cudaError_t that says why not (35: the driver is
// older than the CUDA runtime that is linked in, 209: there is no code for this GPU). It loads all of them,
// which may wait for what the device does, and launches none.
KVS_EXPORT int kvs_probe(void);

// How many kernels that are.
KVS_EXPORT std::uint32_t kvs_count_kernels(void);

}  // extern "C"

#include "scalable_api.h"
