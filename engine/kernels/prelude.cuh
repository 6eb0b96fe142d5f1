// What every kernel starts with: types, conversions, the asm that the tensor cores need. It includes no header, because
// NVRTC's package brings none, and cuda_bf16.h is not on every user's machine.
//
// Dimension letters are those of backend.rs: T tokens, S sequences, H query heads, K kv heads, D head size, E width,
// F feed-forward width, V vocabulary, N blocks, P tokens per block, L layers. Activations are of type `act`, rows of `ld` elements:
// bf16, or f16 where ACT_F16 is defined.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INFINITY_F __int_as_float(0x7f800000)
#define WARP 32

// === bf16 and f16, as bits ===

__device__ __forceinline__ float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Round to nearest even.
__device__ __forceinline__ u16 float_to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float f16_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ float f16_low(u32 pair) { return f16_to_float((u16)pair); }
__device__ __forceinline__ float f16_high(u32 pair) { return f16_to_float((u16)(pair >> 16)); }

__device__ __forceinline__ u16 float_to_f16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// === the element type of activations, and of weights in 16 bits ===

#ifdef ACT_F16
__device__ __forceinline__ float act_low(u32 pair) { return f16_low(pair); }
__device__ __forceinline__ float act_high(u32 pair) { return f16_high(pair); }
__device__ __forceinline__ float act_to_float(u16 bits) { return f16_to_float(bits); }
__device__ __forceinline__ u16 float_to_act(float value) { return float_to_f16(value); }
__device__ __forceinline__ u32 pack_act(float low, float high) { return pack_f16(low, high); }
#else
__device__ __forceinline__ float act_low(u32 pair) { return bf16_low(pair); }
__device__ __forceinline__ float act_high(u32 pair) { return bf16_high(pair); }
__device__ __forceinline__ float act_to_float(u16 bits) { return bf16_to_float(bits); }
__device__ __forceinline__ u16 float_to_act(float value) { return float_to_bf16(value); }
__device__ __forceinline__ u32 pack_act(float low, float high) { return pack_bf16(low, high); }
#endif

// === e4m3: 8 bits, the greatest value is 448 ===

// Two, rounded to nearest even; what is greater than the greatest becomes that.
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
__device__ __forceinline__ u32 float_to_e4m3(float value) {
    u32 sign = __float_as_uint(value) >> 24 & 0x80;
    if (value != value) return sign | 0x7f;
    float size = fminf(fabsf(value), 448.0f);
    if (size < 0.015625f) return sign | (u32)__float2int_rn(size * 512.0f);
    u32 bits = __float_as_uint(size);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}
__device__ __forceinline__ u16 pack_e4m3(float low, float high) { return (u16)(float_to_e4m3(low) | float_to_e4m3(high) << 8); }
#endif

// Four as two pairs of f16, each 2^-8 of its value: the bits of exponent and fraction in their places. NaN becomes 480.
__device__ __forceinline__ void e4m3_to_f16(u32 four, u32 &first, u32 &second) {
    u32 a = __byte_perm(four, 0, 0x1404), b = __byte_perm(four, 0, 0x3424);
    first = (a & 0x80008000u) | (a & 0x7f007f00u) >> 1;
    second = (b & 0x80008000u) | (b & 0x7f007f00u) >> 1;
}

// === the element type of the kv pages: KV is 0 for f32, 1 for f16, 2 for bf16, 3 for e4m3 ===

#ifdef KV
#if KV == 0
typedef float kv_t;
__device__ __forceinline__ float kv_to_float(kv_t value) { return value; }
__device__ __forceinline__ kv_t float_to_kv(float value) { return value; }
#elif KV == 1
typedef u16 kv_t;
__device__ __forceinline__ float kv_to_float(kv_t value) { return f16_to_float(value); }
__device__ __forceinline__ kv_t float_to_kv(float value) { return float_to_f16(value); }
__device__ __forceinline__ u32 pack_kv(float low, float high) { return pack_f16(low, high); }
#define MMA_TYPE "f16"
#elif KV == 3
// The tensor cores get them as f16, 2^-8 of their value: KV_UNDO is what their products are multiplied with.
typedef u8 kv_t;
#define KV_UNDO 256.0f
__device__ __forceinline__ float kv_to_float(kv_t value) {
    return f16_to_float((u16)((value & 0x80) << 8 | (value & 0x7f) << 7)) * KV_UNDO;
}
__device__ __forceinline__ kv_t float_to_kv(float value) { return (kv_t)pack_e4m3(value, 0.0f); }
__device__ __forceinline__ u32 pack_kv(float low, float high) { return pack_f16(low, high); }
#define MMA_TYPE "f16"
#else
typedef u16 kv_t;
__device__ __forceinline__ float kv_to_float(kv_t value) { return bf16_to_float(value); }
__device__ __forceinline__ kv_t float_to_kv(float value) { return float_to_bf16(value); }
__device__ __forceinline__ u32 pack_kv(float low, float high) { return pack_bf16(low, high); }
#define MMA_TYPE "bf16"
#define MMA_BF16
#endif
#ifndef KV_UNDO
#define KV_UNDO 1.0f
#endif

#if KV != 0
// A pair of activations as the tensor cores take it beside kv elements.
__device__ __forceinline__ u32 act_pair_to_kv(u32 pair) {
#if defined(ACT_F16) == defined(MMA_BF16)
    return pack_kv(act_low(pair), act_high(pair));
#else
    return pair;
#endif
}

// Eight elements as the tensor cores take them: 16 bytes, or 8 that are widened.
__device__ __forceinline__ uint4 load_kv(const kv_t *from, bool valid) {
#if KV == 3
    uint2 narrow = valid ? *(const uint2 *)from : make_uint2(0, 0);
    uint4 wide;
    e4m3_to_f16(narrow.x, wide.x, wide.y);
    e4m3_to_f16(narrow.y, wide.z, wide.w);
    return wide;
#else
    return valid ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
#endif
}
#endif
#endif

// c += a · b on the tensor cores: a [16, 16], b [16, 8], c [16, 8].
#ifdef MMA_TYPE
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// 2^x; 0 for minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// === sums over a warp and over a block ===

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// Every thread gets the sum. `shared` holds a float for each warp and may not be in use.
__device__ __forceinline__ float block_sum(float value, float *shared) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_sum(value);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    value = lane < warps ? shared[lane] : 0.0f;
    return warp_sum(value);
}
