// to = e4m3(x / scale) per row, where scale = max |x| / 448 of the row.
//
// x [T, C] act with rows of ld elements, to [T, C] e4m3 dense, scales [T] f32; 16-byte aligned, C a multiple of 16. One block a
// row: its greatest value first, then the row once more, which comes from the cache. Bound: 3 C bytes a row.

extern "C" __global__ void quantize_e4m3(const u16 *x, int ld, u8 *to, float *scales, int cols) {
    __shared__ float shared[WARP];
    const uint4 *row = (const uint4 *)(x + (i64)blockIdx.x * ld);
    uint2 *out = (uint2 *)(to + (i64)blockIdx.x * cols);
    float most = 0.0f;
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) most = fmaxf(most, greatest(row[i]));
    float scale = scale_of(block_greatest(most, shared)), inverse = 1.0f / scale;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) out[i] = round8(row[i], inverse);
}
