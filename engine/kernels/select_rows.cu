// out[i] = x[rows[i]].
//
// x [T, E] act with rows of ld_x elements, rows [R] u32, out [R, E] act with rows of ld_out elements. One block a row.
// Bound: 4 E bytes a row.

extern "C" __global__ void select_rows(const u16 *x, int ld_x, const u32 *rows, u16 *out, int ld_out, int cols) {
    const u16 *from = x + (i64)rows[blockIdx.x] * ld_x;
    u16 *to = out + (i64)blockIdx.x * ld_out;
    if (cols % 8 == 0 && ld_x % 8 == 0 && ld_out % 8 == 0) {
        for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
    } else {
        for (int i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from[i];
    }
}
