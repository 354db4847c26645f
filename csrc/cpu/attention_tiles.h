// How the attention network's work is cut into tiles, and a tile of an image batch as the rows of a matrix product.
//
// A tile is some pixels of one sample, or some whole samples. Rows are pixels and columns channels: planar images are
// transposed as they are read and written.
#pragma once

#include "../kernels.h"
#include "common.h"

namespace sparta {
namespace SPARTA_ISA {

struct Tiles {
  AttentionShape shape;
  int64_t per_sample;  // tiles in a sample
  int64_t pixels;      // of a sample in a tile
  int64_t samples;     // in a tile
  int64_t count;

  explicit Tiles(const AttentionShape& s) : shape(s) {
    // The result of the first product, h1 and h3 in float32, takes up to 128 kB (for up to 512 hidden channels): it fits
    // in L2 beside the matrices. Fewer rows where there would be too few tiles for many cores.
    int64_t rows = max(32, min(128, 16384 / s.hidden));
    while (rows > 32 && s.samples * s.pixels < 32 * rows) rows /= 2;
    per_sample = ceil_div(s.pixels, rows);
    pixels = ceil_div(s.pixels, per_sample);
    samples = max(1, rows / s.pixels);
    count = ceil_div(s.samples, samples) * per_sample;
  }
  int64_t rows() const { return samples * pixels; }
};

struct Tile {
  int64_t sample, samples;
  int64_t first_pixel, pixels;  // of each sample
  int64_t rows;
  int64_t row;  // the first, among those of the batch

  Tile(const Tiles& tiles, int64_t index) {
    const AttentionShape& s = tiles.shape;
    sample = index / tiles.per_sample * tiles.samples;
    samples = min(tiles.samples, s.samples - sample);
    first_pixel = index % tiles.per_sample * tiles.pixels;
    pixels = min(tiles.pixels, s.pixels - first_pixel);
    rows = samples * pixels;
    row = sample * s.pixels + first_pixel;
  }
  template <class T>
  T* start(const Matrices& m, int64_t of_sample, bool planar) const {
    return static_cast<T*>(m.data) + (sample + of_sample) * m.sample_stride + first_pixel * (planar ? 1 : m.row_stride);
  }
};

// Prefetches a tile's rows a few cache lines at a time, between other work, so that memory is not idle while products
// are computed. For channels_last, where the rows of all samples follow each other.
struct Prefetch {
  const char* first = nullptr;
  int64_t stride = 0, lines = 0;  // bytes between rows; cache lines in a row

