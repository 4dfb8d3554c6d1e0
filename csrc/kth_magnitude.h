// Building blocks of exact selection by magnitude, each over elements [begin, end).
//
// Keys are the bits of a magnitude: 32 bits wide (64 for f64), ordered as unsigned integers,
// every NaN equal and above infinity. The driver samples keys, brackets the wanted ranks by two
// of them each and counts once; where the sample misleads it, or keys are short, it counts digits.
#pragma once

#include "deltas.h"

namespace mk {

// What is ranked: |x - base| of one x, or the variance of x_i - base over n of them:
//   mean = (0 + d_0 + d_1 + ...) / n;  variance = (0 + (d_0 - mean)^2 + ...) / n
// in float (double for f64), every step rounded.
struct Magnitudes {
  const View* xs;
  std::int64_t n;  // 1 unless variance
  Deltas from;
  bool variance;
};

// out[i] = key of element begin + i. `out` holds 32-bit keys, 64-bit ones for f64.
void magnitude_keys(const Magnitudes& args, std::int64_t begin, std::int64_t end, void* out);

// Keys of runs [begin, end) of `run` neighbours each: one run in every of `runs` equal strata of
// `total` elements, at a place that a hash of its number decides. out[0] belongs to run 0.
void sample_keys(const Magnitudes& args, std::int64_t total, std::int64_t runs, std::int64_t run,
                 std::int64_t begin, std::int64_t end, void* out);

struct BracketCount {
  std::int64_t above;    // keys > high
  std::int64_t at_high;  // keys == high
  std::int64_t inside;   // low < keys < high
  std::int64_t at_low;   // keys == low (0 where low == high)
};

// Counts keys against [low, high] and stores those strictly inside, in any order, into `kept`.
// Storing stops once fewer than kBlock places are left: where inside + kBlock > capacity the keys
// are not all there (the counts are right in any case).
struct Bracket {
  std::int64_t of;  // which of the Magnitudes
  std::uint64_t low, high;
  void* kept;
  std::int64_t capacity;
  BracketCount count;  // added to
};

// All brackets in one pass; those of the same Magnitudes stand side by side.
void bracket_count(const Magnitudes* args, Bracket* brackets, std::int64_t n, std::int64_t begin,
                   std::int64_t end);

// Adds to histogram[lanes][65536] the 16-bit digit at `shift` of every key that equals `prefix`
// above it (key >> (shift + 16) == prefix); the sum over lanes, 1 or 4, is the count.
void digit_histogram(const Magnitudes& args, std::int64_t begin, std::int64_t end,
                     std::uint64_t prefix, int shift, int lanes, std::int64_t* histogram);

// For 16-bit types without base: adds to histogram[32768] the stored bits of every |x|.
void pattern_histogram(const View& x, std::int64_t begin, std::int64_t end,
                       std::int64_t* histogram);

// The index of the rank-th (from 0) element of [begin, end) whose key equals `key`; -1 if none.
std::int64_t find_key(const Magnitudes& args, std::int64_t begin, std::int64_t end,
                      std::uint64_t key, std::int64_t rank);

}  // namespace mk
