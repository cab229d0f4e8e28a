// csrc/gae.h's block as loops over its threads.
#include "../csrc/gae.h"

namespace {

struct Loops {
  template <class F> void each(F &&work) {
    for (int thread = fastpo::gae::kThreads - 1; thread >= 0; --thread)
      work(thread); // no order may matter
  }
};

} // namespace

// Pointers in the order of the operator's arguments, then the advantages.
extern "C" void emulate_gae(int64_t count, int64_t sequences, void **pointers,
                            double gamma, double lam) {
  fastpo::GaeParams p;
  p.count = count;
  p.rewards = static_cast<const double *>(pointers[0]);
  p.values = static_cast<const double *>(pointers[1]);
  p.mask = static_cast<const bool *>(pointers[2]);
  p.sequences = sequences;
  p.offsets = static_cast<const int64_t *>(pointers[3]);
  p.gamma = gamma;
  p.decay = gamma * lam;
  p.advantages = static_cast<double *>(pointers[4]);
  fastpo::GaeRun runs[2 * fastpo::gae::kThreads + 1];
  Loops loops;
  for (int64_t b = 0; b < sequences; ++b)
    fastpo::gae::scan_sequence(loops, p, b, runs, runs + fastpo::gae::kThreads,
                               runs + 2 * fastpo::gae::kThreads);
}
