// Causal attention over paged KV for one row of each of many sequences, on the tensor cores.
//
// out[t, h] = softmax(scale · q[t, h] · keys) · values over the positions that t sees. q, out [T, H · D] bf16, 16-byte
// aligned rows; D a multiple of 64. A block has one sequence, one kv head with up to 16 of the query heads that share it, and one of
// `splits` parts of the KV; its four warps take 16 tokens each in turn. KV goes straight from the pages to registers, 16
// bytes a lane: the products' inner dimension may be summed in any order, so each lane's 16 bytes are used as they come,
// and values are paired by byte permutations. Each KV byte is read once for all heads of the group. Parts are put together
// by attention_combine. KV past the end of a sequence is read as zero, whatever the page holds.
// KV in 8 bits takes 8 bytes a lane, which become f16 in registers. Bound: 4 K D bytes of KV a seen position (2-byte KV).

#define WARPS 4
#define HEADS 16

struct Parts {
    // [S, H, splits, D] and [S, H, splits, 2] (maximum, sum), where there is more than one split.
    float *sums, *stats;
    const int *sequences;
};

__device__ __forceinline__ u32 word(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Tokens of a split: whole rounds of all warps. The last splits may have none, and write nothing.
__device__ __forceinline__ int split_tokens(int tokens, int splits) {
    int round = WARPS * 16, rounds = (tokens + round - 1) / round;
    return (rounds + splits - 1) / splits * round;
}

extern "C" __global__ void __launch_bounds__(WARPS *WARP) attention_decode_bf16(Attention a, Parts parts) {
    a.scale *= KV_UNDO;
    __shared__ float shared_sums[WARPS][HEADS][D];
    __shared__ float shared_stats[WARPS][HEADS][2];
    int sequence = parts.sequences[blockIdx.z], splits = gridDim.y, split = blockIdx.y;
    if (sequence < 0) return;
    int tiles = (a.group + HEADS - 1) / HEADS;
    int kv_head = blockIdx.x / tiles, head_base = kv_head * a.group + blockIdx.x % tiles * HEADS;
    int heads = min(HEADS, (kv_head + 1) * a.group - head_base), all_heads = a.kv_heads * a.group;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quad = lane % 4, octet = lane / 4;
    i64 row = a.first_rows[sequence];
    int len = a.past_lens[sequence] + 1, seen = max(0, len - a.window);
    int each = split_tokens(len - seen, splits);
    int start = seen + split * each, end = min(len, start + each);
    if (start >= len) return;

    const int *blocks = a.blocks + a.block_starts[sequence];
    const kv_t *keys = a.pages + plane(a, 0, kv_head), *values = a.pages + plane(a, 1, kv_head);
    u32 q[D / 16][4];
#pragma unroll
    for (int c = 0; c < D / 32; c++) {
        uint4 rows[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int head = octet + half * 8;
            rows[half] = make_uint4(0, 0, 0, 0);
            if (head < heads) rows[half] = *(const uint4 *)(a.q + row * a.ld_q + (head_base + head) * D + c * 32 + quad * 8);
        }
#pragma unroll
        for (int s = 0; s < 2; s++) {
            q[2 * c + s][0] = bf16_pair_to_kv(word(rows[0], 2 * s));
            q[2 * c + s][1] = bf16_pair_to_kv(word(rows[1], 2 * s));
            q[2 * c + s][2] = bf16_pair_to_kv(word(rows[0], 2 * s + 1));
            q[2 * c + s][3] = bf16_pair_to_kv(word(rows[1], 2 * s + 1));
        }
    }

    float sums[D / 8][4] = {}, largest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {};
    for (int token = start + warp * 16; token < end; token += WARPS * 16) {
        // Lanes 0 to 15 look up the blocks of the 16 tokens.
        int mine = token + lane % 16;
        int block = mine < end ? blocks[mine / P] : 0;
        uint4 k[2][D / 32], v[4][D / 64];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int at = token + n * 8 + octet;
            const kv_t *from = keys + __shfl_sync(0xffffffffu, block, n * 8 + octet) * a.page_len + at % P * D + quad * 8;
#pragma unroll
            for (int c = 0; c < D / 32; c++) k[n][c] = load_kv(from + c * 32, at < end);
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int local = n / 2 * 8 + quad * 2 + n % 2, at = token + local;
            const kv_t *from = values + __shfl_sync(0xffffffffu, block, local) * a.page_len + at % P * D + octet * 8;
#pragma unroll
            for (int c = 0; c < D / 64; c++) v[n][c] = load_kv(from + c * 64, at < end);
        }
        float scores[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int c = 0; c < D / 32; c++) {
                mma(scores[n], q[2 * c], k[n][c].x, k[n][c].y);
                mma(scores[n], q[2 * c + 1], k[n][c].z, k[n][c].w);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = largest[half];
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &score = scores[n][2 * half + i];
                    if (token + n * 8 + quad * 2 + i >= end) score = -INFINITY_F;
                    now = fmaxf(now, score);
                }
            }
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
            float base = now == -INFINITY_F ? 0.0f : now * a.scale, keep = exp2_fast(largest[half] * a.scale - base);
            largest[half] = now;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float weight = exp2_fast(scores[n][2 * half + i] * a.scale - base);
                    scores[n][2 * half + i] = weight;
                    sum += weight;
                }
            }
            total[half] = total[half] * keep + sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                sums[n][2 * half] *= keep;
                sums[n][2 * half + 1] *= keep;
            }
        }
        u32 p[4] = {pack_kv(scores[0][0], scores[0][1]), pack_kv(scores[0][2], scores[0][3]),
                    pack_kv(scores[1][0], scores[1][1]), pack_kv(scores[1][2], scores[1][3])};
