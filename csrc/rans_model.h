// The choice of models for a matrix: one for all symbols, or one by the scale of the row, the column, or both.
#pragma once

#include <vector>

#include "rans_coder.h"

namespace pgolf {
namespace rans {

constexpr size_t kMaxModels = 256;

struct Models {
    std::vector<Levels> levels;
    double bits = 0;  // estimate for symbols, classes and models
};

// Minimizes the description length with at most `limit` models. Sets model and classes of every matrix; a matrix
// without classes becomes one row. Only matrices that `classed` selects (empty: none) may get classes; their bytes are
// taken for int8. No matrix may be empty.
Models choose_models(std::vector<Source>& matrices, const std::vector<bool>& classed, size_t limit, size_t threads);

Counts count_bytes(const uint8_t* bytes, size_t size);  // by symbol
double entropy_bits(const Counts& counts);              // for all symbols together
double model_bits(const Counts& counts);                // estimate for the model of these counts

}  // namespace rans
}  // namespace pgolf
