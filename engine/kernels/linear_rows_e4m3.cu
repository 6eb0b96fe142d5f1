// out = (x · x_scales) · (weight · scales)ᵀ + bias for few tokens, both sides in 8 bits.
//
// x [T, in] e4m3, x_scales [T] f32, weight [out, in] e4m3, scales [out] f32, bias [out] act or null, out [T, out] act with rows
// of ld elements; x and weight dense and 16-byte aligned, `in` a multiple of 128, out one of 16; T at most 8, 16 or 32, as the
// name says. So few tokens that the weights' bytes are the bound: these go from memory to registers once, as mma.sync takes them.
// A block has 16 output features; its warps divide `in` and add up through shared memory, so that as many weights are on their way
// as the memory wants. Which of a row's elements meet in one instruction does not matter as long as both sides agree: each thread
// takes 16 neighbouring bytes, for two instructions. x comes from the caches. Bound: out · in bytes.

#define FEATURES 16
#define WARPS 8
// Bytes of a row that a warp takes at a time.
#define SPAN 128

__device__ __forceinline__ void mma_e4m3(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What nobody reads again, so the first cache need not keep it.
__device__ __forceinline__ uint4 load_once(const u8 *from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// Tokens in groups of 8: N of them.
template <int N> __device__ __forceinline__ void product(const u8 *x, const float *x_scales, const u8 *weight, const float *scales, const u16 *bias, u16 *out, int ld_out, int tokens, int cols) {
    __shared__ float parts[WARPS][N][WARP * 4];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, first = blockIdx.x * FEATURES;
    const u8 *w = weight + (i64)(first + lane / 4) * cols + lane % 4 * 16, *v[N];
    // Tokens that are not there are the last one again, and nobody reads them.
#pragma unroll
    for (int n = 0; n < N; n++) v[n] = x + (i64)min(n * 8 + lane / 4, tokens - 1) * cols + lane % 4 * 16;
    float sums[N][4] = {};
#pragma unroll 2
    for (int at = warp * SPAN; at < cols; at += WARPS * SPAN) {
        uint4 low[2], high[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            low[half] = load_once(w + at + half * 64);
            high[half] = load_once(w + (i64)8 * cols + at + half * 64);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 a = low[half], c = high[half];
#pragma unroll
            for (int n = 0; n < N; n++) {
                uint4 b = __ldg((const uint4 *)(v[n] + at + half * 64));
                mma_e4m3(sums[n], a.x, c.x, a.y, c.y, b.x, b.y);
                mma_e4m3(sums[n], a.z, c.z, a.w, c.w, b.z, b.w);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) *(float4 *)(parts[warp][n] + lane * 4) = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    __syncthreads();
    // A lane has features lane / 4 and that + 8 of tokens lane % 4 · 2 and the next. Neighbouring threads write neighbouring features.
    for (int i = threadIdx.x; i < N * 8 * FEATURES; i += WARPS * WARP) {
        int feature = i % FEATURES, token = i / FEATURES;
        if (token >= tokens) return;
        int slot = (feature % 8 * 4 + token % 8 / 2) * 4 + feature / 8 * 2 + token % 2;
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < WARPS; part++) sum += parts[part][token / 8][slot];
        sum *= scales[first + feature] * x_scales[token];
        if (bias) sum += act_to_float(bias[first + feature]);
        out[(i64)token * ld_out + first + feature] = float_to_act(sum);
    }
}

#define LINEAR(NAME, N)                                                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS *WARP) NAME(const u8 *x, const float *x_scales, const u8 *weight, const float *scales, const u16 *bias, u16 *out, int ld_out, int tokens, int cols) { \
        product<N>(x, x_scales, weight, scales, bias, out, ld_out, tokens, cols);                                      \
    }
LINEAR(linear_rows_e4m3_8, 1)
LINEAR(linear_rows_e4m3_16, 2)
LINEAR(linear_rows_e4m3_32, 4)
