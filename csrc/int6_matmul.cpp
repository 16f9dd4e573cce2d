#include "int6_matmul.h"

#include <algorithm>
#include <vector>

#include "bits_row.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PGOLF_FMA __attribute__((target("avx2,fma")))
#endif

namespace pgolf {
namespace {

constexpr size_t kBlock = 64;  // codes that are unpacked together: 32 bytes of the low plane, 16 of the other
constexpr size_t kLanes = 8;
constexpr size_t kCodes = 4;   // rows of codes in a tile
constexpr size_t kInputs = 3;  // rows of x in a tile: 12 sums, which with their operands fill 16 registers

using Sums = float[kInputs][kCodes];

// Rows of x and of codes are held in blocks, the even elements of a block before the odd ones: two codes of one byte
// then belong to two registers, and nothing has to be interleaved. The last block is padded; there x is zero.
size_t padded_to_blocks(size_t depth) { return (depth + kBlock - 1) / kBlock * kBlock; }

float widened(float value) { return value; }

float widened(uint16_t value) {
    const uint32_t word = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &word, sizeof wide);
    return wide;
}

template <class Value>
void arrange(const Value* x, size_t depth, float* blocks) {
    size_t k = 0;
    for (; k + kBlock <= depth; k += kBlock)
        for (size_t i = 0; i < kBlock / 2; i++) {
            blocks[k + i] = widened(x[k + 2 * i]);
            blocks[k + kBlock / 2 + i] = widened(x[k + 2 * i + 1]);
        }
    for (size_t i = 0; k + i < depth; i++) blocks[k + i % 2 * (kBlock / 2) + i / 2] = widened(x[k + i]);
}

// Calls work(low, two, first code) for the bytes of every block of a packed row; the last is copied and padded.
template <class Work>
__attribute__((always_inline)) inline void for_blocks(const uint8_t* packed, size_t depth, const Work& work) {
    const Planes<6, const uint8_t> planes(packed, depth);
    size_t k = 0;
    for (; k + kBlock <= depth; k += kBlock) work(planes.low + k / 2, planes.two + k / 4, k);
    if (k == depth) return;
    uint8_t low[kBlock / 2] = {}, two[kBlock / 4] = {};
    std::memcpy(low, planes.low + k / 2, (depth + 7 - k) / 8 * 4);
    std::memcpy(two, planes.two + k / 4, (depth + 7 - k) / 8 * 2);
    work(low, two, k);
}

void unpack_portable(const uint8_t* packed, size_t depth, float* codes) {
    for_blocks(packed, depth, [&](const uint8_t* low, const uint8_t* two, size_t k) {
        uint8_t fields[kBlock / 2];  // in the low half of each byte, those of an even and an odd code
        for (size_t i = 0; i < kBlock / 4; i++) {
            fields[2 * i] = two[i] & 15;
            fields[2 * i + 1] = two[i] >> 4;
        }
        for (size_t i = 0; i < kBlock / 2; i++) {
            codes[k + i] = float((low[i] & 15) + (fields[i] & 3) * 16 - 32);
            codes[k + kBlock / 2 + i] = float((low[i] >> 4) + (fields[i] >> 2) * 16 - 32);
        }
    });
}

// Sums of products of `inputs` rows of x, at most kInputs, and kCodes rows of codes, all of `depth` elements.
void dot_portable(size_t inputs, const float* x, const float* codes, size_t depth, Sums& sums) {
    for (size_t m = 0; m < inputs; m++)
        for (size_t n = 0; n < kCodes; n++) {
            float t[kLanes] = {};
            for (size_t k = 0; k < depth; k += kLanes)
                for (size_t i = 0; i < kLanes; i++) t[i] += x[m * depth + k + i] * codes[n * depth + k + i];
            sums[m][n] = ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
        }
}

#if defined(__x86_64__)
struct Block {
    __m256i even, odd;  // 32 codes each
};

PGOLF_FMA inline Block unpack_block(const uint8_t* low, const uint8_t* two) {
    const __m256i nibble = _mm256_set1_epi8(15), half = _mm256_set1_epi8(32);
    const __m256i fields = _mm256_set1_epi16(0x33), spread = _mm256_set1_epi16(0x110), top = _mm256_set1_epi8(0x30);
    const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
    const __m256i t = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(two)));
    // a word of t holds four fields of two bits; the product puts two of them above the nibbles of their codes
    const __m256i even = _mm256_and_si256(_mm256_mullo_epi16(_mm256_and_si256(t, fields), spread), top);
    const __m256i t2 = _mm256_srli_epi16(t, 2);
    const __m256i odd = _mm256_and_si256(_mm256_mullo_epi16(_mm256_and_si256(t2, fields), spread), top);
    const __m256i l4 = _mm256_srli_epi16(l, 4);
    return {_mm256_sub_epi8(_mm256_or_si256(_mm256_and_si256(l, nibble), even), half),
            _mm256_sub_epi8(_mm256_or_si256(_mm256_and_si256(l4, nibble), odd), half)};
}

PGOLF_FMA inline __m256 widen8(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

PGOLF_FMA inline void store32(__m256i codes, float* to) {
    const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
    _mm256_storeu_ps(to, widen8(low));
    _mm256_storeu_ps(to + 8, widen8(_mm_srli_si128(low, 8)));
    _mm256_storeu_ps(to + 16, widen8(high));
    _mm256_storeu_ps(to + 24, widen8(_mm_srli_si128(high, 8)));
}

PGOLF_FMA inline void add32(__m256i codes, const float* x, __m256 (&sums)[4]) {
    const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
    sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(x), widen8(low), sums[0]);
    sums[1] = _mm256_fmadd_ps(_mm256_loadu_ps(x + 8), widen8(_mm_srli_si128(low, 8)), sums[1]);
    sums[2] = _mm256_fmadd_ps(_mm256_loadu_ps(x + 16), widen8(high), sums[2]);
    sums[3] = _mm256_fmadd_ps(_mm256_loadu_ps(x + 24), widen8(_mm_srli_si128(high, 8)), sums[3]);
}

