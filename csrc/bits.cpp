#include "bits.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "bits_row.h"
#include "parallel.h"

namespace pgolf {
namespace {

// One 64-bit word holds eight codes, code i in byte i counted from the lowest. On little-endian machines a copy of
// constant size is one move; compilers do not do that for the loops below, which are three times slower.
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

constexpr uint64_t every_byte(int byte) { return UINT64_C(0x0101010101010101) * static_cast<uint8_t>(byte); }

// Copies the top bit of the lowest `bits` bits of each byte into the bits above, which are zero.
template <int bits>
constexpr uint64_t sign_extend(uint64_t codes) {
    return codes | (codes & every_byte(1 << (bits - 1))) * ((256 >> (bits - 1)) - 2);
}

template <int bits>
bool all_in_range(uint64_t codes) {
    return sign_extend<bits>(codes & every_byte((1 << bits) - 1)) == codes;
}

template <int bits>
void pack8(uint64_t codes, const Planes<bits, uint8_t>& planes) {
    // code + 2^(bits-1), without carries between bytes
    const uint64_t u = (codes ^ every_byte(1 << (bits - 1))) & every_byte((1 << bits) - 1);
    uint64_t low = u & every_byte(0x0f);
    low = (low | low >> 4) & UINT64_C(0x00ff00ff00ff00ff);
    low = (low | low >> 8) & UINT64_C(0x0000ffff0000ffff);
    store(planes.low, low | low >> 16, 4);
    uint64_t two = u >> 4 & every_byte(0x03);
    two = (two | two >> 6) & UINT64_C(0x000f000f000f000f);
    two = (two | two >> 12) & UINT64_C(0x000000ff000000ff);
    store(planes.two, two | two >> 24, 2);
}

template <int bits>
uint64_t unpack8(const Planes<bits, const uint8_t>& planes) {
    uint64_t u = load(planes.low, 4);
    u = (u | u << 16) & UINT64_C(0x0000ffff0000ffff);
    u = (u | u << 8) & UINT64_C(0x00ff00ff00ff00ff);
    u = (u | u << 4) & every_byte(0x0f);
    uint64_t two = load(planes.two, 2);
    two = (two | two << 24) & UINT64_C(0x000000ff000000ff);
    two = (two | two << 12) & UINT64_C(0x000f000f000f000f);
    two = (two | two << 6) & every_byte(0x03);
    u |= two << 4;
    return sign_extend<bits>(u ^ every_byte(1 << (bits - 1)));
}

// Returns whether all codes are in range.
template <int bits>
bool pack_row(const int8_t* codes, size_t columns, uint8_t* packed, bool simd) {
    Planes<bits, uint8_t> planes(packed, columns);
    bool good = true;
    size_t i = simd ? pack_blocks_avx2<bits>(codes, columns, planes, good) : 0;
    planes.skip(i);
    for (; i + 8 <= columns; i += 8, planes.skip(8)) {
        const uint64_t word = load(codes + i, 8);
        good &= all_in_range<bits>(word);
        pack8<bits>(word, planes);
    }
    if (i == columns) return good;
    const uint64_t word = load(codes + i, columns - i);  // bytes left zero are the padding code
    pack8<bits>(word, planes);
    return good && all_in_range<bits>(word);
}

template <>
bool pack_row<8>(const int8_t* codes, size_t columns, uint8_t* packed, bool) {
    std::copy_n(codes, columns, packed);
    return true;
}

// Unpacks `count` codes from the position of `planes`; `count` is a multiple of 8 except at the end of a row.
template <int bits>
void unpack_some(Planes<bits, const uint8_t> planes, size_t count, int8_t* codes, bool simd) {
    size_t i = simd ? unpack_blocks_avx2<bits>(planes, count, codes) : 0;
    planes.skip(i);
    for (; i + 8 <= count; i += 8, planes.skip(8)) store(codes + i, unpack8<bits>(planes), 8);
    if (i < count) store(codes + i, unpack8<bits>(planes), count - i);
}

template <int bits>
void unpack_row(const uint8_t* packed, size_t columns, int8_t* codes, bool simd) {
    unpack_some<bits>({packed, columns}, columns, codes, simd);
}

template <>
void unpack_row<8>(const uint8_t* packed, size_t columns, int8_t* codes, bool) {
    std::copy_n(packed, columns, reinterpret_cast<uint8_t*>(codes));
}

template <class Value>
void scale_some(const int8_t* codes, size_t count, float scale, Value* values, bool simd) {
    if (simd)
        scale_codes_avx2(codes, count, scale, values);
    else
        scale_codes(codes, count, scale, values);
}

template <int bits, class Value>
void dequantize_row(const uint8_t* packed, size_t columns, float scale, Value* values, bool simd) {
    if constexpr (bits == 8) {
        scale_some(reinterpret_cast<const int8_t*>(packed), columns, scale, values, simd);
    } else {
        int8_t codes[512];  // fits the L1 cache
        Planes<bits, const uint8_t> planes(packed, columns);
        for (size_t i = 0; i < columns; i += sizeof codes, planes.skip(sizeof codes)) {
            const size_t count = std::min(sizeof codes, columns - i);
            unpack_some<bits>(planes, count, codes, simd);
            scale_some(codes, count, scale, values + i, simd);
        }
    }
}

[[noreturn]] void fail_range(const int8_t* codes, size_t row, size_t columns, int bits) {
    const int smallest = -(1 << (bits - 1)), largest = -smallest - 1;
    codes += row * columns;
    const int8_t* bad = std::find_if(codes, codes + columns, [=](int8_t c) { return c < smallest || c > largest; });
    throw std::invalid_argument("codes[" + std::to_string(row) + ", " + std::to_string(bad - codes) + "] is " +
                                std::to_string(int(*bad)) + ", but " + std::to_string(bits) + "-bit codes are in " +
                                std::to_string(smallest) + ".." + std::to_string(largest));
}

// Calls work(row) for all rows; threads take pieces of 2^18 codes, long enough to pay for starting a thread.
template <class Work>
void for_rows(size_t rows, size_t columns, size_t threads, const Work& work) {
    const size_t piece = std::max<size_t>(1, (size_t(1) << 18) / std::max<size_t>(1, columns));
    const size_t pieces = (rows + piece - 1) / piece;
    parallel_for(pieces, pieces < 4 ? 1 : threads, [&](size_t i) {
        for (size_t row = i * piece; row < std::min(rows, (i + 1) * piece); row++) work(row);
    });
}

// Calls function(std::integral_constant<int, bits>).
template <class Function>
void with_bits(int bits, const Function& function) {
    switch (bits) {
        case 6: return function(std::integral_constant<int, 6>{});
        case 8: return function(std::integral_constant<int, 8>{});
        default: throw std::invalid_argument("bits is " + std::to_string(bits) + ", but codes have 6 or 8 bits");
    }
}

template <class Value>
void dequantize(const uint8_t* packed, const float* scale, size_t rows, size_t columns, int bits, Value* values,
                BitsOptions options) {
    const bool simd = options.simd && has_avx2();
    with_bits(bits, [&](auto width) {
        for_rows(rows, columns, options.threads, [&](size_t row) {
            dequantize_row<width>(packed + row * packed_row_bytes(columns, width), columns, scale[row],
                                  values + row * columns, simd);
        });
    });
}

}  // namespace

void pack_bits(const int8_t* codes, size_t rows, size_t columns, int bits, uint8_t* packed, BitsOptions options) {
    const bool simd = options.simd && has_avx2();
    std::atomic<size_t> first_bad{rows};
    with_bits(bits, [&](auto width) {
        for_rows(rows, columns, options.threads, [&](size_t row) {
            if (pack_row<width>(codes + row * columns, columns, packed + row * packed_row_bytes(columns, width), simd))
                return;
            for (size_t now = first_bad; row < now && !first_bad.compare_exchange_weak(now, row);) continue;
        });
    });
    if (first_bad < rows) fail_range(codes, first_bad, columns, bits);
}

void unpack_bits(const uint8_t* packed, size_t rows, size_t columns, int bits, int8_t* codes, BitsOptions options) {
    const bool simd = options.simd && has_avx2();
    with_bits(bits, [&](auto width) {
        for_rows(rows, columns, options.threads, [&](size_t row) {
            unpack_row<width>(packed + row * packed_row_bytes(columns, width), columns, codes + row * columns, simd);
        });
    });
}

void dequantize_bits(const uint8_t* packed, const float* scale, size_t rows, size_t columns, int bits, float* values,
                     BitsOptions options) {
    dequantize(packed, scale, rows, columns, bits, values, options);
}

void dequantize_bits(const uint8_t* packed, const float* scale, size_t rows, size_t columns, int bits,
                     uint16_t* values, BitsOptions options) {
    dequantize(packed, scale, rows, columns, bits, values, options);
}

const char* bits_simd() { return has_avx2() ? "AVX2" : "none"; }

}  // namespace pgolf
