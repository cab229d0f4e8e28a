// Group advantages on CUDA: one launch for any group layout. A latency kernel: with ids, every sample
// looks at all B, which for the few thousand completions of a batch is cheaper than a sort.
//
// Deterministic: each thread sums its group in the order of the batch, and only integers meet atomics.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "group_advantages.h"

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

// Calls f(j, reward) for the finite rewards of sample i's group, in the order of the batch.
template <class F>
__device__ void for_each_member(const GroupParams& p, const double* rewards, int64_t i, F&& f) {
  const int64_t id = p.group_of(i);
  const int64_t begin = p.group_ids ? 0 : id * p.group_size;
  const int64_t end = p.group_ids ? p.count : begin + p.group_size;
  for (int64_t j = begin; j < end; ++j)
    if (p.group_of(j) == id && isfinite(rewards[j])) f(j, rewards[j]);
}

__device__ GroupSums sums_of(const GroupParams& p, const double* rewards, int64_t i) {
  GroupSums group;
  for_each_member(p, rewards, i,
                  [&](int64_t j, double reward) { group.add(j, reward, p.lengths ? p.lengths[j] : 1.0); });
  return group;
}

// Sum of values[0 ... count) by one block: strided partial sums, then a tree, in a fixed order.
__device__ double block_sum(const double* values, int64_t count, double* shared) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += values[i];
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
    __syncthreads();
  }
  sum = shared[0];
  __syncthreads();
  return sum;
}

// The batch's standard deviation; every block finds it for itself, the counted samples in `shared`.
__device__ double batch_std(const GroupParams& p, const double* rewards, const double* deviations) {
  __shared__ double shared[kThreads];
  const double squares = block_sum(deviations, p.count, shared);
  double counted = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) counted += isfinite(rewards[i]);
  shared[threadIdx.x] = counted;
  __syncthreads();
  counted = block_sum(shared, kThreads, shared);
  return unbiased_std(squares, int64_t(counted));
}

__device__ void write_sample(const GroupParams& p, const double* rewards, int64_t i, double shared_std) {
  const GroupSums group = sums_of(p, rewards, i);
  const bool counts = group.informative() && isfinite(rewards[i]);
  double std = shared_std;
  if (p.estimator == Estimator::kGrpo || p.estimator == Estimator::kPassk) {
    double squares = 0;
    for_each_member(p, rewards, i, [&](int64_t, double r) { squares += squared_deviation(group, r); });
    std = unbiased_std(squares, group.members);
  }
  p.informative[i] = counts;
  p.advantages[i] = counts ? stored(advantage_of(p, group, rewards[i], std)) : 0.0f;
  if (counts && group.first_member == i)
    atomicAdd(reinterpret_cast<unsigned long long*>(p.num_informative), 1ull);
}

// One block per processor at least: without it ptxas spills for sm_100, to make room for more.
__global__ void __launch_bounds__(kThreads, 1) group_advantages_kernel(GroupParams p) {
  cg::grid_group grid = cg::this_grid();
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  double *rewards = p.scratch, *deviations = p.scratch + p.count;
  if (first == 0) *p.num_informative = 0;
  for (int64_t i = first; i < p.count; i += step) rewards[i] = reward_at(p, i);
  grid.sync();
  double std = 0;
  if (p.estimator == Estimator::kReinforcePp) {
    for (int64_t i = first; i < p.count; i += step)
      deviations[i] = isfinite(rewards[i]) ? squared_deviation(sums_of(p, rewards, i), rewards[i]) : 0.0;
    grid.sync();
    std = batch_std(p, rewards, deviations);
  }
  for (int64_t i = first; i < p.count; i += step) write_sample(p, rewards, i, std);
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
