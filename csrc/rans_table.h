// Static models: the frequencies of 256 symbols, which sum to 2^14, and how they are sent.
//
// A model is sent as levels: -1 for a symbol that does not occur, else its probability relative to the most frequent
// one in steps of 1/16 of a bit (0.003 % of the bytes are lost by that). Levels of neighbouring symbols lie on a smooth
// curve, so second differences are sent, 2 to 3 bits a symbol. Symbol s stands for the byte s ^ 0x80: int8 in order.
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

// The levels that make model and coded symbols smallest together. At least one count must be positive.
Levels fit_levels(const Counts& counts);
Frequencies frequencies_of(const Levels& levels);

void write_levels(BitWriter& out, const Levels& levels);
Levels read_levels(BitReader& in);  // throws std::invalid_argument

}  // namespace rans
}  // namespace pgolf
