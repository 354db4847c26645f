// The attention network on a CPU: its forward pass, and the gradient of its input, without a hidden tensor in memory.
//
// A tile is some pixels of a sample, or some whole samples. What the products (cpu/products.h) leave of it stays in the
// thread's own cache until it has become bits, sums over pixels, and the next product's operand: h1, h3 and h6 forward,
// their gradients G1, G3 and G6 backward. Rows are pixels and columns channels; planar images are transposed as they are
// read and written.
//
// Tiles follow from the shape alone, and where a sample has several, their sums are added in order: results are the same
// for every number of threads.
#include "../kernels.h"
#include "common.h"
#include "products.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

struct Tiles {
  AttentionShape shape;
  int64_t per_sample;  // tiles in a sample
  int64_t pixels;      // of a sample in a tile
  int64_t samples;     // in a tile
  int64_t count;

  explicit Tiles(const AttentionShape& s) : shape(s) {
    // What is read between two products, h1 and h3 in float32, takes up to 128 kB (with 512 hidden channels at most): it
    // fits in L2 beside the matrices. Fewer rows where there would be few tiles for many cores.
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

// Asks for a tile's rows a few lines at a time, between other work: memory is then read while the products are computed,
// which leave it idle. For channels_last, where the rows of all samples lie one behind the other.
struct Ahead {
  const char* first = nullptr;
  int64_t stride = 0, lines = 0;  // between rows in bytes; of 64 bytes, in a row

  Ahead() = default;
  template <class T>
  Ahead(const T* at, int64_t row_stride, int64_t channels)
      : first(reinterpret_cast<const char*>(at)), stride(row_stride * int64_t{sizeof(T)}),
        lines(ceil_div(channels * int64_t{sizeof(T)}, 64)) {}
  // Part `part` of `parts` of a row.
  SPARTA_INLINE void ask(int64_t row, int64_t part, int64_t parts) const {
    for (int64_t line = part; line < lines; line += parts) __builtin_prefetch(first + row * stride + line * 64, 0, 2);
  }
};

SPARTA_INLINE bool rows_follow_each_other(const Matrices& m, const Tiles& tiles) {
  const AttentionShape& s = tiles.shape;
  return !s.planar && (tiles.samples == 1 || s.samples == 1 || m.sample_stride == s.pixels * m.row_stride);
}

// Samples whose small products, of one row each, are computed together: as many whoever computes them.
constexpr int64_t kTogether = 16;

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

// Squares of `rows` x `columns` elements, transposed: load(row) gives a register of columns, store(column, register of
// rows, count) takes one of rows; both are given the number of elements that there are.
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

// x += skip, rounded to T. Whoever reads the tile next finds it in the cache.
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

// A tile of x as a product reads it: its rows in the products' type, `width` elements apart.
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

// gx += what a product left, whose rows are `width` elements apart.
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

// ---- forward ---------------------------------------------------------------------------------------------

// Sixteen hidden channels, whose bits are one word.
template <class Acc>
struct Group {
  using Lanes = Simd<Acc>;
  using Vector = typename Lanes::Vector;
  static constexpr int registers = kHiddenGroup / Lanes::lanes;
  Vector part[registers]{};

  static SPARTA_INLINE Group load(const Acc* from) {
    Group group;
    for (int i = 0; i < registers; ++i) group.part[i] = Lanes::load(from + i * Lanes::lanes);
    return group;
  }
  template <class G>
  SPARTA_INLINE void store(G* to) const {
    for (int i = 0; i < registers; ++i) Simd<G>::store(to + i * Lanes::lanes, part[i]);
  }
  template <class Function>
  SPARTA_INLINE Group map(Function function) const {
    Group group;
    for (int i = 0; i < registers; ++i) group.part[i] = function(part[i], i);
    return group;
  }
  SPARTA_INLINE Group operator+(const Group& other) const {
    return map([&](Vector value, int i) { return value + other.part[i]; });
  }
  SPARTA_INLINE Group operator*(Acc factor) const {
    return map([&](Vector value, int) { return value * factor; });
  }
  SPARTA_INLINE Group rectified() const {
    return map([](Vector value, int) { return relu(value); });
  }
  SPARTA_INLINE uint16_t passing_bits() const {
    uint64_t bits = 0;
    for (int i = 0; i < registers; ++i) bits |= passing(part[i]) << i * Lanes::lanes;
    return static_cast<uint16_t>(bits);
  }
  SPARTA_INLINE Group where(uint64_t bits) const {
    return map([&](Vector value, int i) { return masked(value, bits >> i * Lanes::lanes); });
  }
  SPARTA_INLINE Vector dot(const Group& other) const {
    Vector sum = part[0] * other.part[0];
    for (int i = 1; i < registers; ++i) sum += part[i] * other.part[i];
    return sum;
  }
};

constexpr uint64_t kWhole = 0xffff;  // a group of which no channel is padding

// What the rows of a product become: h = relu(product + bias), and its bits. `bits` are those of the first row, which
// the others' follow `words` apart. each(row, group) is given h. Channels whose bit in `real` is not set are padding, and 0:
// an infinite x times a padding weight is a NaN.
template <class Acc, class Each>
SPARTA_INLINE void rectify(const Acc* product, int64_t width, const Group<Acc>& bias, uint64_t real, int64_t rows,
                           uint16_t* bits, int64_t words, Each each) {
  for (int64_t r = 0; r < rows; ++r) {
    Group<Acc> h = Group<Acc>::load(product + r * width) + bias;
    if (real != kWhole) h = h.where(real);
    if (bits != nullptr) bits[r * words] = h.passing_bits();
    each(r, h.rectified());
  }
}

template <class T, class G>
struct Forward {
  using Acc = typename Accumulator<T>::type;
  using Sums = Group<Acc>;
  static constexpr int lanes = Simd<Acc>::lanes;

  const AttentionForward& args;
  const Tiles& tiles;
  Products& products;
  Acc* partials;  // of tiles that are a part of a sample: sums of h1, then of h6
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden, groups = hidden / kHiddenGroup;
  const int64_t words = args.shape.masks() * groups;                              // of bits, for a pixel
  const int64_t inner = std::is_same_v<G, bfloat16> ? channels + channels % 2 : channels;
  Scratch<G> x{gathers() ? tiles.rows() * inner : 0}, h3{tiles.rows() * hidden};
  Scratch<Acc> hidden_rows{tiles.rows() * 2 * hidden};
  Scratch<Acc> dots{(tiles.rows() + lanes) * lanes};  // of h3 and w4, still spread over a register's lanes

  bool gathers() const {
    // BLAS takes neither rows that overlap (expanded ones, or a stride that says nothing) nor strides beyond 32 bits.
    const bool apart = args.x.row_stride >= channels && args.x.row_stride <= INT32_MAX;
    return !apart || !rows_follow_each_other(args.x, tiles) || !std::is_same_v<T, G> || inner != channels;
  }
  Ahead next(const Matrices& m, int64_t index) const {
    if (m.data == nullptr || index + 1 >= tiles.count || !rows_follow_each_other(m, tiles)) return {};
    return {Tile(tiles, index + 1).start<const T>(m, 0, false), m.row_stride, channels};
  }
  const Acc* vector(const void* of) const { return static_cast<const Acc*>(of); }
  const G* matrix(const void* of) const { return static_cast<const G*>(of); }

  uint64_t real(int64_t group) const { return group + 1 < groups ? kWhole : kWhole >> args.shape.spare; }

  // Where a sum over a sample's pixels in this tile goes to, and by what it is multiplied.
  Acc* sum_at(const Tile& tile, int64_t index, int64_t n, int64_t which) const {
    if (tiles.per_sample > 1) return partials + (index * 2 + which) * hidden;
    return static_cast<Acc*>(which == 0 ? args.mean1 : args.mean6) + (tile.sample + n) * hidden;
  }
  Acc scale() const { return tiles.per_sample > 1 ? Acc{1} : Acc{1} / static_cast<Acc>(args.shape.pixels); }

  // h1 (which = 0) or h6 (1): only its mean is wanted.
  void reduce(const Tile& tile, int64_t index, int64_t which, const Acc* product, int64_t width, const Acc* bias,
              uint16_t* bits) {
    for (int64_t n = 0; n < tile.samples; ++n)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * kHiddenGroup, first = n * tile.pixels;
        Sums sum;
        rectify(product + first * width + at, width, Sums::load(bias + at), real(g), tile.pixels,
                bits == nullptr ? nullptr : bits + first * words + g, words,
                [&](int64_t, const Sums& h) { sum = sum + h; });
        (sum * scale()).store(sum_at(tile, index, n, which) + at);
      }
  }

  // h3: kept as the next product's operand, and a.
  void keep(const Tile& tile, int64_t index, const Acc* product, int64_t width, const Acc* bias, uint16_t* bits) {
    const Ahead x_ahead = next(args.x, index), skip_ahead = next(args.skip, index);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * kHiddenGroup;
      const Sums w4 = Sums::load(vector(args.w4) + at);
      rectify(product + at, width, Sums::load(bias + at), real(g), tile.rows, bits == nullptr ? nullptr : bits + g, words,
              [&](int64_t r, const Sums& h) {
                if (args.shape.dynamic) h.store(h3 + r * hidden + at);
                const auto sum = h.dot(w4);
                x_ahead.ask(r, g, groups);
                skip_ahead.ask(r, g, groups);
                Simd<Acc>::store(dots + r * lanes, g == 0 ? sum : Simd<Acc>::load(dots + r * lanes) + sum);
              });
    }
    Acc* a = static_cast<Acc*>(args.a) + tile.row;
    const Acc b4 = vector(args.w4)[hidden];
    for (int64_t r = 0; r < tile.rows; r += lanes) {
      typename Simd<Acc>::Vector rows[lanes];
      for (int i = 0; i < lanes; ++i) rows[i] = Simd<Acc>::load(dots + (r + i) * lanes);
      store_partial(a + r, sums(rows) + b4, min(lanes, tile.rows - r));
    }
  }

