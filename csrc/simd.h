// Vectors of kLanes float32 for one instruction set, by the vector extensions of GCC and clang. There is no include
// guard: passes_<set>.cpp includes this inside the set's own namespace after choosing PGOLF_LANES, so that no function
// compiled for one set can be linked into another. Sums are float32 and bf16 is rounded to nearest even.

#define PGOLF_INLINE static inline __attribute__((always_inline, unused))

constexpr size_t kLanes = PGOLF_LANES;
typedef float vec __attribute__((vector_size(4 * PGOLF_LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * PGOLF_LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * PGOLF_LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * PGOLF_LANES)));

struct Whole {  // a vector with all its lanes
    static constexpr size_t lanes = kLanes;
};
struct Part {  // the first `lanes` of a vector; the others are zero when loaded
    size_t lanes;
};

PGOLF_INLINE vec splat(float x) { return x - vec{}; }
PGOLF_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
PGOLF_INLINE vec min(vec a, vec b) { return a < b ? a : b; }

#ifdef PGOLF_AVX512
// GCC 12 converts such vectors by halves, through memory.
PGOLF_INLINE uvec extend(hvec x) { return (uvec)_mm512_cvtepu16_epi32((__m256i)x); }
PGOLF_INLINE hvec truncate(uvec x) { return (hvec)_mm512_cvtepi32_epi16((__m512i)x); }
#else
PGOLF_INLINE uvec extend(hvec x) { return __builtin_convertvector(x, uvec); }
PGOLF_INLINE hvec truncate(uvec x) { return __builtin_convertvector(x, hvec); }
#endif

PGOLF_INLINE vec widen(hvec half) { return (vec)(extend(half) << 16); }

#ifdef PGOLF_AVX512
// Subnormal numbers become zero.
PGOLF_INLINE hvec narrow(vec x) { return (hvec)_mm512_cvtneps_pbh(x); }
#else
PGOLF_INLINE hvec narrow(vec x) {
    const uvec u = (uvec)x;
    const uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const uvec kept = (uvec)(x == x ? (ivec)rounded : (ivec)((u >> 16) | 0x40));  // NaN stays NaN
    return truncate(kept);
}
#endif

template <class Lanes>
PGOLF_INLINE vec load(const float* p, Lanes n) {
    vec x{};
    __builtin_memcpy(&x, p, 4 * n.lanes);
    return x;
}
template <class Lanes>
PGOLF_INLINE vec load(const bf16* p, Lanes n) {
    hvec half{};
    __builtin_memcpy(&half, p, 2 * n.lanes);
    return widen(half);
}
template <class Lanes>
PGOLF_INLINE void store(float* p, vec x, Lanes n) {
    __builtin_memcpy(p, &x, 4 * n.lanes);
}
template <class Lanes>
PGOLF_INLINE void store(bf16* p, vec x, Lanes n) {
    const hvec half = narrow(x);
    __builtin_memcpy(p, &half, 2 * n.lanes);
}
template <class T>
PGOLF_INLINE vec load(const T* p) {
    return load(p, Whole{});
}
template <class T>
PGOLF_INLINE void store(T* p, vec x) {
    store(p, x, Whole{});
}

// Products sum over elements of type E: float, or two bf16 that are neighbors along the summed dimension. Reads go
// through memcpy, since the same memory holds float, bf16 and pairs of them in turn.
typedef uint32_t bf16x2;
template <class E>
constexpr size_t kTerms = 1;  // terms of the sum in an element
template <>
inline constexpr size_t kTerms<bf16x2> = 2;

PGOLF_INLINE vec load_terms(const float* p) { return load(p); }
PGOLF_INLINE vec spread_terms(const float* p) { return splat(load(p, Part{1})[0]); }
PGOLF_INLINE void add_product(vec& sum, vec a, vec b) { sum += a * b; }

#ifdef PGOLF_AVX512
template <class T>  // the element in which products of T are computed
using Element = std::conditional_t<std::is_same_v<T, bf16>, bf16x2, float>;

