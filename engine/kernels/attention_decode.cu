// Causal attention over paged KV for one row of each of many sequences, on the tensor cores.
//
// out[t, h] = softmax(scale · q[t, h] · keys) · values over the positions that t sees. q, out [T, H · D] act, 16-byte
// aligned rows; D a multiple of 64. A block has one sequence, one kv head with up to 8 of the query heads that share it, and one of
// `splits` parts of the KV; its four warps take 16 tokens each in turn. KV goes straight from the pages to registers, 16
// bytes a lane: the products' inner dimension may be summed in any order, so each lane's 16 bytes are used as they come,
// and values are paired by byte permutations. Tokens and then elements of values are the products' 16 rows, heads their 8 columns:
// so few heads fill them, and what a lane holds leaves room for a third block. Each KV byte is read once for 8 heads of the group.
// Parts are put together by attention_combine. KV past the end of a sequence is read as zero, whatever the page holds.
// KV in 8 bits takes 8 bytes a lane, which become f16 in registers. Bound: 4 K D bytes of KV a seen position (2-byte KV).

#define WARPS 4
#define HEADS 8

struct Parts {
    // [S, H, splits, D] and [S, H, splits, 2] (maximum, sum), where there is more than one split.
    float *sums, *stats;
    const int *sequences;
};

__device__ __forceinline__ u32 word(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Of an 8 x 8 matrix of 16-bit elements, of which each lane has two neighbours of row lane / 4.
__device__ __forceinline__ u32 transpose(u32 pair) {
    u32 turned;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
}

// Tokens of a split: whole rounds of all warps. The last splits may have none, and write nothing.
__device__ __forceinline__ int split_tokens(int tokens, int splits) {
    int round = WARPS * 16, rounds = (tokens + round - 1) / round;
    return (rounds + splits - 1) / splits * round;
}

extern "C" __global__ void __launch_bounds__(WARPS *WARP, 3) attention_decode(Attention a, Parts parts) {
    a.scale *= KV_UNDO;
    __shared__ __align__(16) float shared_sums[WARPS][HEADS][D];
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
    // Of head `octet`.
    uint4 q[D / 32];
#pragma unroll
    for (int c = 0; c < D / 32; c++) {
        q[c] = make_uint4(0, 0, 0, 0);
        if (octet < heads) q[c] = *(const uint4 *)(a.q + row * a.ld_q + (head_base + octet) * D + c * 32 + quad * 8);
        q[c].x = act_pair_to_kv(q[c].x), q[c].y = act_pair_to_kv(q[c].y), q[c].z = act_pair_to_kv(q[c].z), q[c].w = act_pair_to_kv(q[c].w);
    }

    // Of heads 2 · quad and the next. Product c · 4 + i has elements c · 64 + octet · 8 + 2 i and the next.
    float sums[D / 16][4] = {}, largest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {};
    // Lanes 0 to 15 look up the blocks of the 16 tokens, a round ahead.
    int mine = start + warp * 16 + lane % 16, next = mine < end ? blocks[mine / P] : 0;
    for (int token = start + warp * 16; token < end; token += WARPS * 16) {
        int block = next;
        mine += WARPS * 16;
        next = mine < end ? blocks[mine / P] : 0;
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
        // Tokens octet and octet + 8 of each of the two heads.
        float scores[4] = {};
#pragma unroll
        for (int c = 0; c < D / 32; c++) {
            mma(scores, {k[0][c].x, k[1][c].x, k[0][c].y, k[1][c].y}, q[c].x, q[c].y);
            mma(scores, {k[0][c].z, k[1][c].z, k[0][c].w, k[1][c].w}, q[c].z, q[c].w);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (token + octet >= end) scores[i] = -INFINITY_F;
            if (token + 8 + octet >= end) scores[2 + i] = -INFINITY_F;
            float now = fmaxf(largest[i], fmaxf(scores[i], scores[2 + i]));
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, step));
            float base = now == -INFINITY_F ? 0.0f : now * a.scale, keep = exp2_fast(largest[i] * a.scale - base);
            largest[i] = now;
            scores[i] = exp2_fast(scores[i] * a.scale - base);
            scores[2 + i] = exp2_fast(scores[2 + i] * a.scale - base);
            total[i] = total[i] * keep + scores[i] + scores[2 + i];
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                sums[n][i] *= keep;
                sums[n][2 + i] *= keep;
            }
        }
        // Weights of tokens as rows become those of tokens as columns.
        u32 p0 = transpose(pack_kv(scores[0], scores[1])), p1 = transpose(pack_kv(scores[2], scores[3]));
#pragma unroll
        for (int c = 0; c < D / 64; c++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 first = word(v[0][c], i), second = word(v[1][c], i), third = word(v[2][c], i), fourth = word(v[3][c], i);
                mma(sums[c * 4 + i],
                    {__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632), __byte_perm(third, fourth, 0x5410), __byte_perm(third, fourth, 0x7632)},
                    p0, p1);
            }
        }
    }

    // Each warp's part to shared memory, then all threads put them together.
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = total[i];
#pragma unroll
        for (int step = 4; step < WARP; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        int head = quad * 2 + i;
        if (head >= heads) continue;
        if (octet == 0) shared_stats[warp][head][0] = largest[i], shared_stats[warp][head][1] = sum;
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            *(float2 *)(shared_sums[warp][head] + n / 4 * 64 + octet * 8 + n % 4 * 2) = make_float2(sums[n][i], sums[n][2 + i]);
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
            a.out[row * a.ld_out + (head_base + head) * D + d] = float_to_act(value * KV_UNDO / sum);
        } else {
            i64 part = ((i64)blockIdx.z * all_heads + head_base + head) * splits + split;
            parts.sums[part * D + d] = value * KV_UNDO;
            if (d == 0) parts.stats[2 * part] = most, parts.stats[2 * part + 1] = sum;
        }
    }
}

// Puts the splits of a (sequence, head) together: a block each, threads over D.
extern "C" __global__ void attention_combine(Attention a, Parts parts, int splits) {
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
    a.out[(i64)a.first_rows[sequence] * a.ld_out + head * D + threadIdx.x] = float_to_act(value / sum);
}
