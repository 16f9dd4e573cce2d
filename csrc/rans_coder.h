// The entropy coder: symbols of matrices to words under given models, and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rans_table.h"

namespace pgolf {
namespace rans {

constexpr size_t kMaxLanes = 256;

// A matrix of bytes. The model of an element is `model` + row class + column class; absent classes count as 0.
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

// Symbols first..last-1 of all concatenated matrices, coded independently: lane i codes every symbol whose index in the
// segment is i modulo `lanes`. The decoder starts with `states` and reads a word when a state falls below 2^16.
struct Segment {
    size_t first = 0, last = 0, lanes = 1;
    std::vector<uint32_t> states;
    std::vector<uint16_t> words;
};

// A segment in a payload: 4 bytes per state at `bytes`, then 2 bytes per word, little-endian.
struct StoredSegment {
    size_t first, last, lanes, words;
    const uint8_t* bytes;
};

// Every model of a matrix must exist, and contain every symbol that occurs.
class Encoder {
   public:
    explicit Encoder(const std::vector<Levels>& models);
    void encode_segment(const std::vector<Source>& matrices, Segment& segment) const;

   private:
    // Division by multiplication: q = x * reciprocal >> 46 is x / frequency, exactly for x < frequency * 2^18. State x
    // becomes (q << 14) + start + x % frequency.
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
    // Throws std::invalid_argument when words are missing or left over, or a state starts out of range or does not end
    // at 2^16.
    void decode_segment(const std::vector<Target>& matrices, const StoredSegment& segment) const;

   private:
    static constexpr int kGuessBits = 10;
    // Looks up one of 2^14 slots by a guess for its group of 16 and a few steps from there: the table is small enough
    // for the L1 cache.
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