PGOLF_INLINE uvec load_terms(const bf16x2* p) {
    uvec x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
PGOLF_INLINE uvec spread_terms(const bf16x2* p) {
    bf16x2 x;
    __builtin_memcpy(&x, p, sizeof x);
    return x - uvec{};
}
PGOLF_INLINE void add_product(vec& sum, uvec a, uvec b) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
// Lanes of a in the lower halves, of b in the upper ones, both rounded to bf16.
PGOLF_INLINE uvec zip(vec a, vec b) {
    return extend(narrow(a)) | extend(narrow(b)) << 16;
}
#else
template <class T>
using Element = float;
#endif

#ifdef PGOLF_AVX512
PGOLF_INLINE __mmask16 mask(Part n) { return __mmask16((1u << n.lanes) - 1); }
PGOLF_INLINE vec load(const float* p, Part n) { return _mm512_maskz_loadu_ps(mask(n), p); }
PGOLF_INLINE vec load(const bf16* p, Part n) { return widen((hvec)_mm256_maskz_loadu_epi16(mask(n), p)); }
PGOLF_INLINE void store(float* p, vec x, Part n) { _mm512_mask_storeu_ps(p, mask(n), x); }
PGOLF_INLINE void store(bf16* p, vec x, Part n) { _mm256_mask_storeu_epi16(p, mask(n), (__m256i)narrow(x)); }
PGOLF_INLINE float sum(vec x) { return _mm512_reduce_add_ps(x); }
PGOLF_INLINE float largest(vec x) { return _mm512_reduce_max_ps(x); }
#else
PGOLF_INLINE float sum(vec x) {
    float part[kLanes];
    __builtin_memcpy(part, &x, sizeof part);
    for (size_t n = kLanes / 2; n; n /= 2)
        for (size_t i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
}

PGOLF_INLINE float largest(vec x) {
    float part[kLanes];
    __builtin_memcpy(part, &x, sizeof part);
    for (size_t n = kLanes / 2; n; n /= 2)
        for (size_t i = 0; i < n; i++) part[i] = part[i] > part[i + n] ? part[i] : part[i + n];
    return part[0];
}
#endif

// The lanes that hold elements keep x, the others become `rest`.
PGOLF_INLINE vec select(vec x, vec, Whole) { return x; }
PGOLF_INLINE vec select(vec x, vec rest, Part n) {
    ivec index{};
    for (size_t i = 0; i < kLanes; i++) index[i] = int32_t(i);
    return index < int32_t(n.lanes) ? x : rest;
}

// e^x = power * (1 + rest).
struct Exponential {
    vec power, rest;
};

// e^x with a relative error below 2e-7 for x in -87.3 to 88. Smaller x give e^-87.3, larger ones e^88, NaN gives NaN.
PGOLF_INLINE Exponential exponential(vec x) {
    x = min(splat(88.0f), max(splat(-87.3f), x));  // in this order both keep NaN
    const vec shift = splat(12582912.0f);          // 1.5 * 2^23: adding it rounds to an integer
    const vec n = (x * 1.44269504f + shift) - shift;
    vec r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    vec p = splat(1.0f / 5040) * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    return {(vec)((__builtin_convertvector(n, ivec) + 127) << 23), p * r};
}

PGOLF_INLINE vec exp(vec x) {
    const Exponential e = exponential(x);
    return e.power * (e.rest + 1.0f);
}

// The relative error is below 4e-7, also near zero, where the arguments are if the softcap is large.
PGOLF_INLINE vec tanh(vec x) {
    const uvec sign = (uvec)x & 0x80000000u;
    const Exponential e = exponential(-2.0f * (vec)((uvec)x ^ sign));  // (1 - e^-2|x|) / (1 + e^-2|x|)
    const vec change = e.power * e.rest + (e.power - 1.0f);
    return (vec)((uvec)(-change / (change + 2.0f)) ^ sign);
}

PGOLF_INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

// Calls body(i, lanes) for begin <= i < end in steps of a vector; the last one may be a part.
template <class Body>
PGOLF_INLINE void sweep(size_t begin, size_t end, const Body& body) {
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, Whole{});
    if (i < end) body(i, Part{end - i});
}

// Calls body(row, block) for every row, on several threads, one block of `each` rows at a time.
template <class Body>
void over_rows(size_t rows, size_t each, size_t threads, const Body& body) {
    run_on_pool((rows + each - 1) / each, threads, [&](size_t block) {
        for (size_t row = block * each; row < std::min(rows, (block + 1) * each); row++) body(row, block);
    });
}

// Calls body(T{}) with the element type T that `type` names.
template <class Body>
void as_type(Type type, const Body& body) {
    type == Type::f32 ? body(float{}) : body(bf16{});
}
