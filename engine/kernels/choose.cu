// tokens[t] = a token of row t of the logits: the best one, or one drawn with probability exp(logit / temperature) among those
// that top-k, top-p and min-p leave.
//
// x [T, V] f32 with rows of ld elements; draws [T] as below, 8-byte aligned; tokens [T] u32. One block a row. Weights are
// relative to the best token's, which is 1, and summed as integers of 2^-40, so that the order of the threads changes
// nothing. Which tokens are left is a threshold on the logit, found byte by byte from histograms of the ordered bits, and of
// those at the threshold the first ids. The token is where the running sum in the order of ids passes uniform times
// the sum. A row with a NaN or an infinity gives NOT_FINITE: the host looks at it.
// Bound: 4 V bytes a row for the best token, 12 V for a draw, 28 V with top-k or top-p.

#define NOT_FINITE 0xffffffffu
#define THREADS 1024
#define UNIT 1099511627776.0f

struct Draw {
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
};

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
__device__ __noinline__ Kept select(const float *row, u32 cols, Kept kept, float best, float inverse, u32 count, float share) {
    __shared__ u64 masses[256], left_mass;
    __shared__ u32 counts[256], left_count, chosen_byte;
    bool by_mass = share <= 1.0f;
    u32 threshold = 0;
    if (threadIdx.x == 0) left_count = count, left_mass = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) counts[threadIdx.x] = 0, masses[threadIdx.x] = 0;
        __syncthreads();
        u32 above = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
        for (u32 i = threadIdx.x; i < cols; i += THREADS) {
            u32 key = descending(row[i]);
            if ((key & above) != threshold || key >= kept.threshold) continue;
            atomicAdd(&counts[key >> shift & 255], 1u);
            if (by_mass) atomicAdd(&masses[key >> shift & 255], weight(row[i], best, inverse));
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
    return {threshold, (u32)min(ties, (u64)cols)};
}

extern "C" __global__ void __launch_bounds__(THREADS) choose_f32(const float *x, int ld, const Draw *draws, u32 *tokens, int cols) {
    __shared__ Best shared_best[WARP];
    __shared__ u64 shared_sums[WARP];
    __shared__ u32 answer;
    const float *row = x + (i64)blockIdx.x * ld;
    Draw draw = draws[blockIdx.x];
    Best own = {-INFINITY_F, NOT_FINITE};
    bool broken = false;
    for (u32 i = threadIdx.x; i < cols; i += THREADS) {
        float value = row[i];
        broken |= (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
        // Ascending within a thread, so that the first of equal ones stays.
        if (value > own.value) own.value = value, own.index = i;
    }
    own = warp_best(own);
    if (threadIdx.x % WARP == 0) shared_best[threadIdx.x / WARP] = own;
    bool any = __syncthreads_or(broken);
    own = warp_best(shared_best[threadIdx.x % WARP]);
    if (any || draw.inverse_temperature == 0.0f) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = any ? NOT_FINITE : own.index;
        return;
    }

    // What is kept: the keys before the threshold, and so many of those that equal it. Top-p is a share of what top-k leaves.
    float best = own.value, inverse = draw.inverse_temperature;
    Kept kept = {0xffffffffu, 0xffffffffu};
    if (draw.top_k > 0 && draw.top_k < cols) kept = select(row, cols, kept, best, inverse, draw.top_k, 2.0f);
    if (draw.top_p < 1.0f) kept = select(row, cols, kept, best, inverse, cols, draw.top_p);
    u32 threshold = kept.threshold, ties = kept.ties;

    // Each thread has consecutive ids. Ties are numbered first, then the kept weights are summed.
    u32 each = (cols + THREADS - 1) / THREADS, first = threadIdx.x * each, end = min(first + each, (u32)cols);
    u64 ties_before = 0;
    if (ties != 0xffffffffu) {
        u64 equal = 0;
        for (u32 i = first; i < end; i++) equal += descending(row[i]) == threshold;
        block_scan(equal, shared_sums, ties_before);
    }
    u64 least = (u64)(fminf(draw.min_p, 1.0f) * UNIT), sum = 0, before = 0;
    u64 number = ties_before;
    for (u32 i = first; i < end; i++) {
        u32 key = descending(row[i]);
        bool left = key < threshold || (key == threshold && number++ < ties);
        u64 w = weight(row[i], best, inverse);
        if (left && w >= least) sum += w;
    }
    u64 all = block_scan(sum, shared_sums, before);
    u64 target = (u64)(draw.uniform * (double)all);
    if (threadIdx.x == 0) answer = own.index;
    __syncthreads();
    if (target >= before && target < before + sum) {
        number = ties_before;
        for (u32 i = first; i < end; i++) {
            u32 key = descending(row[i]);
            bool left = key < threshold || (key == threshold && number++ < ties);
            u64 w = weight(row[i], best, inverse);
            if (!left || w < least) continue;
            if (target < before + w) {
                answer = i;
                break;
            }
            before += w;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) tokens[blockIdx.x] = answer;
}
