// The limit that decoding is held against: one byte a value times its component's scale, as bf16 into paged
// blocks. Sixteen values a thread, loads and stores of 16 bytes; nothing else.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace {

constexpr std::uint32_t kValues = 16;

__device__ std::uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(both);
}

// packed [planes][tokens][row], scales [planes][row], out [planes][blocks][block_tokens][row].
__global__ void scatter(const std::int8_t* packed, const float* scales, std::uint16_t* out,
                        const std::uint32_t* table, std::uint32_t planes, std::uint32_t tokens,
                        std::uint32_t row, std::uint32_t block_tokens) {
  const std::uint32_t parts = row / kValues;
  const std::uint64_t total = std::uint64_t{planes} * tokens * parts;
  const std::uint64_t step = std::uint64_t{gridDim.x} * blockDim.x;
  for (std::uint64_t i = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const std::uint32_t part = i % parts;
    const std::uint32_t token = i / parts % tokens;
    const std::uint64_t plane = i / parts / tokens;
    const std::uint64_t place =
        plane * tokens + std::uint64_t{table[token / block_tokens]} * block_tokens + token % block_tokens;
    const int4 read = *reinterpret_cast<const int4*>(packed + i * kValues);
    const auto* bytes = reinterpret_cast<const std::int8_t*>(&read);
    const auto* scale = reinterpret_cast<const float4*>(scales + plane * row + part * kValues);
    uint4 written[2];
    auto* words = reinterpret_cast<std::uint32_t*>(written);
#pragma unroll
    for (std::uint32_t j = 0; j < kValues / 4; ++j) {
      const float4 four = scale[j];
      words[2 * j] = pack(bytes[4 * j] * four.x, bytes[4 * j + 1] * four.y);
      words[2 * j + 1] = pack(bytes[4 * j + 2] * four.z, bytes[4 * j + 3] * four.w);
    }
    auto* to = reinterpret_cast<uint4*>(out + place * row + part * kValues);
    to[0] = written[0];
    to[1] = written[1];
  }
}

}  // namespace

// Answers 0 or a cudaError_t. `row` is a multiple of 16.
extern "C" int scatter_plain(const void* packed, const void* scales, void* out, const void* table,
                             std::uint32_t planes, std::uint32_t tokens, std::uint32_t row,
                             std::uint32_t block_tokens, void* stream) {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  scatter<<<processors * 8, 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const std::int8_t*>(packed), static_cast<const float*>(scales),
      static_cast<std::uint16_t*>(out), static_cast<const std::uint32_t*>(table), planes, tokens, row,
      block_tokens);
  return cudaGetLastError();
}
