// Square blocks of elements turned in registers.
#pragma once

#include "common.h"

namespace mk {

// Lane i of word j becomes lane j of word i. W is a vector of kLanes unsigned integers, and there
// are as many words: every stage zips the halves of the list.
template <class W, int kLanes>
MK_INLINE void transpose(W* words) {
  static_assert(sizeof(W) == kLanes * sizeof(words[0][0]), "as many words as lanes");
  for (int stage = 1; stage < kLanes; stage *= 2) {
    W zipped[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      const W &a = words[i], &b = words[i + kLanes / 2];
      if constexpr (kLanes == 2) {
        zipped[0] = __builtin_shufflevector(a, b, 0, 2);
        zipped[1] = __builtin_shufflevector(a, b, 1, 3);
      } else if constexpr (kLanes == 4) {
        zipped[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        zipped[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      } else {
        static_assert(kLanes == 8, "2, 4 or 8 lanes");
        zipped[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        zipped[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
      }
    }
    for (int i = 0; i < kLanes; ++i) words[i] = zipped[i];
  }
}

}  // namespace mk
