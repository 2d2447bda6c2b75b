// Vectors of 16 floats, packing of keys and values, and the small matrix products of cpu_kernels.cpp.
//
// Portable: the vectors are GCC's and Clang's, which lower to whatever the target has. Only the bf16 dot product and what
// feeds it name instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_BF16_DOT 1
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 64;                     // keys packed at a time, and columns of one product
constexpr int kColumns = kBlock / kLanes;      // vectors across a block
#ifdef __AVX512F__
constexpr int kRows = 6;                       // rows of a product that fit the registers
#else
constexpr int kRows = 1;
#endif
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef float LooseVec __attribute__((vector_size(64), aligned(2), may_alias));
struct Bf16 { uint16_t bits; };
struct Bf16Pair { uint32_t bits; };            // element 2i in the low half, 2i + 1 in the high half

Vec load(const void* p) { return *static_cast<const LooseVec*>(p); }
void store(void* p, Vec v) { *static_cast<LooseVec*>(p) = v; }
Vec splat(float x) { return Vec{} + x; }
Vec larger(Vec a, Vec b) { return a > b ? a : b; }
int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

float to_float(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
void assign(float& to, float x) { to = x; }
void assign(Bf16& to, float x) {               // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- vector arithmetic ----

template <int Step, int... L>
Vec rotate_add(Vec v, std::integer_sequence<int, L...>) { return v + __builtin_shufflevector(v, v, (L ^ Step)...); }
template <int Step, int... L>
Vec rotate_max(Vec v, std::integer_sequence<int, L...>) { return larger(v, __builtin_shufflevector(v, v, (L ^ Step)...)); }
using Lanes = std::make_integer_sequence<int, kLanes>;

float sum(Vec v) {
    v = rotate_add<8>(v, Lanes{}), v = rotate_add<4>(v, Lanes{}), v = rotate_add<2>(v, Lanes{});
    return rotate_add<1>(v, Lanes{})[0];
}
float maximum(Vec v) {
    v = rotate_max<8>(v, Lanes{}), v = rotate_max<4>(v, Lanes{}), v = rotate_max<2>(v, Lanes{});
    return rotate_max<1>(v, Lanes{})[0];
}

// exp(x) for x <= 0: 2^n times a Taylor series on [-ln2/2, ln2/2]; degree 7 is exact to an ulp, degree 4 to 4e-5.
template <int Degree>
Vec exponential(Vec x) {
    constexpr float inverse_factorial[] = {1.f, 1.f, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
    constexpr float shifter = 12582912.f;      // 1.5 * 2^23: adding it rounds to an integer
    Vec clamped = larger(x, splat(-87.f));
    Vec shifted = clamped * 1.44269504f + shifter;
    Vec n = shifted - shifter;
    Vec r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
    Vec y = splat(inverse_factorial[Degree]);
    for (int i = Degree - 1; i >= 0; --i) y = y * r + inverse_factorial[i];
    IntVec power = ((IntVec)shifted - (IntVec)splat(shifter) + 127) << 23;
    return x < -87.f ? Vec{} : y * (Vec)power;
}

Vec hyperbolic_tangent(Vec x) {                // odd series near 0, where the quotient would cancel
    Vec magnitude = x < 0.f ? -x : x;
    Vec e = exponential<7>(-2.f * magnitude);
    Vec quotient = (1.f - e) / (1.f + e);
    Vec s = x * x;
    Vec series = x * (1.f + s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835 - s * (1382.f / 155925))))));
    return magnitude < 0.25f ? series : (x < 0.f ? -quotient : quotient);
}

// ---- packing ----
// A *unit* is what one lane multiplies at a time: a float, or a pair of bf16.

template <class Unit> constexpr int kPerUnit = sizeof(Unit) == sizeof(float) && std::is_same<Unit, Bf16Pair>::value ? 2 : 1;

Vec widen(const Bf16* p) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
    return v;
}
template <class Unit> Vec load_units(const float* p) { return load(p); }
template <class Unit> Vec load_units(const Bf16* p) {
    if constexpr (kPerUnit<Unit> == 2) return load(p);
    else return widen(p);
}

// Elements [first, first + 16 units) of a row of `size`, zero past its end and for a missing row.
template <class Unit, class Stored>
Vec row_units(const Stored* row, int first, int size) {
    constexpr int wanted = kLanes * kPerUnit<Unit>;
    if (row && first + wanted <= size) return load_units<Unit>(row + first);
    Stored padded[wanted] = {};
    if (row && first < size) std::memcpy(padded, row + first, sizeof(Stored) * (size - first));
    return load_units<Unit>(padded);
}

