// x += y, and gate = silu(gate) · up.
//
// All [T, cols] bf16 with rows of ld elements. A thread eight elements where cols and every ld are multiples of 8, else one;
// grid-stride loops over the whole. Arithmetic in f32. Bound: 6 bytes an element.

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

__device__ __forceinline__ float apply_add(float x, float y) { return x + y; }
__device__ __forceinline__ float apply_silu_mul(float gate, float up) { return silu(gate) * up; }

#define ELEMENTWISE(NAME, APPLY)                                                                                       \
    extern "C" __global__ void NAME(u16 *x, int ld_x, const u16 *y, int ld_y, int cols, i64 count) {                   \
        i64 step = (i64)gridDim.x * blockDim.x, start = (i64)blockIdx.x * blockDim.x + threadIdx.x;                    \
        if (cols % 8 == 0 && ld_x % 8 == 0 && ld_y % 8 == 0) {                                                         \
            int vectors = cols / 8;                                                                                    \
            for (i64 i = start; i < count / 8; i += step) {                                                            \
                i64 row = i / vectors;                                                                                 \
                int at = (int)(i - row * vectors);                                                                     \
                uint4 *to = (uint4 *)(x + row * ld_x) + at;                                                            \
                uint4 a = *to, b = *((const uint4 *)(y + row * ld_y) + at);                                            \
                a.x = pack_bf16(APPLY(bf16_low(a.x), bf16_low(b.x)), APPLY(bf16_high(a.x), bf16_high(b.x)));           \
                a.y = pack_bf16(APPLY(bf16_low(a.y), bf16_low(b.y)), APPLY(bf16_high(a.y), bf16_high(b.y)));           \
                a.z = pack_bf16(APPLY(bf16_low(a.z), bf16_low(b.z)), APPLY(bf16_high(a.z), bf16_high(b.z)));           \
                a.w = pack_bf16(APPLY(bf16_low(a.w), bf16_low(b.w)), APPLY(bf16_high(a.w), bf16_high(b.w)));           \
                *to = a;                                                                                               \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        for (i64 i = start; i < count; i += step) {                                                                    \
            u16 *to = x + i / cols * ld_x + i % cols;                                                                  \
            *to = float_to_bf16(APPLY(bf16_to_float(*to), bf16_to_float(y[i / cols * ld_y + i % cols])));              \
        }                                                                                                              \
    }

ELEMENTWISE(add_bf16, apply_add)
ELEMENTWISE(silu_mul_bf16, apply_silu_mul)
