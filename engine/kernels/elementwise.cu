// x += y, and gate = silu(gate) · up.
//
// All [T, cols] bf16 with rows of ld elements. Blocks along rows and columns, a thread eight elements where cols and every ld
// are multiples of 8, else one. Arithmetic in f32. Bound: 6 bytes an element.

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ __forceinline__ u32 apply_add(u32 x, u32 y) {
    return pack_bf16(bf16_low(x) + bf16_low(y), bf16_high(x) + bf16_high(y));
}
__device__ __forceinline__ u32 apply_silu_mul(u32 gate, u32 up) {
    return pack_bf16(silu(bf16_low(gate)) * bf16_low(up), silu(bf16_high(gate)) * bf16_high(up));
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

ELEMENTWISE(add_bf16, apply_add)
ELEMENTWISE(silu_mul_bf16, apply_silu_mul)
