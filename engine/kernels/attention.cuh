// What the attention kernels share: how a step's sequences and their pages are described.
//
// Pages [N][L, 2, K, P, D]: a kv head's P tokens of one layer and side are one contiguous run. Compiled for D, P, KV.

#ifndef D
#define D 128
#endif
#ifndef P
#define P 32
#endif

// One layer's attention over the step. Arrays are the step's, on the device.
struct Attention {
    const u16 *q;
    int ld_q;
    u16 *out;
    int ld_out;
    const kv_t *pages;
    i64 page_len;
    // Of each sequence: its first row, how many rows, tokens before the first row, where its blocks begin.
    const int *first_rows, *row_counts, *past_lens, *block_starts;
    const int *blocks;
    int layer, kv_heads, group;
    // Of the scores, times log2(e).
    float scale;
    // Tokens that a position sees, itself included.
    int window;
    // Of the results: what the pages' values are to be multiplied with.
    float value_scale;
};

// A side's plane of a kv head within a page: side 0 keys, 1 values.
__device__ __forceinline__ i64 plane(const Attention &a, int side, int kv_head) {
    return ((i64)(a.layer * 2 + side) * a.kv_heads + kv_head) * P * D;
}
