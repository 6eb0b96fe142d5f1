// Causal attention over paged KV for many rows of a sequence, on the tensor cores.
//
// out[t, h] = softmax(scale · q[t, h] · keys) · values over the positions that t sees. q, out [T, H · D] act, 16-byte
// aligned rows; D a multiple of 16. tiles [n] pairs (sequence, first row within it), heaviest first. One block a tile of ROWS
// rows and a head; a warp 16 · M of the rows, whose outputs and scores stay in its registers (flash attention). Keys and
// values come through shared memory, TOKENS at a time; values of a tile arrive while its scores are computed, keys of the
// next one while its values are used. Rows of shared memory are padded by 16 bytes, so that the eight rows of an ldmatrix
// fall into different banks. KV past the end of a sequence is read as zero, whatever the page holds.
// Bound: 4 D operations a (row, head, seen position) on the tensor cores.

#ifndef M
#define M 2
#endif

#define WARPS 4
#define ROWS (WARPS * 16 * M)
#define TOKENS 64
#define STRIDE (D + 8)
#define LOG_ZERO -INFINITY_F

__device__ __forceinline__ u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes to shared memory, asynchronously; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(u32 to, const void *from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int LEFT> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

#define THREADS (WARPS * WARP)
#define CHUNKS (D / 8)
// Rows that all threads copy at once, where a row's chunks divide them.
#define PASS_ROWS (THREADS / CHUNKS)

#if KV == 3
__device__ __forceinline__ void store_shared(u32 to, const uint4 &v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
#endif

// Begins to copy TOKENS rows of one side from `token` on, which is a multiple of TOKENS.
__device__ __forceinline__ void fetch(u32 to, const kv_t *pages, i64 page_len, const int *blocks, int token, int end) {
#if KV == 3
    // What has to be widened goes through registers: nothing of it is left to arrive later.
#pragma unroll 8
    for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS, at = token + row;
        bool valid = at < end;
        int block = valid ? blocks[at / P] : 0;
        store_shared(to + (row * STRIDE + chunk * 8) * 2, load_kv(pages + block * page_len + at % P * D + chunk * 8, valid));
    }
#elif THREADS % (D / 8) == 0 && TOKENS % P == 0 && P % PASS_ROWS == 0
    // Pages and passes fit each other: which page a pass reads is known beforehand.
    int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    to += (first * STRIDE + chunk * 8) * 2;
    pages += first * D + chunk * 8;
#pragma unroll
    for (int page = 0; page < TOKENS / P; page++) {
        int block = token + page * P < end ? blocks[token / P + page] : 0;
        const kv_t *from = pages + block * page_len;
#pragma unroll
        for (int row = 0; row < P; row += PASS_ROWS) {
            copy_async(to + (page * P + row) * STRIDE * 2, from + row * D, token + page * P + row + first < end);
        }
    }
#else
    for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS, at = token + row;
        bool valid = at < end;
        int block = valid ? blocks[at / P] : 0;
        copy_async(to + (row * STRIDE + chunk * 8) * 2, pages + block * page_len + at % P * D + chunk * 8, valid);
    }
#endif
    commit();
}