template <int Step, int... L>
void exchange(Vec& a, Vec& b, std::integer_sequence<int, L...>) {
    Vec low = __builtin_shufflevector(a, b, ((L & Step) ? kLanes + L - Step : L)...);
    b = __builtin_shufflevector(a, b, ((L & Step) ? kLanes + L : L + Step)...);
    a = low;
}
template <int Step>
void transpose_step(Vec* v) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & Step)) exchange<Step>(v[i], v[i + Step], Lanes{});
}

template <class Stored>
const Stored* at(const Stored* row, int64_t offset) { return row ? row + offset : nullptr; }

// out[unit][64 keys]
template <class Unit, class Stored>
void pack_keys(const Stored* const* rows, int64_t offset, int size, Unit* out) {
    int units = (size + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
    for (int first = 0; first < units; first += kLanes)
        for (int key = 0; key < kBlock; key += kLanes) {
            Vec v[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) v[i] = row_units<Unit>(at(rows[key + i], offset), first * kPerUnit<Unit>, size);
            transpose_step<8>(v), transpose_step<4>(v), transpose_step<2>(v), transpose_step<1>(v);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(out + (first + i) * kBlock + key, v[i]);
        }
}

// out[key or pair of keys][width]
template <class Unit, class Stored>
void pack_values(const Stored* const* rows, int64_t offset, int size, int width, Unit* out) {
    for (int key = 0; key < kBlock; key += kPerUnit<Unit>, out += width) {
        if constexpr (kPerUnit<Unit> == 1) {
            for (int d = 0; d < size; d += kLanes) store(out + d, row_units<Unit>(at(rows[key], offset), d, size));
        } else {
#ifdef HAS_BF16_DOT
            for (int d = 0; d < size; d += 2 * kLanes) {
                __m512i even = (__m512i)row_units<Unit>(at(rows[key], offset), d, size);
                __m512i odd = (__m512i)row_units<Unit>(at(rows[key + 1], offset), d, size);
                __m512i high = _mm512_set1_epi32(int(0xffff0000));
                // Lanes of `d` and `d + 1` alternate in a row: split them, then interleave the two halves of the columns.
                __m512i first = _mm512_or_si512(_mm512_andnot_si512(high, even), _mm512_slli_epi32(odd, 16));
                __m512i second = _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(high, odd));
                const __m512i low_half = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
                const __m512i high_half = _mm512_add_epi32(low_half, _mm512_set1_epi32(8));
                _mm512_storeu_si512(out + d, _mm512_permutex2var_epi32(first, low_half, second));
                _mm512_storeu_si512(out + d + kLanes, _mm512_permutex2var_epi32(first, high_half, second));
            }
#endif
        }
    }
}

// ---- products ----

Vec multiply_add(Vec sum, const float* a, Vec b) { return sum + *a * b; }
#ifdef HAS_BF16_DOT
Vec multiply_add(Vec sum, const Bf16Pair* a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a->bits)), (__m512bh)b);
}
#endif

// c[row][64] = scale[row] * c[row][64] + a[row][depth] @ b[depth][64]; without `scale`, c is overwritten.
template <class Unit, int Rows>
void multiply(const Unit* a, int a_stride, const Unit* b, int b_stride, int depth, float* c, int c_stride, const float* scale) {
    Vec total[Rows][kColumns];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kColumns; ++i)
            total[r][i] = scale ? scale[r] * load(c + r * c_stride + i * kLanes) : Vec{};
    for (int k = 0; k < depth; ++k) {
        Vec column[kColumns];
#pragma GCC unroll 4
        for (int i = 0; i < kColumns; ++i) column[i] = load(b + k * b_stride + i * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < kColumns; ++i) total[r][i] = multiply_add(total[r][i], a + r * a_stride + k, column[i]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kColumns; ++i) store(c + r * c_stride + i * kLanes, total[r][i]);
}

template <class Unit, int Rows = kRows>
void multiply_rows(int rows, const Unit* a, int a_stride, const Unit* b, int b_stride, int depth, float* c, int c_stride,
                   const float* scale) {
    if constexpr (Rows > 1)
        if (rows < Rows) return multiply_rows<Unit, Rows - 1>(rows, a, a_stride, b, b_stride, depth, c, c_stride, scale);
    multiply<Unit, Rows>(a, a_stride, b, b_stride, depth, c, c_stride, scale);
}

void store_weights(float* to, const Vec* p) {
    for (int i = 0; i < kColumns; ++i) store(to + i * kLanes, p[i]);
}
#ifdef HAS_BF16_DOT
void store_weights(Bf16Pair* to, const Vec* p) {
    for (int i = 0; i < kColumns; i += 2)
        _mm512_storeu_si512(to + i * kLanes / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)p[i + 1], (__m512)p[i]));
}
#endif

}  // namespace
