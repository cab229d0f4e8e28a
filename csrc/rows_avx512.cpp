#include "row_table.h"
#include "simd_avx512.h"

namespace fastpo {

const RowKernelTable kAvx512Rows = RowTable<Avx512>::table();

}  // namespace fastpo