#pragma unroll
        for (int c = 0; c < D / 64; c++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                u32 select = j % 2 ? 0x7632 : 0x5410;
                u32 b0 = __byte_perm(word(v[0][c], j / 2), word(v[1][c], j / 2), select);
                u32 b1 = __byte_perm(word(v[2][c], j / 2), word(v[3][c], j / 2), select);
                mma(sums[c * 8 + j], p, b0, b1);
            }
        }
    }

    // Each warp's part to shared memory, then all threads put them together. Column n of product j is element n * 8 + j.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = total[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        int head = octet + half * 8;
        if (head >= heads) continue;
        if (quad == 0) shared_stats[warp][head][0] = largest[half], shared_stats[warp][head][1] = sum;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            int d = n / 8 * 64 + quad * 16 + n % 8;
            shared_sums[warp][head][d] = sums[n][2 * half];
            shared_sums[warp][head][d + 8] = sums[n][2 * half + 1];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * D; i += WARPS * WARP) {
        int head = i / D, d = i % D;
        float most = -INFINITY_F, sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, shared_stats[w][head][0]);
        float base = most == -INFINITY_F ? 0.0f : most * a.scale;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float keep = exp2_fast(shared_stats[w][head][0] * a.scale - base);
            sum += keep * shared_stats[w][head][1];
            value += keep * shared_sums[w][head][d];
        }
        if (splits == 1) {
            a.out[row * a.ld_out + (head_base + head) * D + d] = float_to_bf16(value * KV_UNDO / sum);
        } else {
            i64 part = ((i64)blockIdx.z * all_heads + head_base + head) * splits + split;
            parts.sums[part * D + d] = value * KV_UNDO;
            if (d == 0) parts.stats[2 * part] = most, parts.stats[2 * part + 1] = sum;
        }
    }
}

// Puts the splits of a (sequence, head) together: a block each, threads over D.
extern "C" __global__ void attention_combine_bf16(Attention a, Parts parts, int splits) {
    a.scale *= KV_UNDO;
    int sequence = parts.sequences[blockIdx.y], head = blockIdx.x;
    if (sequence < 0) return;
    i64 part = ((i64)blockIdx.y * gridDim.x + head) * splits;
    int len = a.past_lens[sequence] + 1, seen = max(0, len - a.window), each = split_tokens(len - seen, splits);
    splits = (len - seen + each - 1) / each;
    float most = -INFINITY_F, sum = 0.0f, value = 0.0f;
    for (int s = 0; s < splits; s++) most = fmaxf(most, parts.stats[2 * (part + s)]);
    for (int s = 0; s < splits; s++) {
        float keep = exp2_fast((parts.stats[2 * (part + s)] - most) * a.scale);
        sum += keep * parts.stats[2 * (part + s) + 1];
        value += keep * parts.sums[(part + s) * D + threadIdx.x];
    }
    a.out[(i64)a.first_rows[sequence] * a.ld_out + head * D + threadIdx.x] = float_to_bf16(value / sum);
}
