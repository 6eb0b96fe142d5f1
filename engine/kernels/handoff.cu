// Hand-off of pages: copies stretches of memory that may be another GPU's, and sums stretches.
//
// copy_stretches: for each stretch, target[v] = source[v]; fold_stretches: for each stretch, sums[piece] += the terms of its
// vectors, as page/fold.rs defines them: (a + (i + 1) A) (b + (i + 1) B), low half xor high half, with i counted over the piece;
// copy_fold_stretches: both, so that what was copied is summed while it is in registers, and read once.
//
// stretches [count], each of up to 64 KiB in vectors of 16 bytes, source and target 16-byte aligned; sums [pieces] u64, zeroed.
// Parallel over stretches, one a block at a time, and over vectors, one a thread. Eight vectors of a thread are loaded before
// the first is used, because memory behind NVLink answers after a microsecond or two: 512 threads so have 64 KiB in flight, and
// a quarter of a GPU's multiprocessors fill the link; the others are free for the model.
// Copying with sums has no barrier: each warp adds its own part up and goes on to the next stretch, so that loads never wait for a sum.
// Sums alone are made where the memory is, and there one addition a stretch instead of one a warp is 2 to 4 % faster.
// Bound: copies, the link's bytes (396 GB/s copied between two H200); fold, 1 byte read a byte.

struct Stretch {
    u64 source, target;
    u64 first; // Index of its first vector within the piece.
    u32 vectors;
    u32 piece;
};

#define THREADS 512
#define AHEAD 8

struct alignas(16) Vector {
    u64 a, b;
};

__device__ __forceinline__ Vector load(const Vector *at) {
    Vector vector;
    asm volatile("ld.global.cs.v2.u64 {%0, %1}, [%2];" : "=l"(vector.a), "=l"(vector.b) : "l"(at));
    return vector;
}

__device__ __forceinline__ void store(Vector *at, Vector vector) {
    asm volatile("st.global.cs.v2.u64 [%0], {%1, %2};" ::"l"(at), "l"(vector.a), "l"(vector.b) : "memory");
}

#define STEP_A 0x9E3779B97F4A7C15ull
#define STEP_B 0xC2B2AE3D27D4EB4Full

__device__ __forceinline__ u64 term(u64 number, Vector vector) {
    u64 x = vector.a + number * STEP_A;
    u64 y = vector.b + number * STEP_B;
    return (x * y) ^ __umul64hi(x, y);
}

__device__ __forceinline__ u64 sum_of_warp(u64 sum) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}

// Adds what the threads of a warp have found.
__device__ __forceinline__ void add_of_warp(u64 sum, u64 *target) {
    sum = sum_of_warp(sum);
    if (threadIdx.x % WARP == 0 && sum != 0) atomicAdd(target, sum);
}

// Adds what the threads of a block have found, at once.
__device__ __forceinline__ void add_of_block(u64 sum, u64 *target) {
    __shared__ u64 parts[THREADS / WARP];
    sum = sum_of_warp(sum);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 whole = 0;
        for (int w = 0; w < THREADS / WARP; w++) whole += parts[w];
        atomicAdd(target, whole);
    }
    __syncthreads();
}

template <bool COPY, bool FOLD>
__device__ __forceinline__ void go_over(const Stretch *stretches, int count, u64 *sums) {
    for (int s = blockIdx.x; s < count; s += gridDim.x) {
        Stretch stretch = stretches[s];
        const Vector *source = (const Vector *)stretch.source;
        Vector *target = (Vector *)stretch.target;
        u64 sum = 0;
        for (u32 start = threadIdx.x; start < stretch.vectors; start += AHEAD * THREADS) {
            Vector held[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                u32 v = start + k * THREADS;
                if (v < stretch.vectors) held[k] = load(source + v);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                u32 v = start + k * THREADS;
                if (v < stretch.vectors) {
                    if (COPY) store(target + v, held[k]);
                    if (FOLD) sum += term(stretch.first + v + 1, held[k]);
                }
            }
        }
        if (FOLD && COPY) add_of_warp(sum, sums + stretch.piece);
        if (FOLD && !COPY) add_of_block(sum, sums + stretch.piece);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_stretches(const Stretch *stretches, int count) {
    go_over<true, false>(stretches, count, nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS) fold_stretches(const Stretch *stretches, int count, u64 *sums) {
    go_over<false, true>(stretches, count, sums);
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_fold_stretches(const Stretch *stretches, int count, u64 *sums) {
    go_over<true, true>(stretches, count, sums);
}
