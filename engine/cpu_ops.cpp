// Elementwise passes of a decoder in bf16, fused: each reads its input once. They round where the PyTorch expressions that
// they replace round, so that results agree to the last bit but for the order of a sum. Called by engine/cpu_modules.py.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kParallelElements = 1 << 15;  // fewer than this are done before a second thread would start

float widen(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

uint16_t narrow(float x) {                      // to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t rounded = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return x != x ? uint16_t(0x7fc0) : rounded;
}

float rounded(float x) { return widen(narrow(x)); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// out[rows, size] = x / sqrt(mean(x^2) + eps) * weight; `round_first` rounds the quotient to bf16 before the product.
EXPORT void hetserve_rms_norm(const uint16_t* x, const float* weight, uint16_t* out, int64_t rows, int64_t size, float eps,
                              int round_first, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= kParallelElements)
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* from = x + row * size;
        uint16_t* to = out + row * size;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; ++i) squares += widen(from[i]) * widen(from[i]);
        float factor = 1 / std::sqrt(squares / float(size) + eps);
        if (round_first)
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = narrow(rounded(widen(from[i]) * factor) * weight[i]);
        else
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = narrow(widen(from[i]) * factor * weight[i]);
    }
}

// out[tokens, heads, size] = x * cos + rotate_half(x) * sin, for x[tokens, heads, size] with strides in elements and
// cos, sin[tokens, size].
EXPORT void hetserve_rotate(const uint16_t* x, int64_t stride_token, int64_t stride_head, const uint16_t* cos,
                            const uint16_t* sin, uint16_t* out, int64_t tokens, int64_t heads, int64_t size, int threads) {
    int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * size >= kParallelElements)
    for (int64_t token = 0; token < tokens; ++token) {
        const uint16_t *c = cos + token * size, *s = sin + token * size;
        for (int64_t head = 0; head < heads; ++head) {
            const uint16_t* from = x + token * stride_token + head * stride_head;
            uint16_t* to = out + (token * heads + head) * size;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                float low = widen(from[i]), high = widen(from[i + half]);
                to[i] = narrow(rounded(low * widen(c[i])) + rounded(-high * widen(s[i])));
                to[i + half] = narrow(rounded(high * widen(c[i + half])) + rounded(low * widen(s[i + half])));
            }
        }
    }
}
