// x += y, and gate = silu(gate) · up; the latter also in e4m3 with a scale a row.
//
// All [T, cols] act with rows of ld elements. Blocks along rows and columns, a thread eight elements where cols and every ld
// are multiples of 8, else one. Arithmetic in f32. Bound: 6 bytes an element. In e4m3: one block a row, which its threads hold from one pass to the other;
// out is dense, scales [T] f32, cols a multiple of 16 and at most HELD_MAX · 8 · 1,024; values in act are what is rounded. Bound: 5
// bytes an element.

#define HELD_MAX 4

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ __forceinline__ u32 apply_add(u32 x, u32 y) {
    return pack_act(act_low(x) + act_low(y), act_high(x) + act_high(y));
}
__device__ __forceinline__ u32 apply_silu_mul(u32 gate, u32 up) {
    return pack_act(silu(act_low(gate)) * act_low(up), silu(act_high(gate)) * act_high(up));
}

#define ELEMENTWISE(NAME, APPLY)                                                                                       \
    extern "C" __global__ void NAME(u16 *x, int ld_x, const u16 *y, int ld_y, int cols, int rows) {                    \
        bool aligned = cols % 8 == 0 && ld_x % 8 == 0 && ld_y % 8 == 0;                                                \
        int i = blockIdx.x * blockDim.x + threadIdx.x;                                                                 \
        for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {                                                     \
            if (aligned && i < cols / 8) {                                                                             \
                uint4 *to = (uint4 *)(x + row * ld_x) + i;                                                             \
                uint4 a = *to, b = *((const uint4 *)(y + row * ld_y) + i);                                             \
                a.x = APPLY(a.x, b.x);                                                                                 \
                a.y = APPLY(a.y, b.y);                                                                                 \
                a.z = APPLY(a.z, b.z);                                                                                 \
                a.w = APPLY(a.w, b.w);                                                                                 \
                *to = a;                                                                                               \
            }                                                                                                          \
            for (int at = i; !aligned && at < cols; at += gridDim.x * blockDim.x) {                                    \
                u16 *to = x + row * ld_x + at;                                                                         \
                *to = (u16)APPLY(*to, y[row * ld_y + at]);                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }

ELEMENTWISE(add, apply_add)
ELEMENTWISE(silu_mul, apply_silu_mul)

extern "C" __global__ void silu_mul_e4m3(const u16 *gate, int ld_gate, const u16 *up, int ld_up, u8 *out, float *scales, int cols) {
    __shared__ float shared[WARP];
    const uint4 *a = (const uint4 *)(gate + (i64)blockIdx.x * ld_gate), *b = (const uint4 *)(up + (i64)blockIdx.x * ld_up);
    uint4 held[HELD_MAX];
    float most = 0.0f;
#pragma unroll
    for (int k = 0; k < HELD_MAX; k++) {
        int i = k * blockDim.x + threadIdx.x;
        if (i < cols / 8) {
            uint4 v = a[i], w = b[i];
            held[k] = make_uint4(apply_silu_mul(v.x, w.x), apply_silu_mul(v.y, w.y), apply_silu_mul(v.z, w.z), apply_silu_mul(v.w, w.w));
            most = fmaxf(most, greatest(held[k]));
        }
    }
    float scale = scale_of(block_greatest(most, shared)), inverse = 1.0f / scale;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    uint2 *to = (uint2 *)(out + (i64)blockIdx.x * cols);
#pragma unroll
    for (int k = 0; k < HELD_MAX; k++) {
        int i = k * blockDim.x + threadIdx.x;
        if (i < cols / 8) to[i] = round8(held[k], inverse);
    }
}
