// Causal attention over paged KV for many rows of a sequence, on Hopper's asynchronous tensor cores.
//
// What attention_prefill.cu computes, for D = 128 and any P: same operands, same tiles, one block a tile of ROWS rows and a head. A
// warpgroup brings keys and values to shared memory, TOKENS at a time and STAGES tiles ahead, those in 8 bits as f16; two
// others take 64 rows each. While the scores of a tile are computed, so is the part of the tile before in the output, and while
// one of the two has its exponentials to do, the other has the tensor cores: they take turns to begin. Tiles come last first, so
// that those which need masking come first. KV past the end of a sequence is read as zero, whatever the page holds.
// In shared memory a row of 128 elements is two halves of 128 bytes, whose 16-byte parts are permuted by the row's number, as
// the tensor cores want it (128-byte swizzle). Bound: 4 D operations a (row, head, seen position) on the tensor cores.

#define ROWS 128
#define TOKENS 128
#ifndef STAGES
#define STAGES 2
#endif
#define GROUP_THREADS 128
#define GROUP_ROWS 64
// Registers of a thread that brings and of one that computes: 65,536 for 384 threads in all.
#ifndef BRINGING
#define BRINGING "88"
#define COMPUTING "208"
#endif
// Bytes of half a tile of KV, and of half of a warpgroup's rows of q.
#define HALF (TOKENS * 128)
#define HALF_Q (GROUP_ROWS * 128)
#define SIDE (2 * HALF)
#define LOG_ZERO -INFINITY_F
#ifndef TURNS
#define TURNS 1
#endif

__device__ __forceinline__ u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void store_shared(u32 to, const uint4 &v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// What this thread wrote to shared memory is there for the tensor cores, once a barrier has been passed.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// === barriers in shared memory: of each stage one for full and one for empty, of keys and of values ===

__device__ __forceinline__ void barrier_init(u32 at, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
// A warp's arrival.
__device__ __forceinline__ void arrive(u32 at) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void wait(u32 at, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(at), "r"(parity) : "memory");
    } while (!done);
}

// Which stage the n-th tile is in, and the parity of the barriers' round.
struct Place {
    u32 stage, parity;
    __device__ __forceinline__ Place(u32 n) : stage(n % STAGES), parity(n / STAGES % 2) {}
};
struct Barriers {
    u32 at;
    __device__ __forceinline__ u32 full(int side, const Place &p) const { return at + (side * STAGES + p.stage) * 16; }
    __device__ __forceinline__ u32 empty(int side, const Place &p) const { return full(side, p) + 8; }
};

// === the tensor cores of a warpgroup ===

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void complete() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Nothing of c is read or written across this.
__device__ __forceinline__ void hold(float (&c)[64]) {
#pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : "+f"(c[i])::"memory");
}

