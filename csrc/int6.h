// Packing of 6-bit codes, the "4+2 split".
//
// A matrix of `rows` x `columns` codes, each -32..31, is stored row by row. With u = code + 32 (0..63) and every row
// padded with code 0 (u = 32) to K = a multiple of 8, a packed row is K/2 low bytes followed by K/4 high bytes:
//   low [j] = (u[2j] & 15) | (u[2j+1] & 15) << 4
//   high[j] = u[4j] >> 4 | (u[4j+1] >> 4) << 2 | (u[4j+2] >> 4) << 4 | (u[4j+3] >> 4) << 6
// So a row is 3K/4 bytes, both planes of every row start on a byte, and a GPU thread unpacks with shifts and masks
// that never cross bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pgolf {

// Bytes of one packed row.
constexpr size_t int6_row_bytes(size_t columns) { return (columns + 7) / 8 * 6; }

// `packed` has rows * int6_row_bytes(columns) bytes.
// Throws std::invalid_argument naming row and column of the first code outside -32..31.
void int6_pack(const int8_t* codes, size_t rows, size_t columns, uint8_t* packed);

// The inverse; every input is valid, padding is ignored.
void int6_unpack(const uint8_t* packed, size_t rows, size_t columns, int8_t* codes);

}  // namespace pgolf
