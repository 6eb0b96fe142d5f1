// chosen[t] = a token of row t of the logits: the best one, or one drawn with probability exp(logit / temperature) among those
// that top-k, top-p and min-p leave, or one that is given; and how likely it was.
//
// x [T, V] f32 with rows of ld elements; wishes [T] as below, 8-byte aligned; chosen [T] u32; tokens and rows: row t computes
// tokens[rows[t]]. One block a row. Where a wish has a table (`seen.cu`), the row's own token is counted in it, and every reading of a
// logit changes it as the host's sampler does, with the same roundings; the logits themselves stay, for log-probabilities are
// by these. Weights are relative to the best token's, which is 1, and summed as integers of 2^-40, so that the order of the threads
// changes nothing. Which tokens are left is a threshold on the logit, found byte by byte from histograms of the ordered bits, and
// of those at the threshold the first ids. The token is where the running sum in the order of ids passes uniform times
// the sum. A row with a NaN or an infinity, or of which nothing may be chosen, gives NOT_FINITE: the host looks at it.
// Bound: 4 V bytes a row for the best token, 12 V for a draw, 28 V with top-k or top-p, 8 V more for log-probabilities; twice as
// many where there is a table.

#define NOT_FINITE 0xffffffffu
#define THREADS 1024
#define UNIT 1099511627776.0f
// Tokens that may be among the best, at most; with more, that many have nearly the same logit.
#define CANDIDATES 1024

// Bits of a table's words, as in `seen.cu`; the others count.
#define PROMPT 0x80000000u
#define BANNABLE 0x40000000u
#define BIASED 0x20000000u
#define COUNT 0x1fffffffu
// The host's sampler counts no further.
#define COUNT_MAX 65535u

// Bits of a wish.
#define COUNTS_OWN 1u
#define BANS 2u
#define IS_GIVEN 4u

struct Wish {
    // 0 takes the best token.
    float inverse_temperature;
    // 0 for no limit.
    u32 top_k;
    // 1 or more for no limit.
    float top_p;
    // 0 for no limit.
    float min_p;
    // In [0, 1).
    double uniform;
    // [V], then the biases; or null.
    u32 *table;
    // Where to tell of the token: log-probability, rank, then pairs of token and log-probability; or null.
    u32 *told;
    float repetition, frequency, presence;
    u32 flags;
    // Alternatives to be told of, at most 32.
    u32 top;
    u32 given;
};

// A row's logits as they are to be chosen by. Handed on by value, so that it stays in registers.
struct Row {
    const float *x;
    u32 cols;
    const u32 *table;
    float repetition, frequency, presence;
    bool bans;
};

__device__ __noinline__ float biased(const u32 *biases, u32 token, float value) {
    for (u32 i = 0; i < biases[0]; i++)
        if (biases[1 + 2 * i] == token) value = __fadd_rn(value, __uint_as_float(biases[2 + 2 * i]));
    return value;
}

__device__ __forceinline__ float changed(const Row &row, u32 token, float value) {
    if (!row.table) return value;
    u32 seen = row.table[token];
    if (seen == 0) return value;
    if (seen & BIASED) value = biased(row.table + row.cols, token, value);
    u32 count = min(seen & COUNT, COUNT_MAX);
    if (count > 0 || seen & PROMPT) value = value > 0.0f ? __fdiv_rn(value, row.repetition) : __fmul_rn(value, row.repetition);
    if (count > 0) value = __fsub_rn(value, __fadd_rn(__fmul_rn(row.frequency, (float)count), row.presence));
    return row.bans && seen & BANNABLE ? -INFINITY_F : value;
}

__device__ __forceinline__ float logit(const Row &row, u32 token) { return changed(row, token, row.x[token]); }

struct Best {
    float value;
    u32 index;
};

// The greater; of equal ones the first.
__device__ __forceinline__ Best better(Best a, Best b) {
    bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return second ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        Best other;
        other.value = __shfl_xor_sync(0xffffffffu, best.value, step);
        other.index = __shfl_xor_sync(0xffffffffu, best.index, step);
        best = better(best, other);
    }
    return best;
}

// Bits that are ordered as the numbers are, the greatest first.
__device__ __forceinline__ u32 descending(float value) {
    u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

// Their reverse.
__device__ __forceinline__ float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key : ~key & 0x7fffffffu); }

__device__ __forceinline__ u64 weight(float value, float best, float inverse_temperature) {
    return (u64)(__expf((value - best) * inverse_temperature) * UNIT);
}

// Sum over the block of what each thread has, and over the threads before this one.
__device__ __forceinline__ u64 block_scan(u64 own, u64 *shared, u64 &before) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 running = own;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        u64 other = __shfl_up_sync(0xffffffffu, running, step);
        if (lane >= step) running += other;
    }
    __syncthreads();
    if (lane == WARP - 1) shared[warp] = running;
    __syncthreads();
    u64 sums = shared[lane], sum = sums;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        u64 other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    u64 all = __shfl_sync(0xffffffffu, sum, WARP - 1);
    u64 warps = __shfl_sync(0xffffffffu, sum - sums, warp);
    before = warps + running - own;
    return all;
}