  void run(int64_t index) {
    const Tile tile(tiles, index);
    const bool direct = !gathers();
    if (args.skip.data != nullptr) add_skip<T>(args, tile);
    if (!direct) gather<T, G>(args, tile, inner, x);
    const G* rows = direct ? tile.start<const G>(args.x, 0, false) : static_cast<const G*>(x);
    uint16_t* bits = args.bits == nullptr ? nullptr : args.bits + tile.row * words;
    const int64_t width = 2 * hidden;
    const Acc *b13 = vector(args.b13), *b6 = vector(args.b6);
    Acc* product = hidden_rows;

    products.multiply(tile.rows, width, inner, rows, direct ? args.x.row_stride : inner, matrix(args.w13), width,
                      product, width);
    reduce(tile, index, 0, product, width, b13, bits);
    keep(tile, index, product + hidden, width, b13 + hidden, bits == nullptr ? nullptr : bits + groups);
    if (!args.shape.dynamic) return;
    products.multiply(tile.rows, hidden, hidden, static_cast<const G*>(h3), hidden, matrix(args.w6), hidden, product,
                      width);
    reduce(tile, index, 1, product, width, b6, bits == nullptr ? nullptr : bits + 2 * groups);
  }

  // The means of a sample that has several tiles.
  void add_up(int64_t sample) const {
    for (int64_t which = 0; which < (args.shape.dynamic ? 2 : 1); ++which) {
      Acc* mean = static_cast<Acc*>(which == 0 ? args.mean1 : args.mean6) + sample * hidden;
      for (int64_t at = 0; at < hidden; at += kHiddenGroup) {
        Sums sum;
        for (int64_t part = 0; part < tiles.per_sample; ++part)
          sum = sum + Sums::load(partials + ((sample * tiles.per_sample + part) * 2 + which) * hidden + at);
        (sum * (Acc{1} / static_cast<Acc>(args.shape.pixels))).store(mean + at);
      }
    }
  }

