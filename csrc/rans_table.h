// Static models: the frequencies of 256 symbols, which sum to 2^14, and their encoding.
//
// A model is stored as levels: -1 for an absent symbol, else its probability relative to the most frequent one in steps
// of 1/16 bit (which costs 0.003 % of the bytes). Levels of neighboring symbols are smooth, so second differences are
// stored, 2 to 3 bits per symbol. Symbol s is the byte s ^ 0x80, which puts int8 values in order.
#pragma once

#include <array>
#include <cstdint>

#include "rans_bits.h"

namespace pgolf {
namespace rans {

constexpr int kFrequencyBits = 14;
constexpr uint32_t kTotal = uint32_t(1) << kFrequencyBits;
constexpr uint8_t kSymbolFlip = 0x80;

using Counts = std::array<uint32_t, 256>;
using Levels = std::array<int, 256>;          // -1 or 0..255
using Frequencies = std::array<uint32_t, 256>;  // 0 where the level is -1, else at least 1; sum kTotal

// Returns the levels that minimize model plus coded symbols. At least one count must be positive.
Levels fit_levels(const Counts& counts);
Frequencies frequencies_of(const Levels& levels);

void write_levels(BitWriter& out, const Levels& levels);
Levels read_levels(BitReader& in);  // throws std::invalid_argument

}  // namespace rans
}  // namespace pgolf
