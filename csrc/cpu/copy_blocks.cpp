#include "copy_blocks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvs {
namespace {

// Makes axes that follow each other on both sides one axis; those that are dense on both sides become the
// item.
std::size_t merge(std::vector<CopyAxis>& axes, std::size_t item) {
  std::erase_if(axes, [](const CopyAxis& axis) { return axis.count == 1; });
  std::stable_sort(axes.begin(), axes.end(), [](const CopyAxis& left, const CopyAxis& right) {
    return std::abs(left.to) > std::abs(right.to);
  });
  for (std::size_t at = axes.size(); at-- > 1;) {
    CopyAxis& outer = axes[at - 1];
    const CopyAxis& inner = axes[at];
    if (outer.to == inner.count * inner.to && outer.from == inner.count * inner.from) {
      outer = {outer.count * inner.count, inner.to, inner.from};
      axes.erase(axes.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  const auto width = static_cast<std::int64_t>(item);
  if (!axes.empty() && axes.back().to == width && axes.back().from == width) {
    item *= static_cast<std::size_t>(axes.back().count);
    axes.pop_back();
  }
  return item;
}

// A square of numbers, transposed in registers. `to` and `from` are steps from row to row, in bytes.
template <std::size_t kBytes>
struct Square {
  static constexpr std::int64_t kSide = 0;  // no such squares: one number after the other
  static void transpose(std::byte*, std::int64_t, const std::byte*, std::int64_t) {}
};

#if defined(__SSE2__)
__m128i load(const std::byte* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
void store(std::byte* to, __m128i value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value); }

template <>
struct Square<1> {
  static constexpr std::int64_t kSide = 8;
  static void transpose(std::byte* to, std::int64_t to_step, const std::byte* from, std::int64_t from_step) {
    __m128i in[8], pairs[4], fours[4];
    for (int i = 0; i < 8; ++i)
      in[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i * from_step));
    for (int i = 0; i < 4; ++i) pairs[i] = _mm_unpacklo_epi8(in[2 * i], in[2 * i + 1]);
    for (int i = 0; i < 2; ++i) {
      fours[2 * i] = _mm_unpacklo_epi16(pairs[2 * i], pairs[2 * i + 1]);
      fours[2 * i + 1] = _mm_unpackhi_epi16(pairs[2 * i], pairs[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      const __m128i rows[2] = {_mm_unpacklo_epi32(fours[i], fours[2 + i]),
                               _mm_unpackhi_epi32(fours[i], fours[2 + i])};
      for (int half = 0; half < 2; ++half) {
        std::byte* at = to + (4 * i + 2 * half) * to_step;
        _mm_storel_epi64(reinterpret_cast<__m128i*>(at), rows[half]);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(at + to_step),
                         _mm_unpackhi_epi64(rows[half], rows[half]));
      }
    }
  }
};

template <>
struct Square<2> {
  static constexpr std::int64_t kSide = 8;
  static void transpose(std::byte* to, std::int64_t to_step, const std::byte* from, std::int64_t from_step) {
    __m128i in[8], pairs[8], fours[8];
    for (int i = 0; i < 8; ++i) in[i] = load(from + i * from_step);
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = _mm_unpacklo_epi16(in[2 * i], in[2 * i + 1]);
      pairs[2 * i + 1] = _mm_unpackhi_epi16(in[2 * i], in[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      fours[4 * i] = _mm_unpacklo_epi32(pairs[4 * i], pairs[4 * i + 2]);
      fours[4 * i + 1] = _mm_unpackhi_epi32(pairs[4 * i], pairs[4 * i + 2]);
      fours[4 * i + 2] = _mm_unpacklo_epi32(pairs[4 * i + 1], pairs[4 * i + 3]);
      fours[4 * i + 3] = _mm_unpackhi_epi32(pairs[4 * i + 1], pairs[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      store(to + 2 * i * to_step, _mm_unpacklo_epi64(fours[i], fours[4 + i]));
      store(to + (2 * i + 1) * to_step, _mm_unpackhi_epi64(fours[i], fours[4 + i]));
    }
  }
};

template <>
struct Square<4> {
  static constexpr std::int64_t kSide = 4;
  static void transpose(std::byte* to, std::int64_t to_step, const std::byte* from, std::int64_t from_step) {
    __m128i in[4], pairs[4];
    for (int i = 0; i < 4; ++i) in[i] = load(from + i * from_step);
    for (int i = 0; i < 2; ++i) {
      pairs[2 * i] = _mm_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
      pairs[2 * i + 1] = _mm_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      store(to + 2 * i * to_step, _mm_unpacklo_epi64(pairs[i], pairs[2 + i]));
      store(to + (2 * i + 1) * to_step, _mm_unpackhi_epi64(pairs[i], pairs[2 + i]));
    }
  }
};
#endif

template <typename Number>
void copy_rest(std::byte* to, const std::byte* from, const CopyAxis& rows, const CopyAxis& columns,
               std::int64_t row_begin, std::int64_t column_begin, std::int64_t row_end,
               std::int64_t column_end) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t column = column_begin; column < column_end; ++column) {
      std::memcpy(to + row * rows.to + column * columns.to, from + row * rows.from + column * columns.from,
                  sizeof(Number));
    }
  }
}

// Columns are dense in `to`, rows in `from`: squares, and what is left beside and below them.
template <typename Number>
void transpose(std::byte* to, const std::byte* from, const CopyAxis& rows, const CopyAxis& columns) {
  using Unit = Square<sizeof(Number)>;
  std::int64_t row_end = 0, column_end = 0;
  if constexpr (Unit::kSide > 0) {
    row_end = rows.count / Unit::kSide * Unit::kSide;
    column_end = columns.count / Unit::kSide * Unit::kSide;
    for (std::int64_t row = 0; row < row_end; row += Unit::kSide) {
      for (std::int64_t column = 0; column < column_end; column += Unit::kSide) {
        Unit::transpose(to + row * rows.to + column * columns.to, rows.to,
                        from + row * rows.from + column * columns.from, columns.from);
      }
    }
    if (column_end == 0) row_end = 0;
  }
  copy_rest<Number>(to, from, rows, columns, 0, column_end, row_end, columns.count);
  copy_rest<Number>(to, from, rows, columns, row_end, 0, rows.count, columns.count);
}

// kWays rows become one in which their numbers take turns: columns of kWays numbers follow each other in
// `to`.
template <typename Number, std::int64_t kWays>
void interleave(std::byte* to, const std::byte* from, std::int64_t count, std::int64_t from_step) {
  for (std::int64_t at = 0; at < count; ++at) {
    for (std::int64_t way = 0; way < kWays; ++way) {
      std::memcpy(to + (at * kWays + way) * sizeof(Number), from + way * from_step + at * sizeof(Number),
                  sizeof(Number));
    }
  }
}

template <typename Number, std::int64_t kWays>
void separate(std::byte* to, const std::byte* from, std::int64_t count, std::int64_t to_step) {
  for (std::int64_t at = 0; at < count; ++at) {
    for (std::int64_t way = 0; way < kWays; ++way) {
      std::memcpy(to + way * to_step + at * sizeof(Number), from + (at * kWays + way) * sizeof(Number),
                  sizeof(Number));
    }
  }
}

template <typename Number>
void copy_tile(std::byte* to, const std::byte* from, const CopyAxis& rows, const CopyAxis& columns) {
  constexpr std::int64_t kWidth = sizeof(Number);
  if (columns.to != kWidth || rows.from != kWidth) {
    copy_rest<Number>(to, from, rows, columns, 0, 0, rows.count, columns.count);
  } else if (columns.count == 2 && rows.to == 2 * kWidth) {
    interleave<Number, 2>(to, from, rows.count, columns.from);
  } else if (columns.count == 4 && rows.to == 4 * kWidth) {
    interleave<Number, 4>(to, from, rows.count, columns.from);
  } else if (rows.count == 2 && columns.from == 2 * kWidth) {
    separate<Number, 2>(to, from, columns.count, rows.to);
  } else if (rows.count == 4 && columns.from == 4 * kWidth) {
    separate<Number, 4>(to, from, columns.count, rows.to);
  } else {
    transpose<Number>(to, from, rows, columns);
  }
}

}  // namespace

BlockCopy::BlockCopy(std::vector<CopyAxis> axes, std::size_t item_bytes) {
  nothing_ = std::any_of(axes.begin(), axes.end(), [](const CopyAxis& axis) { return axis.count < 1; });
  item_ = merge(axes, item_bytes);
  const auto take = [&](auto step) {
    if (axes.empty()) return CopyAxis{1, 0, 0};
    const auto least =
        std::min_element(axes.begin(), axes.end(), [&](const CopyAxis& left, const CopyAxis& right) {
          return std::abs(left.*step) < std::abs(right.*step);
        });
    const CopyAxis found = *least;
    axes.erase(least);
    return found;
  };
  columns_ = take(&CopyAxis::to);
  rows_ = take(&CopyAxis::from);
  outer_ = std::move(axes);
}

void BlockCopy::run(std::byte* to, const std::byte* from) const {
  if (nothing_) return;
  std::vector<std::int64_t> at(outer_.size());
  for (;;) {
    tile(to, from);
    std::size_t axis = outer_.size();
    for (; axis > 0; --axis) {
      const CopyAxis& step = outer_[axis - 1];
      if (++at[axis - 1] < step.count) {
        to += step.to;
        from += step.from;
        break;
      }
      at[axis - 1] = 0;
      to -= (step.count - 1) * step.to;
      from -= (step.count - 1) * step.from;
    }
    if (axis == 0) return;
  }
}

void BlockCopy::tile(std::byte* to, const std::byte* from) const {
  switch (item_) {
    case 1:
      return copy_tile<std::uint8_t>(to, from, rows_, columns_);
    case 2:
      return copy_tile<std::uint16_t>(to, from, rows_, columns_);
    case 4:
      return copy_tile<std::uint32_t>(to, from, rows_, columns_);
    case 8:
      return copy_tile<std::uint64_t>(to, from, rows_, columns_);
    default:
      break;
  }
  for (std::int64_t row = 0; row < rows_.count; ++row) {
    for (std::int64_t column = 0; column < columns_.count; ++column) {
      std::memcpy(to + row * rows_.to + column * columns_.to,
                  from + row * rows_.from + column * columns_.from, item_);
    }
  }
}

}  // namespace kvs
