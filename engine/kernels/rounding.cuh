// A row's elements as e4m3, with one scale for all of them: what the products in 8 bits take.

__device__ __forceinline__ float greatest(uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) most = fmaxf(most, fmaxf(fabsf(act_low(words[i])), fabsf(act_high(words[i]))));
    return most;
}

// Every thread gets the greatest. `shared` holds a float for each warp and may not be in use.
__device__ __forceinline__ float block_greatest(float most, float *shared) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (lane == 0) shared[warp] = most;
    __syncthreads();
    most = lane < blockDim.x / WARP ? shared[lane] : 0.0f;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    return most;
}

// The scale of a row whose greatest is known. A row of zeros stays one.
__device__ __forceinline__ float scale_of(float most) { return fmaxf(most, 1e-30f) * (1.0f / 448.0f); }

__device__ __forceinline__ u32 round4(u32 a, u32 b, float inverse) {
    return (u32)pack_e4m3(act_low(a) * inverse, act_high(a) * inverse) |
           (u32)pack_e4m3(act_low(b) * inverse, act_high(b) * inverse) << 16;
}

// Eight of act.
__device__ __forceinline__ uint2 round8(uint4 v, float inverse) {
    return make_uint2(round4(v.x, v.y, inverse), round4(v.z, v.w, inverse));
}
