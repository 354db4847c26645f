// Small kernels for the emulator's own tests: right ones, whose results are known, and wrong ones, whose fault it must
// show. A block has as many threads as it likes, and in and out a number for each of them, unless it says otherwise.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>

namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ int here() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ---- right ---------------------------------------------------------------------------------------------------

__global__ void reverse(const float* in, float* out) {
  __shared__ float memory[1024];
  memory[threadIdx.x] = in[here()];
  __syncthreads();
  out[here()] = memory[blockDim.x - 1 - threadIdx.x];
}

__global__ void reverse_in_dynamic_memory(const float* in, float* out) {
  extern __shared__ float memory[];
  memory[threadIdx.x] = in[here()];
  __syncthreads();
  out[here()] = memory[blockDim.x - 1 - threadIdx.x];
}

// A block's sum, in every thread; some threads return before the last barrier, as they may.
__global__ void sum(const float* in, float* out) {
  __shared__ alignas(16) float warps[32];
  __shared__ float total;
  float value = in[here()];
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(kAll, value, bit);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += warps[warp];
  }
  if (threadIdx.x % 2 == 1) {
    out[here()] = in[here()];
    return;
  }
  __syncthreads();
  out[here()] = total;
}

// What one warp says of itself: nine numbers a lane.
__global__ void lanes(const float* in, float* out) {
  const int lane = threadIdx.x;
  const double value = in[lane];
  const bool odd = lane % 2 == 1;
  float* const row = out + 9 * lane;
  row[0] = __shfl_sync(kAll, value, 5);
  row[1] = __shfl_sync(kAll, value, 5, 4);
  row[2] = __shfl_up_sync(kAll, value, 3, 8);
  row[3] = __shfl_down_sync(kAll, value, 3, 8);
  row[4] = __shfl_xor_sync(kAll, value, 9, 8);
  row[5] = __ballot_sync(kAll, lane < 3);
  row[6] = __any_sync(kAll, lane == 31) + 2 * __any_sync(kAll, lane == 32);
  row[7] = __all_sync(kAll, lane < 32) + 2 * __all_sync(kAll, lane < 31);
  // Two halves of a warp, each for itself.
  row[8] = odd ? __shfl_sync(0xaaaaaaaau, lane, 31) : __shfl_sync(0x55555555u, lane, 0);
}

// Four numbers a thread, fetched in two rounds of which the second is still on its way when the first is used.
template <int newest>
__global__ void fetch_ahead(const float* in, float* out) {
  __shared__ float4 memory[2][256];
  for (int round = 0; round < 2; ++round) {
    __pipeline_memcpy_async(&memory[round][threadIdx.x], in + 4 * (2 * here() + round), 16, 4 * round);
    __pipeline_commit();
  }
  __pipeline_wait_prior(newest);
  const float4 first = memory[0][threadIdx.x];
  __pipeline_wait_prior(0);
  const float4 second = memory[1][threadIdx.x];
  out[here()] = first.x + first.w + second.x + second.w;
}

__global__ void indices(const float*, float* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned at = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[at] = at;
}

// ---- wrong: the result depends on the order -----------------------------------------------------------------

__global__ void no_barrier(const float* in, float* out) {
  __shared__ float memory[1024];
  memory[threadIdx.x] = in[here()];
  out[here()] = memory[blockDim.x - 1 - threadIdx.x];
}

__global__ void no_barrier_in_the_warp(const float* in, float* out) {
  __shared__ float memory[1024];
  memory[threadIdx.x] = in[here()];
  out[here()] = memory[threadIdx.x ^ 1];
}

// The shuffle holds up the lanes of a warp, and no other warp.
__global__ void only_the_warp_waits(const float* in, float* out) {
  __shared__ float memory[1024];
  memory[threadIdx.x] = __shfl_xor_sync(kAll, in[here()], 1);
  __syncthreads();
  const float value = memory[(threadIdx.x + 32) % blockDim.x];
  memory[threadIdx.x] = __shfl_xor_sync(kAll, value, 1);
  out[here()] = value;
}

__global__ void blocks_read_each_other(const float* in, float* out) {
  out[here()] = in[here()] + (blockIdx.x == 0 ? 0 : out[here() - blockDim.x]);
}

// ---- wrong: it is noticed -----------------------------------------------------------------------------------

