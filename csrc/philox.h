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

MK_INLINE void philox_block(PhiloxKey key, std::uint64_t counter, std::uint32_t* c) {
  c[0] = std::uint32_t(counter);
  c[1] = std::uint32_t(counter >> 32);
  c[2] = c[3] = 0;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t(0xD2511F53u) * c[0];
    const std::uint64_t p1 = std::uint64_t(0xCD9E8D57u) * c[2];
    const std::uint32_t c1 = c[1], c3 = c[3];
    c[0] = std::uint32_t(p1 >> 32) ^ c1 ^ key.k0;
    c[1] = std::uint32_t(p1);
    c[2] = std::uint32_t(p0 >> 32) ^ c3 ^ key.k1;
    c[3] = std::uint32_t(p0);
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
}

}  // namespace mk
