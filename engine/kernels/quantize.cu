// to = e4m3(x / scale) per row, where scale = max |x| / 448 of the row.
//
// x [T, C] bf16 with rows of ld elements, to [T, C] e4m3 dense, scales [T] f32; 16-byte aligned, C a multiple of 16. One block a
// row: its greatest value first, then the row once more, which comes from the cache. Bound: 3 C bytes a row.

__device__ __forceinline__ float greatest(uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) most = fmaxf(most, fmaxf(fabsf(bf16_low(words[i])), fabsf(bf16_high(words[i]))));
    return most;
}

__device__ __forceinline__ u32 quantize4(u32 a, u32 b, float inverse) {
    return (u32)pack_e4m3(bf16_low(a) * inverse, bf16_high(a) * inverse) |
           (u32)pack_e4m3(bf16_low(b) * inverse, bf16_high(b) * inverse) << 16;
}

extern "C" __global__ void quantize_e4m3(const u16 *x, int ld, u8 *to, float *scales, int cols) {
    __shared__ float shared[WARP];
    const uint4 *row = (const uint4 *)(x + (i64)blockIdx.x * ld);
    uint2 *out = (uint2 *)(to + (i64)blockIdx.x * cols);
    float most = 0.0f;
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) most = fmaxf(most, greatest(row[i]));
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (lane == 0) shared[warp] = most;
    __syncthreads();
    most = lane < blockDim.x / WARP ? shared[lane] : 0.0f;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    // A row of zeros stays one.
    float scale = fmaxf(most, 1e-30f) * (1.0f / 448.0f), inverse = 1.0f / scale;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) {
        uint4 v = row[i];
        out[i] = make_uint2(quantize4(v.x, v.y, inverse), quantize4(v.z, v.w, inverse));
    }
}
