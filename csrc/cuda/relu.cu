// relu(a + b) on a CUDA device, forward and backward, in one pass each: what is kept in between is one bit an element.
//
// A warp's work is a tile of 256 elements, whose bits are 32 bytes, one for each lane. Neighbouring lanes load and store
// neighbouring vectors, so that accesses are coalesced; where vectors are narrower than eight elements, lanes combine
// their bits. A tile that is incomplete or not aligned is done one element at a time.
#include "common.cuh"

namespace sparta {
namespace cuda {
namespace {

constexpr int kTile = 8 * kWarp;

template <class Acc>
SPARTA_DEVICE unsigned passing(Acc value) {  // all but those <= 0, so a NaN does
  return value <= 0 ? 0u : 1u;
}

// The tile of the calling thread's warp: its first element.
SPARTA_DEVICE int64_t first_of_tile() {
  return (int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp) * kTile;
}

// Loads a whole vector by one instruction: the compiler splits some of them into four. Not read_once, whose read-only
// path must not be used for memory that the kernel overwrites.
template <class T, int count>
SPARTA_DEVICE Pack<T, count> read(const T* from) {
  Pack<T, count> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == 16)
    asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
        : "l"(from));
  else
#endif
    pack = *reinterpret_cast<const Pack<T, count>*>(from);
  return pack;
}

template <class T, int count>
SPARTA_DEVICE void write(T* to, const Pack<T, count>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == 16)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pack.words[0]), "r"(pack.words[1]),
                 "r"(pack.words[2]), "r"(pack.words[3])
                 : "memory");
  else
#endif
    store(to, pack);
}

template <bool two, class T, int count, class Acc>
SPARTA_DEVICE void add(const Pack<T, count>& first, const Pack<T, count>& second, Acc (&sum)[count]) {
  widen_all(first, sum);
  if constexpr (two) {
    Acc other[count];
    widen_all(second, other);
#pragma unroll
    for (int i = 0; i < count; ++i) sum[i] += other[i];
  }
}

// Writes y and returns the bits.
template <bool two, class T, int count>
SPARTA_DEVICE unsigned rectify(const Pack<T, count>& a, const Pack<T, count>& b, T* y) {
  typename Accumulator<T>::type sum[count];
  add<two>(a, b, sum);
  // Taken before rounding to T: a positive sum of two 16-bit numbers, in float32, does not round to 0.
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    bits |= passing(sum[i]) << i;
    sum[i] = relu(sum[i]);
  }
  write(y, narrow_all<T>(sum));
  return bits;
}

template <bool two, class T, int count>
SPARTA_DEVICE void mask(const Pack<T, count>& grad, const Pack<T, count>& grad2, unsigned bits, T* gx) {
  using Acc = typename Accumulator<T>::type;
  Acc sum[count];
  add<two>(grad, grad2, sum);
#pragma unroll
  for (int i = 0; i < count; ++i) sum[i] = bits >> i & 1 ? sum[i] : Acc{};
  write(gx, narrow_all<T>(sum));
}

template <class T, int count, bool two>
__global__ void __launch_bounds__(kThreads)
    relu_forward_kernel(const T* a, const T* b, T* y, uint8_t* bits, int64_t elements) {
  const int64_t first = first_of_tile();
  if (first >= elements) return;  // the whole warp
  const int lane = threadIdx.x % kWarp;
  unsigned own = 0;  // bits of the elements 8 * lane and the seven behind
  if (count > 1 && first + kTile <= elements) {
    constexpr int vectors = 8 / count;  // of a lane; as many lanes have the bits of one byte
    Pack<T, count> a_packs[vectors], b_packs[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = first + (v * kWarp + lane) * count;
      a_packs[v] = read<T, count>(a + at);
      if constexpr (two) b_packs[v] = read<T, count>(b + at);
    }
    unsigned packed = 0;
#pragma unroll
    for (int v = 0; v < vectors; ++v)
      packed |= rectify<two>(a_packs[v], b_packs[v], y + first + (v * kWarp + lane) * count) << (v * count);
    if constexpr (vectors == 1) {
      own = packed;
    } else if (bits != nullptr) {
      const int source = lane * vectors % kWarp, vector = lane * vectors / kWarp;
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        const unsigned theirs = __shfl_sync(kAllLanes, packed, source + i) >> (vector * count);
        own |= (theirs & ((1u << count) - 1)) << (i * count);
      }
    }
  } else {
    const int64_t at = first + 8 * lane;
#pragma unroll 1
    for (int i = 0; i < 8 && at + i < elements; ++i) {
      Pack<T, 1> b_pack{};
      if constexpr (two) b_pack = read<T, 1>(b + at + i);
      own |= rectify<two>(read<T, 1>(a + at + i), b_pack, y + at + i) << i;
    }
  }
  if (bits != nullptr && first + 8 * lane < elements) bits[first / 8 + lane] = static_cast<uint8_t>(own);
}