PGOLF_FMA inline float sum_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

PGOLF_FMA void unpack_avx2(const uint8_t* packed, size_t depth, float* codes) {
    for_blocks(packed, depth, [&](const uint8_t* low, const uint8_t* two, size_t k) PGOLF_FMA {
        const auto [even, odd] = unpack_block(low, two);
        store32(even, codes + k);
        store32(odd, codes + k + kBlock / 2);
    });
}

// The product of one row of x and one packed row, without storing codes.
PGOLF_FMA float dot_packed_avx2(const float* x, const uint8_t* packed, size_t depth) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for_blocks(packed, depth, [&](const uint8_t* low, const uint8_t* two, size_t k) PGOLF_FMA {
        const auto [even, odd] = unpack_block(low, two);
        add32(even, x + k, sums);
        add32(odd, x + k + kBlock / 2, sums);
    });
    return sum_lanes(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

template <size_t M>
PGOLF_FMA inline void tile_avx2(const float* x, const float* codes, size_t depth, Sums& sums) {
    __m256 total[M][kCodes];
    for (size_t m = 0; m < M; m++)
        for (size_t n = 0; n < kCodes; n++) total[m][n] = _mm256_setzero_ps();
    for (size_t k = 0; k < depth; k += kLanes) {
        __m256 left[M];
        for (size_t m = 0; m < M; m++) left[m] = _mm256_loadu_ps(x + m * depth + k);
        for (size_t n = 0; n < kCodes; n++) {
            const __m256 right = _mm256_loadu_ps(codes + n * depth + k);
            for (size_t m = 0; m < M; m++) total[m][n] = _mm256_fmadd_ps(left[m], right, total[m][n]);
        }
    }
    for (size_t m = 0; m < M; m++)
        for (size_t n = 0; n < kCodes; n++) sums[m][n] = sum_lanes(total[m][n]);
}

PGOLF_FMA void dot_avx2(size_t inputs, const float* x, const float* codes, size_t depth, Sums& sums) {
    if (inputs == 1) return tile_avx2<1>(x, codes, depth, sums);
    if (inputs == 2) return tile_avx2<2>(x, codes, depth, sums);
    tile_avx2<3>(x, codes, depth, sums);
}

#else
float dot_packed_avx2(const float*, const uint8_t*, size_t) { return 0; }
constexpr auto unpack_avx2 = unpack_portable;
constexpr auto dot_avx2 = dot_portable;
#endif

template <class Value>
void multiply(const Value* x, size_t rows, size_t depth, const uint8_t* packed, const float* scale, size_t columns,
              Value* y, BitsOptions options) {
    const size_t padded = padded_to_blocks(depth), row_bytes = packed_row_bytes(depth, 6);
    const bool simd = options.simd && int6_simd();
    const auto unpack = simd ? unpack_avx2 : unpack_portable;
    const auto dot = simd ? dot_avx2 : dot_portable;
    std::vector<float> blocks(rows * padded);
    for (size_t m = 0; m < rows; m++) arrange(x + m * depth, depth, blocks.data() + m * padded);
    const size_t piece = std::max<size_t>(1, kSharedWork / std::max<size_t>(1, padded * rows * kCodes)) * kCodes;
    run_on_pool((columns + piece - 1) / piece, options.threads, [&](size_t index) {
        const size_t end = std::min(columns, (index + 1) * piece);
        if (simd && rows == 1) {
            for (size_t n = index * piece; n < end; n++)
                y[n] = rounded(scale[n] * dot_packed_avx2(blocks.data(), packed + n * row_bytes, depth), y);
            return;
        }
        std::vector<float> codes(kCodes * padded);
        Sums sums;
        for (size_t n = index * piece; n < end; n += kCodes) {
            const size_t count = std::min(kCodes, end - n);  // the rest of the tile holds earlier codes
            for (size_t j = 0; j < count; j++) unpack(packed + (n + j) * row_bytes, depth, codes.data() + j * padded);
            for (size_t m = 0; m < rows; m += kInputs) {
                const size_t inputs = std::min(kInputs, rows - m);
                dot(inputs, blocks.data() + m * padded, codes.data(), padded, sums);
                for (size_t i = 0; i < inputs; i++)
                    for (size_t j = 0; j < count; j++)
                        y[(m + i) * columns + n + j] = rounded(scale[n + j] * sums[i][j], y);
            }
        }
    });
}

}  // namespace

bool int6_simd() {
#if defined(__x86_64__)
    static const bool has = has_avx2() && __builtin_cpu_supports("fma");
    return has;
#else
    return false;
#endif
}

void int6_matmul(const float* x, size_t rows, size_t depth, const uint8_t* packed, const float* scale, size_t columns,
                 float* y, BitsOptions options) {
    multiply(x, rows, depth, packed, scale, columns, y, options);
}

void int6_matmul(const uint16_t* x, size_t rows, size_t depth, const uint8_t* packed, const float* scale,
                 size_t columns, uint16_t* y, BitsOptions options) {
    multiply(x, rows, depth, packed, scale, columns, y, options);
}

}  // namespace pgolf