struct Kept {
    u32 threshold, ties;
};

// The first `count` of the kept tokens, or as many as reach `share` of their weight, where that is not more than 1.
__device__ __noinline__ Kept select(Row row, Kept kept, float best, float inverse, u32 count, float share) {
    __shared__ u64 masses[256], left_mass;
    __shared__ u32 counts[256], left_count, chosen_byte;
    bool by_mass = share <= 1.0f;
    u32 threshold = 0;
    if (threadIdx.x == 0) left_count = count, left_mass = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) counts[threadIdx.x] = 0, masses[threadIdx.x] = 0;
        __syncthreads();
        u32 above = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
        for (u32 i = threadIdx.x; i < row.cols; i += THREADS) {
            float value = logit(row, i);
            u32 key = descending(value);
            if ((key & above) != threshold || key >= kept.threshold) continue;
            atomicAdd(&counts[key >> shift & 255], 1u);
            if (by_mass) atomicAdd(&masses[key >> shift & 255], weight(value, best, inverse));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            // Those at the former threshold all weigh the same.
            if (kept.ties != 0xffffffffu && (kept.threshold & above) == threshold) {
                counts[kept.threshold >> shift & 255] += kept.ties;
                masses[kept.threshold >> shift & 255] += kept.ties * weight(value_of(kept.threshold), best, inverse);
            }
            if (shift == 24 && by_mass) {
                for (int b = 0; b < 256; b++) left_mass += masses[b];
                left_mass = max((u64)((double)share * (double)left_mass), (u64)1);
            }
            u32 b = 0;
            for (; b < 255 && counts[b] < left_count && (!by_mass || masses[b] < left_mass); b++) {
                left_count -= counts[b];
                left_mass -= by_mass ? masses[b] : 0;
            }
            chosen_byte = b;
        }
        __syncthreads();
        threshold |= chosen_byte << shift;
    }
    u64 each = max(weight(value_of(threshold), best, inverse), (u64)1);
    u64 ties = by_mass ? (left_mass + each - 1) / each : left_count;
    if (threshold == kept.threshold) ties = min(ties, (u64)kept.ties);
    return {threshold, (u32)min(ties, (u64)row.cols)};
}

// A token with the probability of its weight; every thread gets it.
__device__ __noinline__ u32 drawn(Row row, Wish wish, Best most) {
    __shared__ u64 shared_sums[WARP];
    __shared__ u32 answer;
    // What is kept: the keys before the threshold, and so many of those that equal it. Top-p is a share of what top-k leaves.
    u32 cols = row.cols;
    float best = most.value, inverse = wish.inverse_temperature;
    Kept kept = {0xffffffffu, 0xffffffffu};
    if (wish.top_k > 0 && wish.top_k < cols) kept = select(row, kept, best, inverse, wish.top_k, 2.0f);
    if (wish.top_p < 1.0f) kept = select(row, kept, best, inverse, cols, wish.top_p);
    u32 threshold = kept.threshold, ties = kept.ties;

    // Each thread has consecutive ids. Ties are numbered first, then the kept weights are summed.
    u32 each = (cols + THREADS - 1) / THREADS, first = threadIdx.x * each, end = min(first + each, cols);
    u64 ties_before = 0;
    if (ties != 0xffffffffu) {
        u64 equal = 0;
        for (u32 i = first; i < end; i++) equal += descending(logit(row, i)) == threshold;
        block_scan(equal, shared_sums, ties_before);
    }
    u64 least = (u64)(fminf(wish.min_p, 1.0f) * UNIT), sum = 0, before = 0;
    u64 number = ties_before;
    for (u32 i = first; i < end; i++) {
        float value = logit(row, i);
        u32 key = descending(value);
        bool left = key < threshold || (key == threshold && number++ < ties);
        u64 w = weight(value, best, inverse);
        if (left && w >= least) sum += w;
    }
    u64 all = block_scan(sum, shared_sums, before);
    u64 target = (u64)(wish.uniform * (double)all);
    if (threadIdx.x == 0) answer = most.index;
    __syncthreads();
    if (target >= before && target < before + sum) {
        number = ties_before;
        for (u32 i = first; i < end; i++) {
            float value = logit(row, i);
            u32 key = descending(value);
            bool left = key < threshold || (key == threshold && number++ < ties);
            u64 w = weight(value, best, inverse);
            if (!left || w < least) continue;
            if (target < before + w) {
                answer = i;
                break;
            }
            before += w;
        }
    }
    __syncthreads();
    return answer;
}