extern "C" __global__ void __launch_bounds__(WARPS *WARP) attention_prefill(Attention a, const int *tiles) {
    a.scale *= KV_UNDO;
    extern __shared__ __align__(16) u16 shared[];
    u16 *shared_q = shared, *shared_k = shared_q + ROWS * STRIDE, *shared_v = shared_k + TOKENS * STRIDE;
    int sequence = tiles[2 * blockIdx.x], first = tiles[2 * blockIdx.x + 1], head = blockIdx.y;
    int rows = min(ROWS, a.row_counts[sequence] - first);
    int position = a.past_lens[sequence] + first;
    int end = position + rows, start = max(0, position + 1 - a.window) / TOKENS * TOKENS;
    i64 row_base = a.first_rows[sequence] + first;
    const int *blocks = a.blocks + a.block_starts[sequence];
    const kv_t *keys = a.pages + plane(a, 0, head / a.group), *values = a.pages + plane(a, 1, head / a.group);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 at_q = shared_address(shared_q), at_k = shared_address(shared_k), at_v = shared_address(shared_v);

    fetch(at_k, keys, a.page_len, blocks, start, end);
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += WARPS * WARP) {
        int row = i / (D / 8), chunk = i % (D / 8);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row < rows) v = *(const uint4 *)(a.q + (row_base + row) * a.ld_q + head * D + chunk * 8);
        v.x = act_pair_to_kv(v.x), v.y = act_pair_to_kv(v.y), v.z = act_pair_to_kv(v.z), v.w = act_pair_to_kv(v.w);
        *(uint4 *)(shared_q + row * STRIDE + chunk * 8) = v;
    }

    float sums[M][D / 8][4] = {}, largest[M][2], total[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = LOG_ZERO;
    // This lane's row of the first 16 of the warp, as a position; the others follow at distances of 8.
    int own = position + warp * 16 * M + lane / 4;
    u32 address_q = at_q + ((warp * 16 * M + lane % 16) * STRIDE + lane / 16 * 8) * 2;
    u32 address_k = at_k + ((lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8) * 2;
    u32 address_v = at_v + (lane % 16 * STRIDE + lane / 16 * 8) * 2;

    for (int token = start; token < end; token += TOKENS) {
        wait<0>();
        __syncthreads();
        fetch(at_v, values, a.page_len, blocks, token, end);
        float scores[M][TOKENS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            u32 q[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) load_matrices(q[m], address_q + (m * 16 * STRIDE + k * 16) * 2);
#pragma unroll
            for (int n = 0; n < TOKENS / 16; n++) {
                u32 b[4];
                load_matrices(b, address_k + (n * 16 * STRIDE + k * 16) * 2);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma(scores[m][2 * n], q[m], b[0], b[1]);
                    mma(scores[m][2 * n + 1], q[m], b[2], b[3]);
                }
            }
        }
        wait<0>();
        __syncthreads();
        if (token + TOKENS < end) fetch(at_k, keys, a.page_len, blocks, token + TOKENS, end);
        bool all_seen = token + TOKENS <= position + 1 && token + a.window > end - 1;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = own + m * 16 + half * 8;
                float now = largest[m][half];
                if (!all_seen) {
#pragma unroll
                    for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            int at = token + n * 8 + lane % 4 * 2 + i;
                            if (at > row || at + a.window <= row) scores[m][n][2 * half + i] = LOG_ZERO;
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < TOKENS / 8; n++) {
                    now = fmaxf(now, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                // A row that has seen nothing yet keeps zeros instead of becoming NaN.
                float base = now == LOG_ZERO ? 0.0f : now * a.scale;
                float keep = exp2_fast(largest[m][half] * a.scale - base);
                largest[m][half] = now;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float weight = exp2_fast(scores[m][n][2 * half + i] * a.scale - base);
                        scores[m][n][2 * half + i] = weight;
                        sum += weight;
                    }
                }
                total[m][half] = total[m][half] * keep + sum;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    sums[m][n][2 * half] *= keep;
                    sums[m][n][2 * half + 1] *= keep;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < TOKENS / 16; k++) {
            u32 p[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                p[m][0] = pack_kv(scores[m][2 * k][0], scores[m][2 * k][1]);
                p[m][1] = pack_kv(scores[m][2 * k][2], scores[m][2 * k][3]);
                p[m][2] = pack_kv(scores[m][2 * k + 1][0], scores[m][2 * k + 1][1]);
                p[m][3] = pack_kv(scores[m][2 * k + 1][2], scores[m][2 * k + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                load_matrices_transposed(b, address_v + (k * 16 * STRIDE + n * 16) * 2);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma(sums[m][2 * n], p[m], b[0], b[1]);
                    mma(sums[m][2 * n + 1], p[m], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            float scale = KV_UNDO / sum;
            int row = warp * 16 * M + m * 16 + half * 8 + lane / 4;
            if (row >= rows) continue;
            u16 *out = a.out + (row_base + row) * a.ld_out + head * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(u32 *)(out + n * 8) = pack_act(sums[m][n][2 * half] * scale, sums[m][n][2 * half + 1] * scale);
            }
        }
    }
}