  Prefetch() = default;
  template <class T>
  Prefetch(const T* at, int64_t row_stride, int64_t channels)
      : first(reinterpret_cast<const char*>(at)), stride(row_stride * int64_t{sizeof(T)}),
        lines(ceil_div(channels * int64_t{sizeof(T)}, 64)) {}
  // Part `part` of `parts` of a row.
  SPARTA_INLINE void fetch(int64_t row, int64_t part, int64_t parts) const {
    for (int64_t line = part; line < lines; line += parts) __builtin_prefetch(first + row * stride + line * 64, 0, 2);
  }
};

SPARTA_INLINE bool rows_follow_each_other(const Matrices& m, const Tiles& tiles) {
  const AttentionShape& s = tiles.shape;
  return !s.planar && (tiles.samples == 1 || s.samples == 1 || m.sample_stride == s.pixels * m.row_stride);
}

// ---- images as rows of pixels ----------------------------------------------------------------------------

// The first (or second) halves of a and b, lane by lane in turn.
template <int half>
SPARTA_INLINE FloatVector interleave(FloatVector a, FloatVector b) {
  IntVector from;
  for (int i = 0; i < kFloatLanes; ++i) from[i] = half * kFloatLanes / 2 + i / 2 + i % 2 * kFloatLanes;
#if defined(__clang__)
  FloatVector result;
  for (int i = 0; i < kFloatLanes; ++i) result[i] = i % 2 == 0 ? a[from[i]] : b[from[i] - kFloatLanes];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Each round moves one bit of an element's row number into its column number.
template <int round = 1>
SPARTA_INLINE void transpose(FloatVector* square) {
  if constexpr (round < kFloatLanes) {
    FloatVector next[kFloatLanes];
    for (int i = 0; i < kFloatLanes / 2; ++i) {
      next[2 * i] = interleave<0>(square[i], square[i + kFloatLanes / 2]);
      next[2 * i + 1] = interleave<1>(square[i], square[i + kFloatLanes / 2]);
    }
    for (int i = 0; i < kFloatLanes; ++i) square[i] = next[i];
    transpose<round * 2>(square);
  }
}
SPARTA_INLINE void transpose(double*) {}

// Transposes `rows` x `columns` elements in squares: load(row, first column, count) returns a register of columns, and
// store(column, first row, register of rows, count) takes one of rows.
template <class Vector, int lanes, class Load, class Store>
SPARTA_INLINE void transposed(int64_t rows, int64_t columns, Load load, Store store) {
  for (int64_t r = 0; r < rows; r += lanes)
    for (int64_t c = 0; c < columns; c += lanes) {
      const int64_t high = min(lanes, rows - r), wide = min(lanes, columns - c);
      Vector square[lanes];
      for (int64_t i = 0; i < high; ++i) square[i] = load(r + i, c, wide);
      for (int64_t i = high; i < lanes; ++i) square[i] = Vector{};
      transpose(square);
      for (int64_t i = 0; i < wide; ++i) store(c + i, r, square[i], high);
    }
}

// x += skip, rounded to T. The tile is then in the cache for the product that reads it next.
template <class T>
void add_skip(const AttentionForward& args, const Tile& tile) {
  using Lanes = Simd<T>;
  const bool planar = args.shape.planar;
  const int64_t rows = planar ? args.shape.channels : tile.pixels, columns = planar ? tile.pixels : args.shape.channels;
  for (int64_t n = 0; n < tile.samples; ++n)
    for (int64_t r = 0; r < rows; ++r) {
      T* x = tile.start<T>(args.x, n, planar) + r * args.x.row_stride;
      const T* skip = tile.start<const T>(args.skip, n, planar) + r * args.skip.row_stride;
      for (int64_t k = 0; k < columns; k += Lanes::lanes) {
        const int64_t count = min(Lanes::lanes, columns - k);
        prefetch_read(x + k);
        prefetch_read(skip + k);
        store_partial(x + k, load_partial(x + k, count) + load_partial(skip + k, count), count);
      }
    }
}

// Copies a tile of x for a product: its rows in the products' type, `width` elements apart, filled up with zeros.
template <class T, class G>
void gather(const AttentionForward& args, const Tile& tile, int64_t width, G* to) {
  using Lanes = Simd<T>;
  const int64_t channels = args.shape.channels, stride = args.x.row_stride;
  for (int64_t n = 0; n < tile.samples; ++n, to += tile.pixels * width) {
    const T* x = tile.start<const T>(args.x, n, args.shape.planar);
    if (args.shape.planar) {
      transposed<typename Lanes::Vector, Lanes::lanes>(
          channels, tile.pixels,
          [&](int64_t c, int64_t p, int64_t count) { return load_partial(x + c * stride + p, count); },
          [&](int64_t p, int64_t c, auto value, int64_t count) { store_partial(to + p * width + c, value, count); });
    } else {
      for (int64_t p = 0; p < tile.pixels; ++p)
        for (int64_t c = 0; c < channels; c += Lanes::lanes) {
          const int64_t count = min(Lanes::lanes, channels - c);
          store_partial(to + p * width + c, load_partial(x + p * stride + c, count), count);
        }
    }
    for (int64_t c = channels; c < width; ++c)
      for (int64_t p = 0; p < tile.pixels; ++p) to[p * width + c] = G{};
  }
}

// gx += the result of a product, whose rows are `width` elements apart.
template <class T, class Acc>
void scatter(const AttentionBackward& args, const Tile& tile, int64_t width, const Acc* from) {
  using Lanes = Simd<T>;
  const int64_t channels = args.shape.channels, stride = args.gx.row_stride;
  const auto add = [](T* to, auto value, int64_t count) { store_partial(to, load_partial(to, count) + value, count); };
  for (int64_t n = 0; n < tile.samples; ++n, from += tile.pixels * width) {
    T* gx = tile.start<T>(args.gx, n, args.shape.planar);
    if (args.shape.planar) {
      transposed<typename Lanes::Vector, Lanes::lanes>(
          tile.pixels, channels,
          [&](int64_t p, int64_t c, int64_t) { return Simd<Acc>::load(from + p * width + c); },
          [&](int64_t c, int64_t p, auto value, int64_t count) { add(gx + c * stride + p, value, count); });
    } else {
      for (int64_t p = 0; p < tile.pixels; ++p)
        for (int64_t c = 0; c < channels; c += Lanes::lanes)
          add(gx + p * stride + c, Simd<Acc>::load(from + p * width + c), min(Lanes::lanes, channels - c));
    }
  }
}

}  // namespace SPARTA_ISA
}  // namespace sparta