  // What the gate takes from the means of some samples.
  void finish(int64_t first) {
    const int64_t samples = min(kTogether, args.shape.samples - first);
    if (tiles.per_sample > 1)
      for (int64_t n = first; n < first + samples; ++n) add_up(n);
    Acc *channel = static_cast<Acc*>(args.channel) + first * channels, *kernel = static_cast<Acc*>(args.kernel) + first;
    products.multiply(samples, channels, hidden, vector(args.mean1) + first * hidden, hidden, vector(args.w2), channels,
                      channel, channels);
    const Acc *b2 = vector(args.b2), *w7 = vector(args.w7);
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) channel[n * channels + c] += b2[c];
      kernel[n] = w7[hidden];
      if (args.shape.dynamic) {
        const Acc* mean6 = vector(args.mean6) + (first + n) * hidden;
        for (int64_t i = 0; i < hidden; ++i) kernel[n] += w7[i] * mean6[i];
      }
    }
  }
};

template <class T, class G>
void forward(const AttentionForward& args) {
  using Acc = typename Accumulator<T>::type;
  const Tiles tiles(args.shape);
  Products products;
  Scratch<Acc> partials(tiles.per_sample > 1 ? tiles.count * 2 * args.shape.hidden : 0);
#pragma omp parallel num_threads(static_cast<int>(max(1, min(args.place.threads, tiles.count))))
  {
    Forward<T, G> pass{args, tiles, products, partials};
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tiles.count; ++index) pass.run(index);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < args.shape.samples; first += kTogether) pass.finish(first);
    products.release();
  }
  products.check();
}

// ---- backward --------------------------------------------------------------------------------------------

template <class T, class G>
struct Backward {
  using Acc = typename Accumulator<T>::type;
  using Values = Group<Acc>;
  struct Row {
    const Acc* values;
    Acc factor;
  };