template <class T, int count, bool two>
__global__ void __launch_bounds__(kThreads)
    relu_backward_kernel(const T* grad, const T* grad2, const uint8_t* bits, T* gx, int64_t elements) {
  const int64_t first = first_of_tile();
  if (first >= elements) return;
  const int lane = threadIdx.x % kWarp;
  if (count > 1 && first + kTile <= elements) {
    constexpr int vectors = 8 / count;
    Pack<T, count> packs[vectors], packs2[vectors];
    unsigned theirs[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = first + (v * kWarp + lane) * count;
      packs[v] = read_once<T, count>(grad + at);
      if constexpr (two) packs2[v] = read_once<T, count>(grad2 + at);
      theirs[v] = unsigned{bits[at / 8]} >> (at % 8);
    }
#pragma unroll
    for (int v = 0; v < vectors; ++v)
      mask<two>(packs[v], packs2[v], theirs[v], gx + first + (v * kWarp + lane) * count);
  } else {
    const int64_t at = first + 8 * lane;
#pragma unroll 1
    for (int i = 0; i < 8 && at + i < elements; ++i) {
      Pack<T, 1> pack2{};
      if constexpr (two) pack2 = read_once<T, 1>(grad2 + at + i);
      mask<two>(read_once<T, 1>(grad + at + i), pack2, unsigned{bits[at / 8]} >> i, gx + at + i);
    }
  }
}

int64_t blocks(int64_t elements) { return ceil_div(elements, kTile * (kThreads / kWarp)); }

template <class T, int count, bool two>
void forward(const ReluForward& args) {
  launch("relu_forward", args.place, blocks(args.elements), kThreads, relu_forward_kernel<T, count, two>,
         static_cast<const T*>(args.a), static_cast<const T*>(args.b), static_cast<T*>(args.y), args.bits,
         args.elements);
}

template <class T, int count, bool two>
void backward(const ReluBackward& args) {
  launch("relu_backward", args.place, blocks(args.elements), kThreads, relu_backward_kernel<T, count, two>,
         static_cast<const T*>(args.grad), static_cast<const T*>(args.grad2), args.bits, static_cast<T*>(args.gx),
         args.elements);
}

}  // namespace

void relu_forward(const ReluForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int vector = kVector<T>;
    const bool aligned = (address(args.a) | address(args.b) | address(args.y)) % 16 == 0;
    if (args.b == nullptr) return aligned ? forward<T, vector, false>(args) : forward<T, 1, false>(args);
    return aligned ? forward<T, vector, true>(args) : forward<T, 1, true>(args);
  });
}

void relu_backward(const ReluBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int vector = kVector<T>;
    const bool aligned = (address(args.grad) | address(args.grad2) | address(args.gx)) % 16 == 0;
    if (args.grad2 == nullptr) return aligned ? backward<T, vector, false>(args) : backward<T, 1, false>(args);
    return aligned ? backward<T, vector, true>(args) : backward<T, 1, true>(args);
  });
}

}  // namespace cuda
}  // namespace sparta
