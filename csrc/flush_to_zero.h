// Subnormal results of this thread's vector arithmetic are 0 while one of these lives.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace fastpo {

// x86's own switch: no instruction more, and none of the microcode that makes a subnormal result slow.
// Subnormal inputs stay what they are, and so does a conversion to fp16, which the switch does not reach.
class FlushToZero {
 public:
  FASTPO_INLINE FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  FASTPO_INLINE ~FlushToZero() { _mm_setcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
  const unsigned before_;
};

}  // namespace fastpo
