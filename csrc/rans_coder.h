// The coder itself: symbols of matrices to words under given models, and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rans_table.h"

namespace pgolf {
namespace rans {

constexpr size_t kMaxLanes = 256;

// A matrix of bytes and the model of each of its elements: number `model` + row class + column class.
// Without row classes (or column classes) those count as 0.
template <class Byte>
struct Matrix {
    size_t rows = 0, columns = 0;
    Byte* bytes = nullptr;
    int model = 0;
    std::vector<int8_t> row_classes, column_classes;

    size_t size() const { return rows * columns; }
    int row_model(size_t row) const { return model + (row_classes.empty() ? 0 : row_classes[row]); }
};
using Source = Matrix<const uint8_t>;
using Target = Matrix<uint8_t>;

// Symbols first..last-1 of all matrices in a row, coded on their own: lane i codes those whose number is i modulo
// `lanes`. The decoder starts with `states` and takes one of `words` whenever a state falls below 2^16.
struct Segment {
    size_t first = 0, last = 0;
    std::vector<uint32_t> states;
    std::vector<uint16_t> words;
};

// Models of all matrices must lie in 0..models.size()-1 and give every symbol that occurs a frequency.
void encode_segment(const std::vector<Source>& matrices, const std::vector<Frequencies>& models, size_t lanes,
                    Segment& segment);

struct WordsView {
    const uint8_t* states;  // lanes times 4 bytes, then words of 2 bytes, little-endian
    size_t words;
};

class Decoder {
   public:
    explicit Decoder(const std::vector<Frequencies>& models);
    // Models of all matrices must lie in 0..models.size()-1. Throws std::invalid_argument when words are missing or
    // left over, or a state does not start in range or end at 2^16.
    void decode_segment(const std::vector<Target>& matrices, size_t lanes, size_t first, size_t last,
                        const WordsView& view) const;

   private:
    static constexpr int kGuessBits = 10;
    // A slot of 2^14 finds its symbol by a guess for its group of 16 slots, and a few steps from there.
    struct Table {
        uint8_t guess[1 << kGuessBits];
        uint16_t start[257];
        uint8_t byte[256];
    };
    template <bool kCareful, bool kColumns>
    void decode_run(uint8_t* out, size_t length, int model, const int8_t* classes, uint32_t* states,
                    const uint8_t*& word, const uint8_t* end) const;

    std::vector<Table> tables_;
};

}  // namespace rans
}  // namespace pgolf
