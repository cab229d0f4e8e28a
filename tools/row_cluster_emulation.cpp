// A cluster of thread blocks on a CPU: csrc/row_cluster.h run by loops over
// blocks and threads.
#include <cstring>
#include <vector>

#include "../csrc/row_cluster.h"

namespace fastpo::cluster {
namespace {

class Loops {
 public:
  Loops(Cut cut, int64_t columns) : cut_(cut), columns_(columns) {}

  bool first() const { return true; }
  void block_barrier() const {}
  void wait_until_loaded() const {}

  template <class T>
  void load(const T* row, int64_t columns) {
    memory_.assign(cut_.blocks, {});
    for (int block = 0; block < cut_.blocks; ++block) {
      Slice slice = slice_of(cut_, block, columns, nullptr);
      memory_[block].resize(slice.count<T>());  // not a vector more, for a sanitizer to see
      T* target = reinterpret_cast<T*>(memory_[block].data());
      std::memcpy(target, row + slice.begin, slice.columns * sizeof(T));
      for (int j = slice.columns; j < slice.count<T>() * kPerVector<T>; ++j) assign(target[j], -INFINITY);
    }
  }

  template <class F>
  void each(F&& work) {
    for (int block = cut_.blocks - 1; block >= 0; --block)  // no order among blocks or threads may matter
      for (int thread = kThreads - 1; thread >= 0; --thread) work(slice(block), thread);
  }

  template <class F, class Op>
  auto reduce(F&& value_of, Op op) {
    using Value = decltype(value_of(Slice(), 0));
    Value of_cluster = {};
    for (int block = 0; block < cut_.blocks; ++block) {
      Value of_block = {};
      for (int warp = 0; warp < kWarps; ++warp) {
        Value lanes[kWarp], next[kWarp];
        for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = value_of(slice(block), warp * kWarp + lane);
        for (int apart = kWarp / 2; apart > 0; apart /= 2) {
          for (int lane = 0; lane < kWarp; ++lane) next[lane] = op(lanes[lane], lanes[lane ^ apart]);
          std::memcpy(lanes, next, sizeof lanes);
        }
        of_block = warp == 0 ? lanes[0] : op(of_block, lanes[0]);
      }
      of_cluster = block == 0 ? of_block : op(of_cluster, of_block);
    }
    return of_cluster;
  }

  template <class F>
  Slopes once(F&& make) const {
    return make();
  }

 private:
  Slice slice(int block) {
    Vector* vectors = memory_.empty() ? nullptr : memory_[block].data();
    return slice_of(cut_, block, columns_, vectors);
  }

  Cut cut_;
  int64_t columns_;
  std::vector<std::vector<Vector>> memory_;
};

template <class T, class O>
void run(Loops& loops, const StatsParams& p, int64_t i) {
  stats_row<T>(loops, p, i);
}
template <class T, class O>
void run(Loops& loops, const GradParams& p, int64_t i) {
  grad_row<T, O>(loops, p, i);
}
template <class T, class O>
void run(Loops& loops, const LossParams& p, int64_t i) {
  policy_loss_row<T, O>(loops, p, i);
}

template <class T, class O, class Params>
int run_rows(const Params& p, int64_t rows, int64_t most_bytes) {
  const Cut cut = cut_of(p.in.columns, sizeof(T), most_bytes);
  for (int64_t i = 0; i < rows && cut.blocks > 0; ++i) {
    Loops loops(cut, p.in.columns);
    run<T, O>(loops, p, i);
  }
  return cut.blocks;
}

template <class Params>
int run_typed(const Params& p, DType out, int64_t rows, int64_t most_bytes) {
  const DType dtype = p.in.logits.dtype;
  if (dtype == DType::kBFloat16) return run_rows<BFloat16, BFloat16>(p, rows, most_bytes);
  if (dtype == DType::kFloat16) return run_rows<Half, Half>(p, rows, most_bytes);
  if (out == DType::kBFloat16) return run_rows<float, BFloat16>(p, rows, most_bytes);
  if (out == DType::kFloat16) return run_rows<float, Half>(p, rows, most_bytes);
  return run_rows<float, float>(p, rows, most_bytes);
}

}  // namespace
}  // namespace fastpo::cluster

