// best[t] = the lowest index of the greatest value of row t.
//
// x [T, V] f32 with rows of ld elements, best [T] u32. One block a row, all threads along V, then the warps' winners. A row with
// a NaN or an infinity gives NOT_FINITE: the host looks at it. Bound: 4 V bytes a row.

#define NOT_FINITE 0xffffffffu

struct Best {
    float value;
    u32 index;
};

// The greater; of equal ones the first.
__device__ __forceinline__ Best better(Best a, Best b) {
    bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return second ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        Best other;
        other.value = __shfl_xor_sync(0xffffffffu, best.value, step);
        other.index = __shfl_xor_sync(0xffffffffu, best.index, step);
        best = better(best, other);
    }
    return best;
}

extern "C" __global__ void argmax_f32(const float *x, int ld, u32 *best, int cols) {
    __shared__ Best shared[WARP];
    const float *row = x + (i64)blockIdx.x * ld;
    Best own = {-INFINITY_F, NOT_FINITE};
    bool broken = false;
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) {
        float value = row[i];
        broken |= (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
        // Ascending within a thread, so that the first of equal ones stays.
        if (value > own.value) own.value = value, own.index = i;
    }
    own = warp_best(own);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = own;
    bool any = __syncthreads_or(broken);
    if (threadIdx.x >= WARP) return;
    Best none = {-INFINITY_F, NOT_FINITE};
    own = threadIdx.x < blockDim.x / WARP ? shared[threadIdx.x] : none;
    own = warp_best(own);
    if (threadIdx.x == 0) best[blockIdx.x] = any ? NOT_FINITE : own.index;
}
