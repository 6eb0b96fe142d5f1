// What every kernel starts with: types, conversions, the asm that the tensor cores need. It includes no header, because
// NVRTC's package brings none, and cuda_bf16.h is not on every user's machine.
//
// Dimension letters are those of backend.rs: T tokens, S sequences, H query heads, K kv heads, D head size, E width,
// F feed-forward width, V vocabulary, N blocks, P tokens per block, L layers. Activations are bf16, rows of `ld` elements.

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

// === the element type of the kv pages: KV is 0 for f32, 1 for f16, 2 for bf16 ===

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
// A pair of bf16 activations as a pair of kv elements.
__device__ __forceinline__ u32 bf16_pair_to_kv(u32 pair) { return pack_f16(bf16_low(pair), bf16_high(pair)); }
#define MMA_TYPE "f16"
#else
typedef u16 kv_t;
__device__ __forceinline__ float kv_to_float(kv_t value) { return bf16_to_float(value); }
__device__ __forceinline__ kv_t float_to_kv(float value) { return float_to_bf16(value); }
__device__ __forceinline__ u32 pack_kv(float low, float high) { return pack_bf16(low, high); }
__device__ __forceinline__ u32 bf16_pair_to_kv(u32 pair) { return pair; }
#define MMA_TYPE "bf16"
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
