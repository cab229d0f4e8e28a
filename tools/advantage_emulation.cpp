// The threads of csrc/gae.h's block and csrc/group_grid.h's grid as loops, in no order that may matter.
#include "../csrc/gae.h"
#include "../csrc/group_grid.h"

namespace {

struct Block {
  template <class F>
  void each(F&& work) {
    for (int thread = fastpo::gae::kThreads - 1; thread >= 0; --thread) work(thread);
  }
};

struct Grid {
  const fastpo::GroupParams& p;

  template <class F>
  void each(F&& work) {
    for (int64_t i = p.count - 1; i >= 0; --i) work(i);
  }

  template <class F>
  double sum(F&& f) {
    double total = 0;
    for (int64_t i = p.count - 1; i >= 0; --i) total += f(i);
    return total;
  }

  double reward(int64_t k) const { return static_cast<const double*>(p.rewards)[k]; }

  void increment(int64_t* x) const { ++*x; }
};

template <class T>
T* at(void* pointer) {
  return static_cast<T*>(pointer);
}

}  // namespace

// Pointers in the order of the operator's arguments, then its result.
extern "C" void emulate_gae(const int64_t* sizes, void** pointers, double gamma, double lam) {
  fastpo::GaeParams p;
  p.count = sizes[0];
  p.sequences = sizes[1];
  p.rewards = at<const double>(pointers[0]);
  p.values = at<const double>(pointers[1]);
  p.mask = at<const bool>(pointers[2]);
  p.offsets = at<const int64_t>(pointers[3]);
  p.advantages = at<double>(pointers[4]);
  p.gamma = gamma;
  p.decay = gamma * lam;
  fastpo::GaeRun runs[2 * fastpo::gae::kThreads + 1];
  Block block;
  for (int64_t b = 0; b < p.sequences; ++b)
    fastpo::gae::scan_sequence(block, p, b, runs, runs + fastpo::gae::kThreads,
                               runs + 2 * fastpo::gae::kThreads);
}

// Rewards are fp64; the results are advantages, informative, num_informative, and last comes the scratch.
extern "C" void emulate_group_advantages(const int64_t* sizes, void** pointers, double eps) {
  fastpo::GroupParams p;
  p.count = sizes[0];
  p.columns = sizes[1];
  p.group_size = sizes[2];
  p.estimator = fastpo::Estimator(sizes[3]);
  p.whiten = sizes[4];
  p.eps = eps;
  p.rewards = pointers[0];
  p.group_ids = at<const int64_t>(pointers[1]);
  p.lengths = at<const double>(pointers[2]);
  p.column_weights = at<const double>(pointers[3]);
  p.advantages = at<float>(pointers[4]);
  p.informative = at<bool>(pointers[5]);
  p.num_informative = at<int64_t>(pointers[6]);
  p.scratch = at<double>(pointers[7]);
  Grid grid{p};
  fastpo::group_advantages_of(grid, p);
}
