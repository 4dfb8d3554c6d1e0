// What every bind_*.cpp of module _cpu takes from Python and checks.
#pragma once

#include <cstdint>
#include <stdexcept>

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}