// How likely a token and the `top` best are by the logits as they are: all that reaches the top-th greatest of the warps' greatest
// is looked at, which is little more than what is wanted.
__device__ __noinline__ void tell(Row row, u32 token, u32 top, u32 *told) {
    __shared__ float shared_most[WARP], logits[CANDIDATES];
    __shared__ u64 shared_sums[WARP];
    __shared__ u32 found, ids[CANDIDATES];
    u32 cols = row.cols, lane = threadIdx.x % WARP;
    top = min(top, cols);
    float most = -INFINITY_F;
    for (u32 i = threadIdx.x; i < cols; i += THREADS) most = fmaxf(most, row.x[i]);
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (lane == 0) shared_most[threadIdx.x / WARP] = most;
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    float of_warp = shared_most[lane], best = -INFINITY_F;
    u32 greater = 0;
    for (u32 w = 0; w < WARP; w++) {
        float other = __shfl_sync(0xffffffffu, of_warp, w);
        best = fmaxf(best, other);
        greater += other > of_warp || (other == of_warp && w < lane);
    }
    u32 holder = __ffs(__ballot_sync(0xffffffffu, greater + 1 == max(top, 1u))) - 1;
    float least = __shfl_sync(0xffffffffu, of_warp, holder), own = row.x[token];
    u64 sum = 0, ahead = 0, before;
    for (u32 i = threadIdx.x; i < cols; i += THREADS) {
        float value = row.x[i];
        sum += weight(value, best, 1.0f);
        ahead += value > own || (value == own && i < token);
        if (top == 0 || value < least) continue;
        u32 at = atomicAdd(&found, 1u);
        if (at < CANDIDATES) ids[at] = i, logits[at] = value;
    }
    double normalizer = (double)best + log((double)block_scan(sum, shared_sums, before) / UNIT);
    u64 rank = block_scan(ahead, shared_sums, before) + 1;
    u32 count = found;
    if (count > CANDIDATES) {
        // Too many are equal: the exact threshold, and of those at it the first.
        Kept kept = select(row, {0xffffffffu, 0xffffffffu}, best, 1.0f, top, 2.0f);
        u32 each = (cols + THREADS - 1) / THREADS, first = threadIdx.x * each, end = min(first + each, cols);
        u64 equal = 0;
        for (u32 i = first; i < end; i++) equal += descending(row.x[i]) == kept.threshold;
        block_scan(equal, shared_sums, before);
        if (threadIdx.x == 0) found = 0;
        __syncthreads();
        for (u32 i = first; i < end; i++) {
            u32 key = descending(row.x[i]);
            if (key > kept.threshold || (key == kept.threshold && before++ >= kept.ties)) continue;
            u32 at = atomicAdd(&found, 1u);
            ids[at] = i, logits[at] = row.x[i];
        }
        __syncthreads();
        count = found;
    }
    for (u32 c = threadIdx.x; c < count; c += THREADS) {
        u32 place = 0;
        for (u32 o = 0; o < count; o++) place += logits[o] > logits[c] || (logits[o] == logits[c] && ids[o] < ids[c]);
        if (place >= top) continue;
        told[2 + 2 * place] = ids[c];
        told[3 + 2 * place] = __float_as_uint((float)((double)logits[c] - normalizer));
    }
    if (threadIdx.x == 0) {
        told[0] = __float_as_uint((float)((double)own - normalizer));
        told[1] = (u32)rank;
    }
}

// The best of the thread's tokens, and whether one is not finite.
template <bool CHANGES>
__device__ __forceinline__ Best best_of(const Row &row, bool &broken) {
    Best own = {-INFINITY_F, NOT_FINITE};
    for (u32 i = threadIdx.x; i < row.cols; i += THREADS) {
        float value = row.x[i];
        broken |= (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
        if (CHANGES) value = changed(row, i, value);
        // Ascending within a thread, so that the first of equal ones stays.
        if (value > own.value) own.value = value, own.index = i;
    }
    return own;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose_f32(const float *x, int ld, const Wish *wishes, u32 *chosen, int cols,
                                                                 const u32 *tokens, const u32 *rows) {
    __shared__ Best shared_best[WARP];
    Wish wish = wishes[blockIdx.x];
    Row row = {x + (i64)blockIdx.x * ld, (u32)cols, wish.table, wish.repetition, wish.frequency, wish.presence, (wish.flags & BANS) != 0};
    if (wish.table && wish.flags & COUNTS_OWN) {
        u32 own = tokens[rows[blockIdx.x]];
        if (threadIdx.x == 0 && own < cols) wish.table[own]++;
        __syncthreads();
    }
    bool broken = false;
    // Apart, so that nothing stands between the loads of the plain one.
    Best own = row.table ? best_of<true>(row, broken) : best_of<false>(row, broken);
    own = warp_best(own);
    if (threadIdx.x % WARP == 0) shared_best[threadIdx.x / WARP] = own;
    bool any = __syncthreads_or(broken);
    own = warp_best(shared_best[threadIdx.x % WARP]);
    u32 token = own.index;
    if (any || own.value == -INFINITY_F) token = NOT_FINITE;
    else if (wish.flags & IS_GIVEN) token = wish.given;
    else if (wish.inverse_temperature != 0.0f) token = drawn(row, wish, own);
    if (threadIdx.x == 0) chosen[blockIdx.x] = token;
    if (!wish.told || token == NOT_FINITE) return;
    row.table = nullptr;
    tell(row, token, wish.top, wish.told);
}
