// The attention network on a CPU: its forward pass, and the gradient of its input, without a hidden tensor in memory.
//
// The work is cut into tiles (attention_tiles.h). What the matrix products (products.h) compute for a tile stays in the
// thread's own cache until it has become bits, sums over pixels and the operand of the next product: h1, h3 and h6 in the
// forward pass, their gradients G1, G3 and G6 in the backward pass.
//
// Tiles follow from the shape alone, and where a sample has several, their sums are added in order: results are the same
// for every number of threads.
#include "../kernels.h"
#include "attention_tiles.h"
#include "products.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

// Samples whose products of one row each are computed together. Fixed, so that results do not depend on the threads.
constexpr int64_t kTogether = 16;

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

constexpr uint64_t kWhole = 0xffff;  // the bits of a group without padding channels

// Calls each(row, h) for one group of a product's rows, with h = relu(product + bias), and writes its bits: `bits` are
// those of the first row, and those of the next follow `words` further on. Channels whose bit in `real` is not set are
// padding and made 0 explicitly: an infinite x times a padding weight of 0 is NaN.
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
  Acc* partials;  // for samples with several tiles: each tile's sums of h1, then of h6
  const int64_t channels = args.shape.channels, hidden = args.shape.hidden, groups = hidden / kHiddenGroup;
  const int64_t words = args.shape.masks() * groups;                              // of bits, for a pixel
  const int64_t inner = std::is_same_v<G, bfloat16> ? channels + channels % 2 : channels;
  Scratch<G> x{gathers() ? tiles.rows() * inner : 0}, h3{tiles.rows() * hidden};
  Scratch<Acc> hidden_rows{tiles.rows() * 2 * hidden};
  Scratch<Acc> dots{(tiles.rows() + lanes) * lanes};  // h3 . w4 of every row, still spread over a register's lanes

  bool gathers() const {
    // BLAS takes neither overlapping rows (expanded images, or the arbitrary stride of a single row) nor strides beyond
    // 32 bits.
    const bool apart = args.x.row_stride >= channels && args.x.row_stride <= INT32_MAX;
    return !apart || !rows_follow_each_other(args.x, tiles) || !std::is_same_v<T, G> || inner != channels;
  }
  // The next tile's rows of x or skip.
  Prefetch next(const Matrices& m, int64_t index) const {
    if (m.data == nullptr || index + 1 >= tiles.count || !rows_follow_each_other(m, tiles)) return {};
    return {Tile(tiles, index + 1).start<const T>(m, 0, false), m.row_stride, channels};
  }
  const Acc* vector(const void* of) const { return static_cast<const Acc*>(of); }
  const G* matrix(const void* of) const { return static_cast<const G*>(of); }

  uint64_t real(int64_t group) const { return group + 1 < groups ? kWhole : kWhole >> args.shape.spare; }

  // Where the sum over a sample's pixels in this tile is stored, and the factor it is multiplied by.
  Acc* sum_at(const Tile& tile, int64_t index, int64_t n, int64_t which) const {
    if (tiles.per_sample > 1) return partials + (index * 2 + which) * hidden;
    return static_cast<Acc*>(which == 0 ? args.mean1 : args.mean6) + (tile.sample + n) * hidden;
  }
  Acc scale() const { return tiles.per_sample > 1 ? Acc{1} : Acc{1} / static_cast<Acc>(args.shape.pixels); }

  // h1 (which = 0) or h6 (which = 1): only the mean is needed.
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

  // h3: stored as the next product's operand, and reduced to a.
  void keep(const Tile& tile, int64_t index, const Acc* product, int64_t width, const Acc* bias, uint16_t* bits) {
    const Prefetch next_x = next(args.x, index), next_skip = next(args.skip, index);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * kHiddenGroup;
      const Sums w4 = Sums::load(vector(args.w4) + at);
      rectify(product + at, width, Sums::load(bias + at), real(g), tile.rows, bits == nullptr ? nullptr : bits + g, words,
              [&](int64_t r, const Sums& h) {
                if (args.shape.dynamic) h.store(h3 + r * hidden + at);
                const auto sum = h.dot(w4);
                next_x.fetch(r, g, groups);
                next_skip.fetch(r, g, groups);
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

  // The means of a sample with several tiles, from their sums.
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

  // The channel and kernel of some samples, from their means.
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

  // v1 of some samples.
  void prepare(int64_t first) {
    const int64_t samples = min(kTogether, args.shape.samples - first);
    products.multiply(samples, hidden, channels, vector(args.gchannel) + first * channels, channels, vector(args.w2),
                      hidden, v1 + first * hidden, hidden);
  }

  // G1 or G6: the gradient of a mean, where the bit is set. gradient(sample) returns that as a row and a factor.
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

  // G3: ga (x) w4 plus the gradient through conv6, where the bit is set.
  void join(const Tile& tile, const uint16_t* bits, G* to, int64_t width) const {
    const Acc* ga = vector(args.ga) + tile.row;
    const Prefetch gx = rows_follow_each_other(args.gx, tiles)
                            ? Prefetch(tile.start<const T>(args.gx, 0, false), args.gx.row_stride, channels)
                            : Prefetch();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * kHiddenGroup;
      const Values w4 = Values::load(vector(args.w4) + at);
      for (int64_t r = 0; r < tile.rows; ++r) {
        Values value = w4 * ga[r];
        if (args.shape.dynamic) value = value + Values::load(product + r * hidden + at);
        value.where(bits[r * words + g]).store(to + r * width + at);
        gx.fetch(r, g, groups);
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
