// Packing of signed 6-bit codes into planes, and dequantization of packed codes.
//
// A matrix of `rows` x `columns` codes, each -32..31, is stored row by row. Rows are padded with code 0 to K, the next
// multiple of 8. With u = code + 32, a packed row is two consecutive planes:
//   4 low bits   low[j] = u[2j] & 15 | (u[2j+1] & 15) << 4             K/2 bytes
//   2 high bits  two[j] = sum over i < 4 of (u[4j+i] >> 4) << 2i       K/4 bytes
// Every plane of every row starts on a byte, and a GPU thread unpacks with shifts and masks that never cross bytes.
// kernels/int6_matmul.py reads this layout. 8-bit codes are stored as they are, without padding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pgolf {

// Returns the bytes of one packed row.
constexpr size_t packed_row_bytes(size_t columns, int bits) {
    return bits == 8 ? columns : (columns + 7) / 8 * static_cast<size_t>(bits);
}

struct BitsOptions {
    size_t threads = 1;  // at most; 0: one per core. Small matrices stay on the caller's thread.
    bool simd = true;    // use the SIMD path where there is one; the results are the same
};

// All functions throw std::invalid_argument unless bits is 6 or 8.

// `packed` has rows * packed_row_bytes(columns, bits) bytes.
// Throws std::invalid_argument naming row and column of the first code out of range.
void pack_bits(const int8_t* codes, size_t rows, size_t columns, int bits, uint8_t* packed, BitsOptions options = {});

// The inverse of pack_bits. Every input is valid; padding is ignored.
void unpack_bits(const uint8_t* packed, size_t rows, size_t columns, int bits, int8_t* codes,
                 BitsOptions options = {});

// values[r][c] = float(code[r][c]) * scale[r] of packed codes, in one pass.
void dequantize_bits(const uint8_t* packed, const float* scale, size_t rows, size_t columns, int bits, float* values,
                     BitsOptions options = {});

// The same, rounded to bfloat16 (nearest, ties to even).
void dequantize_bits(const uint8_t* packed, const float* scale, size_t rows, size_t columns, int bits,
                     uint16_t* values, BitsOptions options = {});

// Returns the SIMD path of this processor: "AVX2" or "none".
const char* bits_simd();

}  // namespace pgolf