// Of a matrix in shared memory: groups of eight rows are 1,024 bytes apart, halves of a row so many; 128-byte swizzle.
__device__ __forceinline__ u64 describe(u32 address, u32 halves_apart) {
    return (u64)(address >> 4) | (u64)(halves_apart >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

#define C8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define C64 C8(0), C8(8), C8(16), C8(24), C8(32), C8(40), C8(48), C8(56)
#define NAMES                                                                                                          \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "            \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "             \
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "             \
    "%62, %63}"
#define WGMMA "wgmma.mma_async.sync.aligned.m64n128k16.f32." MMA_TYPE "." MMA_TYPE " " NAMES

// c = a · bᵀ, or c += where MORE: a [64, 16], b [128, 16], both along their rows.
template <int MORE> __device__ __forceinline__ void multiply(float (&c)[64], u64 a, u64 b) {
    asm volatile(WGMMA ", %64, %65, %66, 1, 1, 0, 0;" : C64 : "l"(a), "l"(b), "n"(MORE));
}
// c += a · b: a [64, 16] in registers, b [16, 128] along its rows.
__device__ __forceinline__ void multiply_held(float (&c)[64], const u32 *a, u64 b) {
    asm volatile(WGMMA ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;" : C64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Begins scores = q · keys.
__device__ __forceinline__ void begin_scores(float (&scores)[64], u64 q, u64 keys) {
    hold(scores);
    begin();
    multiply<0>(scores, q, keys);
#pragma unroll
    for (int k = 1; k < D / 16; k++) {
        multiply<1>(scores, q + (k / 4 * HALF_Q + k % 4 * 32) / 16, keys + (k / 4 * HALF + k % 4 * 32) / 16);
    }
    commit();
}
// Begins sums += weights · values.
__device__ __forceinline__ void begin_sums(float (&sums)[64], const u32 (&weights)[32], u64 values) {
    hold(sums);
    begin();
#pragma unroll
    for (int k = 0; k < TOKENS / 16; k++) multiply_held(sums, weights + 4 * k, values + k * 16 * 128 / 16);
    commit();
}

// === bringing keys and values ===

// Where the rows of a tile are that thread `first` + n · EVERY of a row's chunk is to copy.
// Rows of a sequence's pages. A tile's rows are told apart when this is compiled wherever pages and passes of EVERY rows fit each
// other: then which pages they are in is the same for all threads.
#define FITS(EVERY) (P % (EVERY) == 0 && (TOKENS % P == 0 || P % TOKENS == 0))

struct Run {
    const kv_t *sides[2];
    i64 page_len;
    const int *blocks;
    int end;
    // Row `first` + `n` · EVERY of the tile at `token`, `first` below EVERY; any row of a page where the sequence has none.
    template <int EVERY> __device__ __forceinline__ const kv_t *at(int side, int token, int first, int n) const {
        const kv_t *pages = side ? sides[1] : sides[0];
        int last = end - 1, row = token + first + n * EVERY;
        if (!FITS(EVERY)) {
            row = min(row, last);
            return pages + blocks[row / P] * page_len + row % P * D;
        }
        int block = blocks[min(token / P + n * EVERY / P, last / P)];
        int slot = P > TOKENS ? token % P + n * EVERY : n * EVERY % P;
        return pages + block * page_len + (slot + first) * D;
    }
    template <int EVERY> __device__ __forceinline__ bool has(int token, int first, int n) const { return token + first + n * EVERY < end; }
};

#if KV == 3
#define PASS 16
// Which 16 elements of which of PASS rows are a thread's: eight threads that write together have half of two rows, of which one
// takes even places and one odd ones, so all banks.
__device__ __forceinline__ int own_row(int thread) { return thread / 16 * 2 + thread / 4 % 2; }
__device__ __forceinline__ int own_chunk(int thread) { return thread / 8 % 2 * 4 + thread % 4; }

// 16 elements of each of eight rows, on their way.
struct Held {
    uint4 rows[TOKENS / PASS];
};
__device__ __forceinline__ void load(Held &held, const Run &run, int side, int token, int thread) {
    int first = own_row(thread), chunk = own_chunk(thread);
#pragma unroll
    for (int n = 0; n < TOKENS / PASS; n++) {
        const kv_t *from = run.at<PASS>(side, token, first, n) + chunk * 16;
        held.rows[n] = run.has<PASS>(token, first, n) ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
    }
}
// Four elements as two pairs of f16, exactly.
__device__ __forceinline__ void widen(u32 four, u32 &first, u32 &second) {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(first), "=r"(second) : "r"(four));
}
__device__ __forceinline__ void store(const Held &held, u32 to, int thread) {
    int first = own_row(thread), chunk = own_chunk(thread);
    to += chunk / 4 * HALF + first * 128;
    u32 part = (u32)(chunk % 4 * 2) ^ (u32)(first % 8);
    u32 one = to + part * 16, other = to + (part ^ 1) * 16;
#pragma unroll
    for (int n = 0; n < TOKENS / PASS; n++) {
        uint4 low, high;
        widen(held.rows[n].x, low.x, low.y);
        widen(held.rows[n].y, low.z, low.w);
        widen(held.rows[n].z, high.x, high.y);
        widen(held.rows[n].w, high.z, high.w);
        store_shared(one + n * PASS * 128, low);
        store_shared(other + n * PASS * 128, high);
    }
}
#else
#define PASS 8
// 16 bytes to shared memory, asynchronously; zeros where there is nothing.
__device__ __forceinline__ void copy(const Run &run, int side, u32 to, int token, int thread) {
    int first = thread / 16, chunk = thread % 16;
    to += chunk / 8 * HALF + first * 128 + ((chunk % 8) ^ first) * 16;
    // All places first: which blocks there are is read from memory.
    const kv_t *from[TOKENS / PASS];
#pragma unroll
    for (int n = 0; n < TOKENS / PASS; n++) from[n] = run.at<PASS>(side, token, first, n) + chunk * 8;
#pragma unroll
    for (int n = 0; n < TOKENS / PASS; n++) {
        int bytes = run.has<PASS>(token, first, n) ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + n * PASS * 128), "l"(from[n]), "r"(bytes) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void copied() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#endif

// What is brought i-th: K0, K1, V0, K2, V1, ..., and the last values. Keys are used one tile ahead.
struct Item {
    int side, tile;
    __device__ __forceinline__ Item(int i, int tiles) {
        bool last = i == 2 * tiles - 1;
        side = last || (i > 0 && i % 2 == 0);
        tile = last ? tiles - 1 : side ? i / 2 - 1 : (i + 1) / 2;
    }
};

// Brings all tiles, beginning with that at `token`, each where the one before the last has been used up.
__device__ __forceinline__ void bring(const Run &run, u32 shared_kv, Barriers barriers, int token, int tiles) {
    int thread = threadIdx.x % GROUP_THREADS;
#if KV == 3
    Held next;
    load(next, run, 0, token, thread);
#else
    u32 before = 0;
#endif
#pragma unroll 1
    for (int i = 0; i < 2 * tiles; i++) {
        Item item(i, tiles);
        Place place(item.tile);
        u32 to = shared_kv + (item.side * STAGES + place.stage) * SIDE;
        u32 full = barriers.full(item.side, place);
#if KV == 3
        Held held = next;
        if (i + 1 < 2 * tiles) {
            Item later(i + 1, tiles);
            load(next, run, later.side, token - later.tile * TOKENS, thread);
        }
        wait(barriers.empty(item.side, place), place.parity ^ 1);
        store(held, to, thread);
        publish();
        arrive(full);
#else
        wait(barriers.empty(item.side, place), place.parity ^ 1);
        copy(run, item.side, to, token - item.tile * TOKENS, thread);
        // The one before has arrived when at most this one is left on its way.
        if (i > 0) {
            copied<1>();
            publish();
            arrive(before);
        }
        before = full;
#endif
    }
#if KV != 3
    copied<0>();
    publish();
    arrive(before);
#endif
}

// === computing ===

// What a thread holds of its two rows, eight apart: the greatest score, its own part of the weights' sum.
struct Rows {
    float largest[2], total[2];
};

// Scores become weights relative to the row's greatest score so far; `keep` is what to multiply with what was summed before.
__device__ __forceinline__ void soften(float (&scores)[64], Rows &rows, float (&keep)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float now = rows.largest[half];
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++) now = fmaxf(now, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
        now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
        now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
        // A row that has seen nothing yet keeps zeros instead of becoming NaN.
        float base = now == LOG_ZERO ? 0.0f : now * scale;
        keep[half] = exp2_fast(rows.largest[half] * scale - base);
        rows.largest[half] = now;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float weight = exp2_fast(scores[4 * n + 2 * half + i] * scale - base);
                scores[4 * n + 2 * half + i] = weight;
                sum += weight;
            }
        }
        rows.total[half] = rows.total[half] * keep[half] + sum;
    }
}