__global__ void reads_what_nobody_wrote(const float* in, float* out) {
  __shared__ float memory[1024];
  if (threadIdx.x != 7) memory[threadIdx.x] = in[here()];
  __syncthreads();
  out[here()] = memory[threadIdx.x];
}

__global__ void reads_an_old_block(const float* in, float* out) {
  __shared__ float memory[1024];
  if (blockIdx.x == 0) memory[threadIdx.x] = in[here()];
  out[here()] = memory[threadIdx.x];
}

__global__ void writes_beside_shared_memory(const float* in, float* out) {
  __shared__ float memory[4];
  __shared__ float other[4];
  float* const shifted = memory + 1;
  shifted[threadIdx.x] = in[here()];
  out[here()] = other[0];
}

__global__ void reads_beside_a_tensor(const float* in, float* out) { out[here()] = in[here() + 1]; }

__global__ void two_barriers(const float*, float* out) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  out[here()] = 0;
}

__global__ void barrier_against_shuffle(const float* in, float* out) {
  if (threadIdx.x == 3) __syncthreads();
  out[here()] = __shfl_xor_sync(kAll, in[here()], 1);
}

__global__ void two_shuffles(const float* in, float* out) {
  out[here()] = threadIdx.x < 16 ? __shfl_xor_sync(kAll, in[here()], 1)
                                 : __shfl_xor_sync(kAll, in[here()], 2);
}

__global__ void reads_a_lane_that_returned(const float* in, float* out) {
  if (threadIdx.x == 5) return;
  out[here()] = __shfl_xor_sync(kAll, in[here()], 1);
}

__global__ void reads_a_lane_outside_the_mask(const float* in, float* out) {
  if (threadIdx.x < 16) out[here()] = __shfl_xor_sync(0xffffu, in[here()], 16);
}

__global__ void not_in_its_own_mask(const float* in, float* out) { out[here()] = __shfl_sync(0xffu, in[here()], 0); }

__global__ void too_much_shared_memory(const float* in, float* out) {
  __shared__ double memory[8 * 1024];
  memory[threadIdx.x] = in[here()];
  out[here()] = memory[threadIdx.x];
}

__global__ void misaligned_fetch(const float* in, float* out) {
  __shared__ float memory[8];
  __pipeline_memcpy_async(memory + 1, in, 8);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[here()] = memory[1];
}

__global__ void traps(const float*, float*) {
  if (threadIdx.x == 2) __trap();
}

#define EXAMPLE(name) {#name, name}
const std::map<std::string, void (*)(const float*, float*)> kExamples{
    EXAMPLE(reverse), EXAMPLE(reverse_in_dynamic_memory), EXAMPLE(sum), EXAMPLE(lanes), EXAMPLE(indices),
    {"fetch_ahead", fetch_ahead<1>}, {"fetch_too_far_ahead", fetch_ahead<2>}, EXAMPLE(misaligned_fetch),
    EXAMPLE(no_barrier), EXAMPLE(no_barrier_in_the_warp), EXAMPLE(only_the_warp_waits), EXAMPLE(blocks_read_each_other),
    EXAMPLE(reads_what_nobody_wrote), EXAMPLE(reads_an_old_block), EXAMPLE(writes_beside_shared_memory),
    EXAMPLE(reads_beside_a_tensor), EXAMPLE(two_barriers), EXAMPLE(barrier_against_shuffle), EXAMPLE(two_shuffles),
    EXAMPLE(reads_a_lane_that_returned), EXAMPLE(reads_a_lane_outside_the_mask), EXAMPLE(not_in_its_own_mask),
    EXAMPLE(too_much_shared_memory), EXAMPLE(traps)};

}  // namespace

// Launches one of them; what went wrong, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* run_example(const char* name, const float* in, float* out,
                                                                          const unsigned* grid, const unsigned* block,
                                                                          size_t dynamic_bytes, int allowed_bytes) {
  static std::string message;
  message.clear();
  try {
    const auto kernel = kExamples.at(name);
    if (allowed_bytes >= 0)
      if (const cudaError_t error =
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed_bytes))
        return cudaGetErrorString(error);
    void* arguments[] = {&in, &out};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                                               arguments, dynamic_bytes, nullptr);
    if (error != cudaGetLastError()) return "cudaGetLastError() does not know of it";
    if (error != cudaSuccess) message = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
