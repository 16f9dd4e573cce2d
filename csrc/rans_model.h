// Which models an array's symbols get: one for all, or one by the scale of the row, of the column, or of both.
#pragma once

#include <vector>

#include "rans_coder.h"

namespace pgolf {
namespace rans {

constexpr size_t kMaxModels = 256;

struct Models {
    std::vector<Levels> levels;
    double bits = 0;  // about what symbols, classes and models take
};

// Chooses by description length, at most `limit` models. Sets model and classes of every matrix; those without classes
// become one row. A matrix is considered for classes when `classed` (empty: none) says so, which takes its bytes for
// int8. No matrix may be empty.
Models choose_models(std::vector<Source>& matrices, const std::vector<bool>& classed, size_t limit, size_t threads);

Counts count_bytes(const uint8_t* bytes, size_t size);  // by symbol
double entropy_bits(const Counts& counts);              // of all symbols together
double model_bits(const Counts& counts);                // about what the model of such counts takes

}  // namespace rans
}  // namespace pgolf
