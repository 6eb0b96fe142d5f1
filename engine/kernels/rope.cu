// Rotates heads in place, and on the way writes keys and values to their pages.
//
// x, q [T, H · D], k, v [T, K · D] act with rows of ld elements; positions [T] u32; inverse [D / 2] f32; row_blocks [T] i32,
// the block that a row's KV goes to, negative for a row that has none; pages [N][L, 2, K, P, D]. Compiled for D, P, KV.
// One block a token: its angles are computed once, into shared memory, in f32 from an f32 product as the models' reference
// does, then all heads rotate. Bound: 4 (H + K) D + 6 K D bytes a token.

#ifndef D
#define D 128
#endif

#define HALF (D / 2)

// The pair of elements that rotates by angle i.
__device__ __forceinline__ int first_of(int i, int adjacent) { return adjacent ? 2 * i : i; }
__device__ __forceinline__ int second_of(int i, int adjacent) { return adjacent ? 2 * i + 1 : i + HALF; }

__device__ __forceinline__ void angles(float *cosines, float *sines, u32 position, const float *inverse, float magnitude) {
    for (int i = threadIdx.x; i < HALF; i += blockDim.x) {
        float sine, cosine;
        sincosf((float)position * inverse[i], &sine, &cosine);
        cosines[i] = cosine * magnitude;
        sines[i] = sine * magnitude;
    }
    __syncthreads();
}

extern "C" __global__ void rope(u16 *x, int ld, int heads, const u32 *positions, const float *inverse, float magnitude, int adjacent) {
    __shared__ float cosines[HALF], sines[HALF];
    angles(cosines, sines, positions[blockIdx.x], inverse, magnitude);
    u16 *row = x + (i64)blockIdx.x * ld;
    for (int index = threadIdx.x; index < heads * HALF; index += blockDim.x) {
        int i = index % HALF;
        u16 *head = row + index / HALF * D;
        u16 *a = head + first_of(i, adjacent), *b = head + second_of(i, adjacent);
        float x0 = act_to_float(*a), x1 = act_to_float(*b);
        *a = float_to_act(x0 * cosines[i] - x1 * sines[i]);
        *b = float_to_act(x1 * cosines[i] + x0 * sines[i]);
    }
}

#ifdef KV

// Where a page has a KV head's row of a token: side 0 keys, 1 values.
__device__ __forceinline__ kv_t *page_row(kv_t *pages, i64 page_len, int block, int layer, int side, int kv_heads, int head, u32 position) {
    i64 plane = (i64)(layer * 2 + side) * kv_heads + head;
    return pages + block * page_len + (plane * P + position % P) * D;
}

struct KvTarget {
    kv_t *pages;
    i64 page_len;
    const int *row_blocks;
    const u32 *positions;
    int layer, kv_heads;
};

extern "C" __global__ void write_kv(KvTarget to, const u16 *k, int ld_k, const u16 *v, int ld_v) {
    int row = blockIdx.x, block = to.row_blocks[row];
    if (block < 0) return;
    u32 position = to.positions[row];
    for (int i = threadIdx.x; i < to.kv_heads * D; i += blockDim.x) {
        int head = i / D, d = i % D;
        page_row(to.pages, to.page_len, block, to.layer, 0, to.kv_heads, head, position)[d] = float_to_kv(act_to_float(k[(i64)row * ld_k + i]));
        page_row(to.pages, to.page_len, block, to.layer, 1, to.kv_heads, head, position)[d] = float_to_kv(act_to_float(v[(i64)row * ld_v + i]));
    }
}

// q rotated in place; k rotated into its page and left as it is, since nothing else reads it; v into its page.
extern "C" __global__ void rope_write_kv(KvTarget to, u16 *q, int ld_q, int heads, const u16 *k, int ld_k, const u16 *v, int ld_v, const float *inverse, float magnitude, int adjacent) {
    __shared__ float cosines[HALF], sines[HALF];
    int row = blockIdx.x, block = to.row_blocks[row];
    u32 position = to.positions[row];
    if (block < 0) return;
    angles(cosines, sines, position, inverse, magnitude);
    for (int index = threadIdx.x; index < heads * HALF; index += blockDim.x) {
        int i = index % HALF;
        u16 *head = q + (i64)row * ld_q + index / HALF * D;
        u16 *a = head + first_of(i, adjacent), *b = head + second_of(i, adjacent);
        float x0 = act_to_float(*a), x1 = act_to_float(*b);
        *a = float_to_act(x0 * cosines[i] - x1 * sines[i]);
        *b = float_to_act(x1 * cosines[i] + x0 * sines[i]);
    }
    for (int index = threadIdx.x; index < to.kv_heads * HALF; index += blockDim.x) {
        int i = index % HALF, head = index / HALF;
        const u16 *from = k + (i64)row * ld_k + head * D;
        int first = first_of(i, adjacent), second = second_of(i, adjacent);
        float x0 = act_to_float(from[first]), x1 = act_to_float(from[second]);
        kv_t *keys = page_row(to.pages, to.page_len, block, to.layer, 0, to.kv_heads, head, position);
        keys[first] = float_to_kv(x0 * cosines[i] - x1 * sines[i]);
        keys[second] = float_to_kv(x1 * cosines[i] + x0 * sines[i]);
        kv_t *values = page_row(to.pages, to.page_len, block, to.layer, 1, to.kv_heads, head, position);
        values[i] = float_to_kv(act_to_float(v[(i64)row * ld_v + head * D + i]));
        values[i + HALF] = float_to_kv(act_to_float(v[(i64)row * ld_v + head * D + i + HALF]));
    }
}

#endif
