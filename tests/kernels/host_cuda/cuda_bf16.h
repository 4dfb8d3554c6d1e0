#pragma once

#include "arithmetic.h"

struct __nv_bfloat16 {
  mk::bf16 value;
};
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {{bits}}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.value.bits; }
inline float __bfloat162float(__nv_bfloat16 x) { return mk::widen(x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 y{{0x7fff}};  // a GPU's NaN
  if (x == x) mk::narrow(x, &y.value);
  return y;
}
