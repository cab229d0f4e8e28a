// Which lanes of a vector a load or store touches. Lanes beyond a partial load read -inf, the logit
// that adds nothing to a maximum, a sum of exponentials or an entropy.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastpo {

struct All {};

struct First {
  int count;  // 1 ... width - 1
};

}  // namespace fastpo
