#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rows.h"

namespace fastpo {
namespace {

const RowKernelTable* const kTables[] = {
#ifdef FASTPO_X86
    &kAvx512Rows,
    &kAvx2Rows,
#endif
    &kPortableRows,
    nullptr,
};

bool cpu_runs(const RowKernelTable& table) {
#ifdef FASTPO_X86
  __builtin_cpu_init();
  if (&table == &kAvx512Rows)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&table == &kAvx2Rows)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // these have F16C too
#endif
  return &table == &kPortableRows;
}

const RowKernelTable& choose() {
  const char* wanted = std::getenv("FASTPO_SIMD");
  std::string usable;
  for (const RowKernelTable* const* table = kTables; *table; ++table) {
    if (!cpu_runs(**table)) continue;
    if (!wanted || !*wanted || std::strcmp(wanted, (*table)->simd) == 0) return **table;
    usable += std::string(usable.empty() ? "" : ", ") + (*table)->simd;
  }
  throw std::runtime_error("FASTPO_SIMD is '" + std::string(wanted) + "', expected one of " + usable +
                           " on this CPU; unset it to take the widest");
}

}  // namespace

const RowKernelTable& row_kernels() {
  static const RowKernelTable& chosen = choose();
  return chosen;
}

const RowKernelTable* const* compiled_row_kernels() { return kTables; }

}  // namespace fastpo