namespace {

// Rows, columns, shared memory of a block, and of logits and `out`: dtype as
// DType, row stride.
struct Shape {
  int64_t rows, columns, most_bytes, dtype, stride, out_dtype, out_stride;
};

fastpo::RowsIn rows_in(const Shape& shape, void* logits, void* tokens, void* temperatures, double value) {
  fastpo::RowsIn in;
  in.logits = {logits, fastpo::DType(shape.dtype), shape.stride};
  in.columns = shape.columns;
  in.tokens = static_cast<const int64_t*>(tokens);
  in.temperature = {static_cast<const float*>(temperatures), value};
  return in;
}

}  // namespace

// Pointers in the order of the fields of StatsParams, GradParams and
// LossParams; each returns the number of blocks in a cluster, 0 if no cluster
// holds a row.
extern "C" int emulate_row_stats(const Shape* shape, void** p, double temperature) {
  fastpo::StatsParams params;
  params.in = rows_in(*shape, p[0], p[1], p[2], temperature);
  params.mask = static_cast<const bool*>(p[3]);
  float** fields[] = {&params.logprobs, &params.entropy, &params.row_max, &params.log_sum};
  for (int i = 0; i < 4; ++i) *fields[i] = static_cast<float*>(p[4 + i]);
  return fastpo::cluster::run_typed(params, fastpo::DType(shape->dtype), shape->rows, shape->most_bytes);
}

extern "C" int emulate_row_grad(const Shape* shape, void** p, double temperature) {
  fastpo::GradParams params;
  params.in = rows_in(*shape, p[0], p[1], p[2], temperature);
  const float** fields[] = {&params.logprobs, &params.entropy,      &params.row_max,
                            &params.log_sum,  &params.logprob_grad, &params.entropy_grad};
  for (int i = 0; i < 6; ++i) *fields[i] = static_cast<const float*>(p[3 + i]);
  params.out = {p[9], fastpo::DType(shape->out_dtype), shape->out_stride};
  return fastpo::cluster::run_typed(params, params.out.dtype, shape->rows, shape->most_bytes);
}

extern "C" int emulate_row_policy_loss(const Shape* shape, void** p, double temperature, const double* objective) {
  fastpo::LossParams params;
  params.in = rows_in(*shape, p[0], p[1], p[2], temperature);
  const float** fields[] = {&params.weight,       &params.advantages,     &params.old_logprobs,
                            &params.ref_logprobs, &params.entropy_weight, &params.clip_low,
                            &params.clip_high,    &params.nll_weight};
  for (int i = 0; i < 8; ++i) *fields[i] = static_cast<const float*>(p[3 + i]);
  params.objective = fastpo::objective_params(objective);
  params.out = {p[11], fastpo::DType(shape->out_dtype), shape->out_stride};
  float** outputs[] = {&params.loss, &params.logprobs, &params.entropy};
  for (int i = 0; i < 3; ++i) *outputs[i] = static_cast<float*>(p[12 + i]);
  params.clipped = static_cast<uint8_t*>(p[15]);
  const auto out = params.out.data ? params.out.dtype : params.in.logits.dtype;
  return fastpo::cluster::run_typed(params, out, shape->rows, shape->most_bytes);
}

extern "C" void emulate_scale(const Shape* shape, void* grad, float factor) {
  using namespace fastpo;
  const Matrix rows = {grad, DType(shape->dtype), shape->stride};
  for (int64_t i = 0; i < shape->rows && factor != 1; ++i)
    for (int thread = 0; thread < cluster::kThreads; ++thread) {
      const auto scale = [&](auto zero) {
        auto* row = static_cast<decltype(zero)*>(rows.row(i));
        cluster::scale_row(row, shape->columns, factor, thread, cluster::kThreads);
      };
      if (rows.dtype == DType::kBFloat16) scale(BFloat16{});
      if (rows.dtype == DType::kFloat16) scale(Half{});
      if (rows.dtype == DType::kFloat32) scale(float{});
    }
}
