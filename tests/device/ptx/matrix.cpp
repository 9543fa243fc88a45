// Tensor cores: the product, and loads of its operands, with the lanes' shares as the manual draws them. Lane
// 4 g + p has, as pairs of neighbours, of a [16][16]: rows g, g + 8, g, g + 8 at columns 2 p, 2 p, 2 p + 8, 2
// p + 8; of b [16][8]: rows 2 p and 2 p + 8 of column g; of c and d [16][8]: row g, then row g + 8, at
// columns 2 p and 2 p + 1.
#include <algorithm>
#include <bit>
#include <cmath>

#include "memory.h"

namespace ptx {

namespace {

// A finite half; products of two are exact.
double number_of(std::uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const double fraction = bits & 1023;
  const double size = exponent ? std::ldexp(fraction + 1024, exponent - 25) : std::ldexp(fraction, -24);
  return bits >> 15 & 1 ? -size : size;
}

constexpr int kPowerOfZero = -1023;
int power_of(double value) {
  return static_cast<int>(std::bit_cast<std::uint64_t>(value) >> 52 & 0x7FF) - 1023;
}

double two_to(int power) { return std::bit_cast<double>(static_cast<std::uint64_t>(power + 1023) << 52); }

// Towards zero, to a multiple of 2^unit.
double cut(double value, int unit) { return std::trunc(value * two_to(-unit)) * two_to(unit); }

// The manual leaves open in which order and how exactly products are added. What is here is what was measured
// on compute capability 8.0: eight products and the sum are cut off 24 bits below the leading one of the
// largest, added, and the result is cut off to a float. Later ones keep more.
float add_products(float sum, const double (&products)[8]) {
  int largest = power_of(sum);
  for (const double product : products) largest = std::max(largest, power_of(product));
  if (largest == kPowerOfZero) return sum;
  double all = cut(sum, largest - 24);
  for (const double product : products) all += cut(product, largest - 24);
  return all == 0 ? 0.0f : static_cast<float>(cut(all, power_of(all) - 23));
}

bool is_finite(std::uint32_t half) { return (half & 0x7C00) != 0x7C00; }

void multiply(Warp& warp, const Instruction& i, Mask) {
  const auto half = [&](std::uint32_t operand, std::uint32_t lane, std::uint32_t upper) {
    const std::uint32_t bits = warp.lanes<std::uint32_t>(i.operand[operand])[lane] >> 16 * upper & 0xFFFF;
    if (!is_finite(bits)) warp.stop("a factor that is not finite: its product is not modelled", lane);
    return number_of(bits);
  };
  double a[16][16], b[8][16];
  for (std::uint32_t lane = 0; lane < kWarp; ++lane) {
    const std::uint32_t g = lane / 4, p = lane % 4;
    for (std::uint32_t k = 0; k < 8; ++k)
      a[g + k / 2 % 2 * 8][2 * p + k / 4 * 8 + k % 2] = half(4 + k / 2, lane, k % 2);
    for (std::uint32_t k = 0; k < 4; ++k) b[g][2 * p + k / 2 * 8 + k % 2] = half(8 + k / 2, lane, k % 2);
  }
  float found[4][kWarp];
  for (std::uint32_t lane = 0; lane < kWarp; ++lane) {
    for (std::uint32_t k = 0; k < 4; ++k) {
      float sum = warp.lanes<float>(i.operand[10 + k])[lane];
      if (!std::isfinite(sum)) warp.stop("a sum that is not finite: its product is not modelled", lane);
      for (std::uint32_t begin = 0; begin < 16; begin += 8) {
        double products[8];
        for (std::uint32_t n = 0; n < 8; ++n)
          products[n] = a[lane / 4 + k / 2 * 8][begin + n] * b[lane % 4 * 2 + k % 2][begin + n];
        sum = add_products(sum, products);
      }
      found[k][lane] = sum;
    }
  }
  for (std::uint32_t k = 0; k < 4; ++k)
    std::memcpy(warp.lanes<float>(i.operand[k]), found[k], sizeof found[k]);
}

// Four matrices [8][8] of 16 bits: lane l says where row l % 8 of matrix l / 8 lies; lane 4 g + p gets of
// each the elements g of rows 2 p and 2 p + 1 (transposed), or elements 2 p and 2 p + 1 of row g.
template <bool kTransposed>
void load_matrices(Warp& warp, const Instruction& i, Mask) {
  std::uint16_t rows[kWarp][8];
  for (std::uint32_t lane = 0; lane < kWarp; ++lane) {
    const auto address =
        static_cast<std::uint32_t>(warp.get(i.operand[4], lane) + static_cast<std::uint64_t>(i.offset));
    std::memcpy(rows[lane], find_shared(warp, lane, address, 16), 16);
  }
  for (std::uint32_t lane = 0; lane < kWarp; ++lane) {
    const std::uint32_t g = lane / 4, p = lane % 4;
    for (std::uint32_t of = 0; of < 4; ++of) {
      const std::uint32_t first = kTransposed ? rows[8 * of + 2 * p][g] : rows[8 * of + g][2 * p];
      const std::uint32_t second = kTransposed ? rows[8 * of + 2 * p + 1][g] : rows[8 * of + g][2 * p + 1];
      warp.set(i.operand[of], lane, first | second << 16);
    }
  }
}

}  // namespace

Found find_matrix(const Statement& statement) {
  const std::string& text = statement.opcode.text;
  Form form{.run = nullptr, .written = 4, .widths = {}, .way = Way::kMeetWarp};
  if (text == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
    form.run = multiply, form.widths.assign(14, 4);
  if (text == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
    form.run = load_matrices<true>, form.widths.assign(5, 4);
  if (text == "ldmatrix.sync.aligned.m8n8.x4.shared.b16")
    form.run = load_matrices<false>, form.widths.assign(5, 4);
  form.member = static_cast<int>(form.widths.size());
  if (form.run) return form;
  return {};
}

}  // namespace ptx
