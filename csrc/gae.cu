// Generalized advantage estimation on CUDA: one block per sequence, a latency kernel.
#include <cuda_runtime.h>

#include "gae.h"

namespace fastpo {
namespace {

struct Block {
  template <class F>
  __device__ void each(F&& work) {
    work(int(threadIdx.x));
    __syncthreads();
  }
};

__global__ void __launch_bounds__(gae::kThreads) gae_kernel(GaeParams p) {
  // Raw: GaeRun has initializers, which shared memory cannot take.
  __shared__ alignas(GaeRun) unsigned char memory[(2 * gae::kThreads + 1) * sizeof(GaeRun)];
  GaeRun* runs = reinterpret_cast<GaeRun*>(memory);
  Block block;
  for (int64_t b = blockIdx.x; b < p.sequences; b += gridDim.x)
    gae::scan_sequence(block, p, b, runs, runs + gae::kThreads, runs + 2 * gae::kThreads);
}

}  // namespace
}  // namespace fastpo

extern "C" int fastpo_gae_cuda(const fastpo::GaeParams* p, void* stream) {
  constexpr int64_t kMostBlocks = 1 << 16;
  if (p->sequences == 0) return cudaSuccess;
  const int blocks = int(p->sequences < kMostBlocks ? p->sequences : kMostBlocks);
  fastpo::gae_kernel<<<blocks, fastpo::gae::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*p);
  return cudaGetLastError();
}
