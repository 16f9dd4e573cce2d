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

// Symbols first..last-1 of all matrices in a row, coded on their own: lane i codes those whose number in the segment is
// i modulo `lanes`. The decoder starts with `states` and takes one of `words` whenever a state falls below 2^16.
struct Segment {
    size_t first = 0, last = 0, lanes = 1;
    std::vector<uint32_t> states;
    std::vector<uint16_t> words;
};

// The same in a payload: 4 bytes a state at `bytes`, then 2 bytes a word, little-endian.
struct StoredSegment {
    size_t first, last, lanes, words;
    const uint8_t* bytes;
};

// Models of all matrices must be models of the coder, and in an encoder have each symbol that occurs.
class Encoder {
   public:
    explicit Encoder(const std::vector<Levels>& models);
    void encode_segment(const std::vector<Source>& matrices, Segment& segment) const;

   private:
    // How to divide by a frequency: with q = x * reciprocal >> 46, exact for x < frequency * 2^18, state x turns into
    // (q << 14) + start + x % frequency.
    struct Step {
        uint64_t reciprocal;
        uint32_t frequency, start;
    };
    using Table = std::array<Step, 256>;  // by byte
    template <bool kColumns>
    static void encode_run(const uint8_t* in, size_t length, const Table* models, const int8_t* classes,
                           uint32_t* states, uint16_t*& words);

    std::vector<Table> tables_;
};

class Decoder {
   public:
    explicit Decoder(const std::vector<Frequencies>& models);
    // Throws std::invalid_argument when words are missing or left over, or a state does not start in range or does not
    // end at 2^16.
    void decode_segment(const std::vector<Target>& matrices, const StoredSegment& segment) const;

   private:
    static constexpr int kGuessBits = 10;
    // A slot of 2^14 finds its symbol by a guess for its group of 16 slots, and a few steps from there: small tables
    // stay in the first-level cache.
    struct Table {
        uint8_t guess[1 << kGuessBits];
        uint16_t start[257];
        uint8_t byte[256];
    };
    template <bool kCareful, bool kColumns>
    static void decode_run(uint8_t* out, size_t length, const Table* models, const int8_t* classes, uint32_t* states,
                           const uint8_t*& word, const uint8_t* end);

    std::vector<Table> tables_;
};

}  // namespace rans
}  // namespace pgolf
