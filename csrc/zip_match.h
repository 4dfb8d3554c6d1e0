// Greedy matching within and across models, as ZipIt: the two most similar groups of features are
// merged until `width` groups are left.
//
// Similarities s are floats (doubles where the correlations are), those of pairs of slots; the
// diagonal is -inf. While more than `width` groups are left:
//   1. (r, c) = the pair of the largest s, of equal ones the lowest row, then the lowest column;
//      r < c by exchange. Group c joins group r; slot c is gone.
//   2. s[k][r] = alpha * min(s[k][r], s[k][c]) and s[r][k] = alpha * min(s[r][k], s[c][k]) for
//      every slot k, each product rounded once. Negative similarities shrink as well, and so rise.
//      For alpha = 0 nothing is multiplied. Instead s[k][r] = s[r][k] = -inf where the model of
//      slot k is that of r or c: a merged feature takes no further partner from the models that it
//      contains.
//   3. A slot keeps its model. If r and c are of one model, its budget falls by one; at 0 all pairs
//      of slots of this model get -inf, as those of a budget of 0 have from the start.
// If every s is -inf, steps 2 and 3 are done again for all merges so far without any -inf, and from
// there on nothing is forbidden.
//
// `zipit` gives what ZipIt's code does instead. For alpha = 0 its ranges are of positions, not
// slots: position p is the p-th slot left, in step 2 before c is gone in columns and after it in
// rows. If every s is -inf, the group of the lowest slot is lost: its label is -1.
//
// -0 equals +0. Correlations must be finite. They may differ above and below the diagonal.
#pragma once

#include "common.h"

namespace mk {

struct ZipMatch {
  View correlation;             // two dimensions
  const std::int64_t* offsets;  // first slot of each model, and the number of slots
  std::int64_t models;
  std::int64_t width;     // groups to end with: at least 1 where there are slots
  double alpha;           // rounded to the type of similarities
  std::int64_t* budgets;  // merges within each model; counted down
  bool zipit;
};

// labels[slot] = its group; groups count from 0 in the order of their lowest slots. One matrix is
// one piece of work, since a merge depends on all before it. `scratch`: zip_match_scratch bytes, at
// the start of a cache line.
void zip_match(const ZipMatch& args, void* scratch, std::int64_t* labels);
std::int64_t zip_match_scratch(const View& correlation);

}  // namespace mk
