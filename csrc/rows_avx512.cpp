#include "kept_kernels.h"
#include "row_table.h"
#include "simd_avx512.h"

namespace fastpo {

static constexpr KeptKernelTable kAvx512Kept = KeptKernels<Avx512>::table();
const RowKernelTable kAvx512Rows = RowTable<Avx512>::table(&kAvx512Kept);

}  // namespace fastpo