// What the rows at `own` and `own` + 8 do not see of the tile at `token`.
__device__ __forceinline__ void mask(float (&scores)[64], int token, int own, int window) {
#pragma unroll
    for (int i = 0; i < 64; i++) {
        int at = token + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, row = own + i % 4 / 2 * 8;
        if (at > row || at + window <= row) scores[i] = LOG_ZERO;
    }
}

__device__ __forceinline__ void pack(u32 (&weights)[32], const float (&scores)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) weights[i] = pack_kv(scores[2 * i], scores[2 * i + 1]);
}

// The two computing warpgroups begin in turn: barriers 2 and 3 of the block are their turns, 4 and 5 theirs alone.
__device__ __forceinline__ void await_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(2 + group) : "memory"); }
__device__ __forceinline__ void pass_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(2 + (group ^ 1)) : "memory"); }
__device__ __forceinline__ void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(4 + group) : "memory"); }

__device__ __forceinline__ void load_q(const Attention &a, u32 to, i64 row, int rows, int head) {
    int thread = threadIdx.x % GROUP_THREADS, first = thread / 16, chunk = thread % 16;
    to += chunk / 8 * HALF_Q + first * 128 + ((chunk % 8) ^ first) * 16;
#pragma unroll
    for (int n = 0; n < GROUP_ROWS / 8; n++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (first + n * 8 < rows) v = *(const uint4 *)(a.q + (row + first + n * 8) * a.ld_q + head * D + chunk * 8);
        v.x = act_pair_to_kv(v.x), v.y = act_pair_to_kv(v.y), v.z = act_pair_to_kv(v.z), v.w = act_pair_to_kv(v.w);
        store_shared(to + n * 8 * 128, v);
    }
    publish();
}

