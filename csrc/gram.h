// Dot products of n vectors, of whole tensors or row by row, in one pass.
//
// Every value is widened to double before the subtraction; products and sums are double. Element e
// of a range goes to partial sum e % kGramLanes of its block of kGramBlock, blocks are added up
// lane by lane, and the lanes at the end, in order: a fixed range gives fixed bits, whatever the
// layout, the instruction set and the vectors beside the two. Of m elements a sum takes at most
// kGramBlock / kGramLanes + m / kGramBlock + kGramLanes + 1 additions after one another.
#pragma once

#include "common.h"

namespace mk {

struct Gram {
  const View* xs;
  std::int64_t n;
  const View* base;  // nullptr: zero
};

constexpr std::int64_t kGramBlock = 512;
constexpr int kGramLanes = 16;

// dots[i * n + j] = sum_e (x_i - b)_e (x_j - b)_e over elements [begin, end), for all i and j.
// `scratch`: gram_scratch(n) doubles.
void gram(const Gram& args, std::int64_t begin, std::int64_t end, double* scratch, double* dots);

// The same for each of the rows [begin, end) of `width` elements, into dots + row * n * n.
void gram_rows(const Gram& args, std::int64_t width, std::int64_t begin, std::int64_t end,
               double* scratch, double* dots);

// Partial sums of every pair; where n is too large for registers, a block of every vector as well.
std::int64_t gram_scratch(std::int64_t n);

}  // namespace mk
