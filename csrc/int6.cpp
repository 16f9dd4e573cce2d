#include "int6.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace pgolf {
namespace {

// Eight codes travel in one 64-bit word, code i in byte i counted from the lowest. Where memory has that order too, a
// copy of a constant size is one move; the loops, which compilers do not turn into one, are three times slower.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
uint64_t load(const void* from, size_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, from, bytes);
    return word;
}

void store(void* to, uint64_t word, size_t bytes) { std::memcpy(to, &word, bytes); }
#else
uint64_t load(const void* from, size_t bytes) {
    uint64_t word = 0;
    for (size_t i = 0; i < bytes; i++) word |= uint64_t(static_cast<const uint8_t*>(from)[i]) << 8 * i;
    return word;
}

void store(void* to, uint64_t word, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) static_cast<uint8_t*>(to)[i] = uint8_t(word >> 8 * i);
}
#endif

constexpr uint64_t every_byte(uint8_t byte) { return UINT64_C(0x0101010101010101) * byte; }

// A code is -32..31 exactly when its three top bits agree.
bool all_in_range(uint64_t codes) {
    return (((codes ^ codes << 1) | (codes ^ codes << 2)) & every_byte(0x80)) == 0;
}

void pack8(uint64_t codes, uint8_t* low, uint8_t* high) {
    const uint64_t u = (codes ^ every_byte(0x20)) & every_byte(0x3f);  // code + 32, without carries between bytes
    uint64_t l = u & every_byte(0x0f);
    l = (l | l >> 4) & UINT64_C(0x00ff00ff00ff00ff);
    l = (l | l >> 8) & UINT64_C(0x0000ffff0000ffff);
    store(low, l | l >> 16, 4);
    uint64_t h = u >> 4 & every_byte(0x03);
    h = (h | h >> 6) & UINT64_C(0x000f000f000f000f);
    h = (h | h >> 12) & UINT64_C(0x000000ff000000ff);
    store(high, h | h >> 24, 2);
}

uint64_t unpack8(const uint8_t* low, const uint8_t* high) {
    uint64_t l = load(low, 4);
    l = (l | l << 16) & UINT64_C(0x0000ffff0000ffff);
    l = (l | l << 8) & UINT64_C(0x00ff00ff00ff00ff);
    l = (l | l << 4) & every_byte(0x0f);
    uint64_t h = load(high, 2);
    h = (h | h << 24) & UINT64_C(0x000000ff000000ff);
    h = (h | h << 12) & UINT64_C(0x000f000f000f000f);
    h = (h | h << 6) & every_byte(0x03);
    const uint64_t code = (l | h << 4) ^ every_byte(0x20);  // two's complement in 6 bits
    return code | (code & every_byte(0x20)) * 6;           // bit 5 repeated in bits 6 and 7
}

[[noreturn]] void fail_range(const int8_t* codes, size_t row, size_t columns) {
    size_t column = 0;
    while (column + 1 < columns && codes[column] >= -32 && codes[column] <= 31) column++;
    throw std::invalid_argument("codes[" + std::to_string(row) + ", " + std::to_string(column) + "] is " +
                                std::to_string(int(codes[column])) + ", but int6 codes lie in -32..31");
}

bool pack_row(const int8_t* codes, size_t columns, uint8_t* packed) {
    uint8_t* high = packed + (columns + 7) / 8 * 4;
    const size_t whole = columns / 8 * 8;
    bool good = true;
    for (size_t i = 0; i < whole; i += 8, packed += 4, high += 2) {
        const uint64_t word = load(codes + i, 8);
        good &= all_in_range(word);
        pack8(word, packed, high);
    }
    if (whole == columns) return good;
    const uint64_t word = load(codes + whole, columns - whole);  // the bytes left zero are the padding code
    pack8(word, packed, high);
    return good && all_in_range(word);
}

void unpack_row(const uint8_t* packed, size_t columns, int8_t* codes) {
    const uint8_t* high = packed + (columns + 7) / 8 * 4;
    const size_t whole = columns / 8 * 8;
    for (size_t i = 0; i < whole; i += 8, packed += 4, high += 2) store(codes + i, unpack8(packed, high), 8);
    if (whole < columns) store(codes + whole, unpack8(packed, high), columns - whole);
}

}  // namespace

void int6_pack(const int8_t* codes, size_t rows, size_t columns, uint8_t* packed) {
    for (size_t row = 0; row < rows; row++, codes += columns, packed += int6_row_bytes(columns))
        if (!pack_row(codes, columns, packed)) fail_range(codes, row, columns);
}

void int6_unpack(const uint8_t* packed, size_t rows, size_t columns, int8_t* codes) {
    for (size_t row = 0; row < rows; row++, codes += columns, packed += int6_row_bytes(columns))
        unpack_row(packed, columns, codes);
}

}  // namespace pgolf
