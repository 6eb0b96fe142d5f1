// out[t] = table[tokens[t] - first]; zeros where the table has no such row, because another rank has it.
//
// table [rows, E] act, tokens [T] u32, out [T, E] act with rows of ld_out elements; 16-byte aligned where E and ld_out are
// multiples of 8. One block a token; threads over E, 16 bytes each where the alignment allows.
// Bound: 4 E bytes a token.

extern "C" __global__ void embed(const u16 *table, const u32 *tokens, u16 *out, int cols, int ld_out, u32 first, u32 rows) {
    u32 row = tokens[blockIdx.x] - first;
    bool held = row < rows;
    const u16 *from = table + (held ? (i64)row * cols : 0);
    u16 *to = out + (i64)blockIdx.x * ld_out;
    if (cols % 8 == 0 && ld_out % 8 == 0) {
        for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) ((uint4 *)to)[i] = held ? ((const uint4 *)from)[i] : make_uint4(0, 0, 0, 0);
    } else {
        for (int i = threadIdx.x; i < cols; i += blockDim.x) to[i] = held ? from[i] : 0;
    }
}
