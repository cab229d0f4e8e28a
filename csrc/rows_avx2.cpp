#include "row_table.h"
#include "simd_avx2.h"

namespace fastpo {

const RowKernelTable kAvx2Rows = RowTable<Avx2>::table();

}  // namespace fastpo
