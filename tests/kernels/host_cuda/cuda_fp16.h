#pragma once

#include "arithmetic.h"

struct __half {
  mk::f16 value;
};
inline __half __ushort_as_half(unsigned short bits) { return {{bits}}; }
inline unsigned short __half_as_ushort(__half x) { return x.value.bits; }
inline float __half2float(__half x) { return mk::widen(x.value); }
inline __half __float2half_rn(float x) {
  __half y{{0x7fff}};  // a GPU's NaN
  if (x == x) mk::narrow(x, &y.value);
  return y;
}