// Output of a warpgroup: `rows` of its 64 are there, the first at `row` of the step, `position` of its sequence.
__device__ __forceinline__ void compute(const Attention &a, int group, u32 shared_q, u32 shared_kv, Barriers barriers, int token, int tiles, i64 row, int rows, int position, int head) {
    load_q(a, shared_q, row, rows, head);
    sync_group(group);
    u64 q = describe(shared_q, HALF_Q), kv = describe(shared_kv, HALF);
    int lane = threadIdx.x % WARP, warp = threadIdx.x % GROUP_THREADS / WARP;
    int own = position + warp * 16 + lane / 4;
    float scores[64], sums[64], keep[2];
    u32 weights[32];
    Rows held = {{LOG_ZERO, LOG_ZERO}, {0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] = 0.0f;
    auto see = [&](int n) {
        int at = token - n * TOKENS;
        bool all_seen = at + TOKENS <= position + 1 && at + a.window > position + GROUP_ROWS - 1;
        if (!all_seen) mask(scores, at, own, a.window);
        soften(scores, held, keep, a.scale);
    };
    wait(barriers.full(0, Place(0)), 0);
    begin_scores(scores, q, kv);
    complete<0>();
    hold(scores);
    arrive(barriers.empty(0, Place(0)));
    if (TURNS && group == 1 && tiles > 1) pass_turn(group);
    see(0);
    pack(weights, scores);
    if (tiles > 1) wait(barriers.full(0, Place(1)), Place(1).parity);
#pragma unroll 1
    for (int n = 1; n < tiles; n++) {
        Place now(n), before(n - 1), next(n + 1);
        if (TURNS) await_turn(group);
        begin_scores(scores, q, kv + now.stage * (SIDE / 16));
        wait(barriers.full(1, before), before.parity);
        begin_sums(sums, weights, kv + (STAGES + before.stage) * (SIDE / 16));
        if (TURNS && (group == 0 || n + 1 < tiles)) pass_turn(group);
        complete<1>();
        hold(scores);
        arrive(barriers.empty(0, now));
        see(n);
        // What was just computed overlaps with the sums as long as the compiler waits for these afterwards: it moves neither across
        // a loop.
        hold(scores);
        if (n + 1 < tiles) wait(barriers.full(0, next), next.parity);
        complete<0>();
        hold(sums);
        arrive(barriers.empty(1, before));
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] *= keep[i % 4 / 2];
        pack(weights, scores);
    }
    Place last(tiles - 1);
    wait(barriers.full(1, last), last.parity);
    begin_sums(sums, weights, kv + (STAGES + last.stage) * (SIDE / 16));
    complete<0>();
    hold(sums);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = held.total[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        float scale = 1.0f / sum;
        int at = warp * 16 + half * 8 + lane / 4;
        if (at >= rows) continue;
        u16 *out = a.out + (row + at) * a.ld_out + head * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(u32 *)(out + n * 8) = pack_act(sums[4 * n + 2 * half] * scale, sums[4 * n + 2 * half + 1] * scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(3 * GROUP_THREADS, 1) attention_prefill_hopper(Attention a, const int *tiles) {
    extern __shared__ u8 dynamic[];
    __shared__ __align__(16) u64 places[2 * STAGES * 2];
    u32 shared_q = (shared_address(dynamic) + 1023) & ~1023u, shared_kv = shared_q + 2 * 2 * HALF_Q;
    Barriers barriers = {shared_address(places)};
    // Some heads' heaviest tiles begin before their lighter ones, so that no heavy one is left for the end, and not all heads' at
    // once, whose KV would not fit the cache.
    int span = a.kv_heads * a.group / gridDim.y, tile = blockIdx.x / span;
    int sequence = tiles[2 * tile], first = tiles[2 * tile + 1], head = blockIdx.y * span + blockIdx.x % span;
    int rows = min(ROWS, a.row_counts[sequence] - first);
    int position = a.past_lens[sequence] + first, end = position + rows;
    int start = max(0, position + 1 - a.window) / TOKENS, count = (end + TOKENS - 1) / TOKENS - start;
    int token = (start + count - 1) * TOKENS;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 2 * STAGES; i++) {
            barrier_init(barriers.at + i * 16, GROUP_THREADS / WARP);
            barrier_init(barriers.at + i * 16 + 8, 2 * GROUP_THREADS / WARP);
        }
    }
    __syncthreads();
    int group = __shfl_sync(0xffffffffu, threadIdx.x / GROUP_THREADS, 0);
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " BRINGING ";");
        const int *blocks = a.blocks + a.block_starts[sequence];
        Run run = {{a.pages + plane(a, 0, head / a.group), a.pages + plane(a, 1, head / a.group)}, a.page_len, blocks, end};
        bring(run, shared_kv, barriers, token, count);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " COMPUTING ";");
        group -= 1;
        i64 row = (i64)a.first_rows[sequence] + first + group * GROUP_ROWS;
        compute(a, group, shared_q + group * 2 * HALF_Q, shared_kv, barriers, token, count, row, rows - group * GROUP_ROWS, position + group * GROUP_ROWS, head);
    }
}
