// Group advantages on CUDA: one launch for any group layout; group_grid.h is what it runs.
//
// Deterministic: each thread sums its group in the order of the batch, and only integers meet atomics.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "group_advantages.h"
#include "group_grid.h"

namespace fastpo {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 128;

__device__ double reward_at(const GroupParams& p, int64_t i) {
  switch (p.reward_type) {
    case RewardType::kFloat64:
      return static_cast<const double*>(p.rewards)[i];
    case RewardType::kFloat32:
      return static_cast<const float*>(p.rewards)[i];
    case RewardType::kFloat16:
      return __half2float(static_cast<const __half*>(p.rewards)[i]);
    case RewardType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.rewards)[i]);
    case RewardType::kInt64:
      return double(static_cast<const int64_t*>(p.rewards)[i]);
    case RewardType::kInt32:
      return static_cast<const int32_t*>(p.rewards)[i];
    case RewardType::kInt16:
      return static_cast<const int16_t*>(p.rewards)[i];
    case RewardType::kInt8:
      return static_cast<const int8_t*>(p.rewards)[i];
    default:
      return static_cast<const uint8_t*>(p.rewards)[i];
  }
}

// All blocks are resident, and wait for each other; what is summed over the batch every block sums for itself.
class Grid {
 public:
  __device__ Grid(const GroupParams& p, double* shared) : p_(p), shared_(shared) {}

  template <class F>
  __device__ void each(F&& f) {
    const int64_t step = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p_.count; i += step) f(i);
    cg::this_grid().sync();
  }

  // Strided partial sums, then a tree.
  template <class F>
  __device__ double sum(F&& f) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < p_.count; i += kThreads) sum += f(i);
    shared_[threadIdx.x] = sum;
    __syncthreads();
    for (int width = kThreads / 2; width > 0; width /= 2) {
      if (threadIdx.x < width) shared_[threadIdx.x] += shared_[threadIdx.x + width];
      __syncthreads();
    }
    sum = shared_[0];
    __syncthreads();
    return sum;
  }

  __device__ double reward(int64_t k) const { return reward_at(p_, k); }

  __device__ void increment(int64_t* x) const { atomicAdd(reinterpret_cast<unsigned long long*>(x), 1ull); }

 private:
  const GroupParams& p_;
  double* shared_;
};

// One block per processor at least: without it ptxas spills for sm_100, to make room for more.
__global__ void __launch_bounds__(kThreads, 1) group_advantages_kernel(GroupParams p) {
  __shared__ double shared[kThreads];
  Grid grid(p, shared);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.num_informative = 0;
  group_advantages_of(grid, p);
}

}  // namespace
}  // namespace fastpo

extern "C" int fastpo_group_advantages_cuda(const fastpo::GroupParams* p, void* stream) {
  using fastpo::kThreads;
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, fastpo::group_advantages_kernel,
                                                          kThreads, 0);
  if (error != cudaSuccess) return error;
  // All blocks must be resident at once: they wait for each other.
  const int64_t wanted = (p->count + kThreads - 1) / kThreads, fitting = int64_t(processors) * per_processor;
  const int blocks = int(wanted < 1 ? 1 : wanted < fitting ? wanted : fitting);
  fastpo::GroupParams params = *p;
  void* arguments[] = {&params};
  return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(fastpo::group_advantages_kernel), dim3(blocks),
                                     dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream));
}
