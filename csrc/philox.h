// Philox4x32-10 (Salmon et al., SC 2011): random bits as a function of a key and a counter.
//
// Element e of a stream takes 16 bits of block e / 8: the low half of word (e % 8) / 2 where e is
// even, the high half where it is odd. A mask therefore does not depend on threads or tiles.
#pragma once

#include "common.h"

namespace mk {

struct PhiloxKey {
  std::uint32_t k0, k1;
};

constexpr std::int64_t kDraws = 8;  // per block

// The draws of blocks [first, first + blocks), in order. Whole groups of kDrawGroup blocks are
// written: `draws` has room for blocks rounded up to such a group.
constexpr std::int64_t kDrawGroup = 8;
void philox_draws(PhiloxKey key, std::uint64_t first, std::int64_t blocks, std::uint16_t* draws);

}  // namespace mk
