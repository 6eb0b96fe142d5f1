// out = x · (weight · scales)ᵀ + bias for few tokens, with weights of 8 bits, or where cuBLASLt does not take them.
//
// x [T, in] act, weight [out, in] e4m3, scales [out] f32, bias [out] act or null, out [T, out] act or f32; x and out with rows
// of ld elements; 16-byte aligned, `in` and ld_x multiples of 16. As linear.cu: one warp ROWS output features, all lanes along
// `in`, up to TOKENS tokens at once. Activations are not rounded. Weights become f16 by moving their bits, which is 2^-8 of
// their value, exactly; the sum is scaled back once. Bound: out · in bytes.

#define ROWS 2
#define TOKENS 4
#define UNDO 256.0f

// 16 weights and as many elements of x.
__device__ __forceinline__ float dot16(const u32 (&pairs)[8], uint4 a, uint4 b, float sum) {
    const u32 x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum = fmaf(f16_low(pairs[i]), act_low(x[i]), sum);
        sum = fmaf(f16_high(pairs[i]), act_high(x[i]), sum);
    }
    return sum;
}

__device__ __forceinline__ void widen(uint4 v, u32 (&pairs)[8]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) e4m3_to_f16(words[i], pairs[2 * i], pairs[2 * i + 1]);
}

__device__ __forceinline__ void write(u16 *out, float value) { *out = float_to_act(value); }
__device__ __forceinline__ void write(float *out, float value) { *out = value; }

template <int T, typename Out> __device__ __forceinline__ void product(const u16 *x, int ld_x, const u8 *weight, const float *scales, const u16 *bias, Out *out, int ld_out, int first, int rows, int cols) {
    int lane = threadIdx.x % WARP;
    float sums[ROWS][T] = {};
    const uint4 *w[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) w[r] = (const uint4 *)(weight + (i64)min(first + r, rows - 1) * cols);
#pragma unroll 4
    for (int i = lane; i < cols / 16; i += WARP) {
        uint4 held[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) held[r] = __ldcs(w[r] + i);
        u32 pairs[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) widen(held[r], pairs[r]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            const uint4 *v = (const uint4 *)(x + (i64)t * ld_x) + 2 * i;
            uint4 a = v[0], b = v[1];
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r][t] = dot16(pairs[r], a, b, sums[r][t]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int t = 0; t < T; t++) {
            float sum = warp_sum(sums[r][t]);
            if (lane != 0 || first + r >= rows) continue;
            sum *= UNDO * scales[first + r];
            if (bias) sum += act_to_float(bias[first + r]);
            write(out + (i64)t * ld_out + first + r, sum);
        }
    }
}

template <typename Out> __device__ __forceinline__ void linear(const u16 *x, int ld_x, const u8 *weight, const float *scales, const u16 *bias, Out *out, int ld_out, int tokens, int rows, int cols) {
    int first = (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * ROWS;
    if (first >= rows) return;
    int token = blockIdx.y * TOKENS;
    x += (i64)token * ld_x;
    out += (i64)token * ld_out;
    switch (min(TOKENS, tokens - token)) {
    case 1: product<1>(x, ld_x, weight, scales, bias, out, ld_out, first, rows, cols); break;
    case 2: product<2>(x, ld_x, weight, scales, bias, out, ld_out, first, rows, cols); break;
    case 3: product<3>(x, ld_x, weight, scales, bias, out, ld_out, first, rows, cols); break;
    default: product<4>(x, ld_x, weight, scales, bias, out, ld_out, first, rows, cols);
    }
}

extern "C" __global__ void linear_e4m3_act(const u16 *x, int ld_x, const u8 *weight, const float *scales, const u16 *bias, u16 *out, int ld_out, int tokens, int rows, int cols) {
    linear(x, ld_x, weight, scales, bias, out, ld_out, tokens, rows, cols);
}

// The same with a result that is not rounded.
extern "C" __global__ void linear_e4m3_f32(const u16 *x, int ld_x, const u8 *weight, const float *scales, const u16 *bias, float *out, int ld_out, int tokens, int rows, int cols) {
    linear(x, ld_x, weight, scales, bias, out, ld_out, tokens, rows, cols);
}
