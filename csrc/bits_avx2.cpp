#include "bits_row.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace pgolf {

bool has_avx2() {
    static const bool has = __builtin_cpu_supports("avx2");
    return has;
}

template <int bits>
PGOLF_AVX2 size_t pack_blocks_avx2(const int8_t* codes, size_t count, Planes<bits, uint8_t> planes, bool& good) {
    const __m256i half = _mm256_set1_epi8(1 << (bits - 1));
    const __m256i beyond = _mm256_set1_epi8(static_cast<char>(~((1 << bits) - 1)));
    __m256i seen = _mm256_setzero_si256();
    size_t done = 0;
    for (; done + 32 <= count; done += 32) {
        const __m256i u =
            _mm256_add_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + done)), half);
        seen = _mm256_or_si256(seen, u);
        const __m256i nibbles = _mm256_and_si256(u, _mm256_set1_epi8(0x0f));
        const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));  // even + 16 * odd
        _mm_storeu_si128(reinterpret_cast<__m128i*>(planes.low),
                         _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
        const __m256i two = _mm256_and_si256(_mm256_srli_epi16(u, 4), _mm256_set1_epi8(0x03));
        const __m256i quads = _mm256_madd_epi16(_mm256_maddubs_epi16(two, _mm256_set1_epi16(0x0401)),
                                                _mm256_set1_epi32(0x00100001));
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(planes.two), _mm_packus_epi16(words, words));
        planes.skip(32);
    }
    good &= _mm256_testz_si256(seen, beyond) != 0;
    return done;
}

template <int bits>
PGOLF_AVX2 size_t unpack_blocks_avx2(Planes<bits, const uint8_t> planes, size_t count, int8_t* codes) {
    const __m256i half = _mm256_set1_epi8(1 << (bits - 1));
    size_t done = 0;
    for (; done + 32 <= count; done += 32) {
        const __m256i pairs =
            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes.low)));
        __m256i u = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(0x0f));
        __m256i two = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(planes.two)));
        two = _mm256_or_si256(two, _mm256_slli_epi32(two, 12));
        two = _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi32(two, 6)), _mm256_set1_epi8(0x03));
        u = _mm256_or_si256(u, _mm256_slli_epi16(two, 4));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + done), _mm256_sub_epi8(u, half));
        planes.skip(32);
    }
    return done;
}

PGOLF_AVX2 void scale_codes_avx2(const int8_t* codes, size_t count, float scale, float* values) {
    scale_codes(codes, count, scale, values);
}

PGOLF_AVX2 void scale_codes_avx2(const int8_t* codes, size_t count, float scale, uint16_t* values) {
    scale_codes(codes, count, scale, values);
}

#else

namespace pgolf {

bool has_avx2() { return false; }

template <int bits>
size_t pack_blocks_avx2(const int8_t*, size_t, Planes<bits, uint8_t>, bool&) {
    return 0;
}

template <int bits>
size_t unpack_blocks_avx2(Planes<bits, const uint8_t>, size_t, int8_t*) {
    return 0;
}

void scale_codes_avx2(const int8_t* codes, size_t count, float scale, float* values) {
    scale_codes(codes, count, scale, values);
}

void scale_codes_avx2(const int8_t* codes, size_t count, float scale, uint16_t* values) {
    scale_codes(codes, count, scale, values);
}

#endif

template size_t pack_blocks_avx2<6>(const int8_t*, size_t, Planes<6, uint8_t>, bool&);
template size_t unpack_blocks_avx2<6>(Planes<6, const uint8_t>, size_t, int8_t*);

}  // namespace pgolf
