// out = x · weightᵀ + bias for few tokens, or for shapes that cuBLASLt does not take.
//
// x [T, in], weight [out, in], bias [out] or null, out [T, out], all act (out also f32); x and out with rows of ld elements; 16-byte
// aligned where `in` and ld_x are multiples of 8. One warp ROWS output features, all lanes along `in`, up to TOKENS tokens at
// once (grid.y over the rest): weights are read once, 16 bytes a lane, several in flight; x comes from the cache.
// Sums in f32, lanes by halving. Bound: 2 · out · in bytes.

#define ROWS 2
#define TOKENS 4

__device__ __forceinline__ float dot8(uint4 a, uint4 b, float sum) {
    const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum = fmaf(act_low(x[i]), act_low(y[i]), sum);
        sum = fmaf(act_high(x[i]), act_high(y[i]), sum);
    }
    return sum;
}

__device__ __forceinline__ void write(u16 *out, float value) { *out = float_to_act(value); }
__device__ __forceinline__ void write(float *out, float value) { *out = value; }

template <int T, typename Out> __device__ __forceinline__ void product(const u16 *x, int ld_x, const u16 *weight, const u16 *bias, Out *out, int ld_out, int first, int rows, int cols) {
    int lane = threadIdx.x % WARP;
    float sums[ROWS][T] = {};
    const u16 *w[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) w[r] = weight + (i64)min(first + r, rows - 1) * cols;
    if (cols % 8 == 0 && ld_x % 8 == 0) {
#pragma unroll 4
        for (int i = lane; i < cols / 8; i += WARP) {
            uint4 held[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) held[r] = __ldcs((const uint4 *)w[r] + i);
#pragma unroll
            for (int t = 0; t < T; t++) {
                uint4 v = *((const uint4 *)(x + (i64)t * ld_x) + i);
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r][t] = dot8(held[r], v, sums[r][t]);
            }
        }
    } else {
        for (int i = lane; i < cols; i += WARP) {
#pragma unroll
            for (int t = 0; t < T; t++) {
                float v = act_to_float(x[(i64)t * ld_x + i]);
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r][t] = fmaf(act_to_float(w[r][i]), v, sums[r][t]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int t = 0; t < T; t++) {
            float sum = warp_sum(sums[r][t]);
            if (lane != 0 || first + r >= rows) continue;
            if (bias) sum += act_to_float(bias[first + r]);
            write(out + (i64)t * ld_out + first + r, sum);
        }
    }
}

template <typename Out> __device__ __forceinline__ void linear(const u16 *x, int ld_x, const u16 *weight, const u16 *bias, Out *out, int ld_out, int tokens, int rows, int cols) {
    int first = (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * ROWS;
    if (first >= rows) return;
    int token = blockIdx.y * TOKENS;
    x += (i64)token * ld_x;
    out += (i64)token * ld_out;
    switch (min(TOKENS, tokens - token)) {
    case 1: product<1>(x, ld_x, weight, bias, out, ld_out, first, rows, cols); break;
    case 2: product<2>(x, ld_x, weight, bias, out, ld_out, first, rows, cols); break;
    case 3: product<3>(x, ld_x, weight, bias, out, ld_out, first, rows, cols); break;
    default: product<4>(x, ld_x, weight, bias, out, ld_out, first, rows, cols);
    }
}

extern "C" __global__ void linear_act(const u16 *x, int ld_x, const u16 *weight, const u16 *bias, u16 *out, int ld_out, int tokens, int rows, int cols) {
    linear(x, ld_x, weight, bias, out, ld_out, tokens, rows, cols);
}

// The same with a result that is not rounded, for logits.
extern "C" __global__ void linear_f32(const u16 *x, int ld_x, const u16 *weight, const u16 *bias, float *out, int ld_out, int tokens, int rows, int cols) {
    linear(x, ld_x, weight, bias, out, ld_out, tokens, rows, cols);
}