  const AttentionBackward& args;
  const Tiles& tiles;
  Products& products;
  Acc* v1;  // (N, hidden): the gradient of the mean of h1
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden, groups = hidden / kHiddenGroup;
  const int64_t words = args.shape.masks() * groups;
  const int64_t wide = ceil_div(channels, kHiddenGroup) * kHiddenGroup;  // whole registers of gx
  Scratch<G> g6{args.shape.dynamic ? tiles.rows() * hidden : 0}, g13{tiles.rows() * 2 * hidden};
  Scratch<Acc> product{tiles.rows() * max(wide, hidden)};

  const Acc* vector(const void* of) const { return static_cast<const Acc*>(of); }
  const G* matrix(const void* of) const { return static_cast<const G*>(of); }

  void prepare(int64_t first) {
    const int64_t samples = min(kTogether, args.shape.samples - first);
    products.multiply(samples, hidden, channels, vector(args.gchannel) + first * channels, channels, vector(args.w2),
                      hidden, v1 + first * hidden, hidden);
  }

  // G1 or G6: the gradient of a mean, wherever the bit is set. gradient(sample) is a row and what it is multiplied by.
  template <class Gradient>
  void spread(const Tile& tile, Gradient gradient, const uint16_t* bits, G* to, int64_t width) const {
    for (int64_t n = 0; n < tile.samples; ++n)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * kHiddenGroup;
        const auto [row, factor] = gradient(tile.sample + n);
        const Values value = Values::load(row + at) * (factor / static_cast<Acc>(args.shape.pixels));
        for (int64_t r = n * tile.pixels; r < (n + 1) * tile.pixels; ++r)
          value.where(bits[r * words + g]).store(to + r * width + at);
      }
  }

  // G3 = ga (x) w4, and what conv6 sends back, wherever the bit is set.
  void join(const Tile& tile, const uint16_t* bits, G* to, int64_t width) const {
    const Acc* ga = vector(args.ga) + tile.row;
    const Ahead gx = rows_follow_each_other(args.gx, tiles)
                         ? Ahead(tile.start<const T>(args.gx, 0, false), args.gx.row_stride, channels)
                         : Ahead();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * kHiddenGroup;
      const Values w4 = Values::load(vector(args.w4) + at);
      for (int64_t r = 0; r < tile.rows; ++r) {
        Values value = w4 * ga[r];
        if (args.shape.dynamic) value = value + Values::load(product + r * hidden + at);
        value.where(bits[r * words + g]).store(to + r * width + at);
        gx.ask(r, g, groups);
      }
    }
  }

  void run(int64_t index) {
    const Tile tile(tiles, index);
    const uint16_t* bits = args.bits + tile.row * words;
    if (args.shape.dynamic) {
      spread(tile, [&](int64_t n) { return Row{vector(args.w7), vector(args.gkernel)[n]}; }, bits + 2 * groups, g6, hidden);
      products.multiply(tile.rows, hidden, hidden, static_cast<const G*>(g6), hidden, matrix(args.w6), hidden,
                        static_cast<Acc*>(product), hidden);
    }
    const int64_t width = 2 * hidden;
    spread(tile, [&](int64_t n) { return Row{v1 + n * hidden, Acc{1}}; }, bits, g13, width);
    join(tile, bits + groups, g13 + hidden, width);
    products.multiply(tile.rows, channels, width, static_cast<const G*>(g13), width, matrix(args.w13), channels,
                      static_cast<Acc*>(product), wide);
    scatter<T, Acc>(args, tile, wide, product);
  }
};

template <class T, class G>
void backward(const AttentionBackward& args) {
  using Acc = typename Accumulator<T>::type;
  const Tiles tiles(args.shape);
  Products products;
  Scratch<Acc> v1(args.shape.samples * args.shape.hidden);
#pragma omp parallel num_threads(static_cast<int>(max(1, min(args.place.threads, tiles.count))))
  {
    Backward<T, G> pass{args, tiles, products, v1};
#pragma omp for schedule(static)
    for (int64_t first = 0; first < args.shape.samples; first += kTogether) pass.prepare(first);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tiles.count; ++index) pass.run(index);
    products.release();
  }
  products.check();
}

// Calls body(T{}, G{}) with the types of the images and of the products' operands.
template <class Body>
SPARTA_INLINE void with_types(DType dtype, DType product, Body body) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, double>) {
      body(type, double{});
    } else {
      if constexpr (std::is_same_v<T, bfloat16>)
        if (product == DType::bfloat16) return body(type, bfloat16{});
      body(type, float{});
    }
  });
}

}  // namespace

void attention_forward(const AttentionForward& args) {
  with_types(args.dtype, args.product, [&](auto type, auto product) { forward<decltype(type), decltype(product)>(args); });
}

void attention_backward(const AttentionBackward& args) {
  with_types(args.dtype, args.product, [&](auto type, auto product) { backward<decltype(type), decltype(product)>(args); });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
