// x = the sum of all ranks' x, in the order of the ranks, for messages so short that their way is what takes time.
//
// x [count] act, 8-byte aligned, count a multiple of 4; boxes [ranks]: each rank's box in memory of its GPU, that every rank may
// write; epochs [gridDim.x] u32, of this rank; stop: nonzero ends the waiting. One packet a thread: four elements as two words,
// each beside the epoch, so that a packet tells by itself that it has come and no other signal is needed (16 bytes are stored
// and loaded at once, 8 of them never torn). A box has a packet for each epoch's parity, sending rank and thread, `packets` of them.
//
// A packet is written over two epochs later. By then its reader has read it: who is in epoch e has got all packets of e - 1, which
// their senders sent after their own e - 2 had ended. Every thread of a block sends in every epoch of its block, also beyond the
// message's end, so what lies in a box is never older than two epochs.
// Bound: 4 bytes an element each way over NVLink, and one way's latency.

#define THREADS 512
// Looks at `stop` that rarely: it lies in host memory.
#define PATIENCE 4096

__device__ __forceinline__ void store_packet(uint4 *to, u32 low, u32 high, u32 epoch) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(low), "r"(epoch), "r"(high), "r"(epoch)
                 : "memory");
}

__device__ __forceinline__ uint4 load_packet(const uint4 *from) {
    uint4 value;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from)
                 : "memory");
    return value;
}

// Waits for a packet of this epoch; what it gives after a stop means nothing.
__device__ __forceinline__ uint2 await_packet(const uint4 *from, u32 epoch, const volatile u32 *stop) {
    for (u32 tries = 1;; tries++) {
        uint4 packet = load_packet(from);
        if (packet.y == epoch && packet.w == epoch) return make_uint2(packet.x, packet.z);
        if (tries % PATIENCE == 0 && *stop != 0) return make_uint2(0, 0);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sum_over_ranks(u16 *x, const u64 *boxes, u32 *epochs, const u32 *stop, int rank, int ranks, int packets, int count) {
    int index = blockIdx.x * THREADS + threadIdx.x;
    u32 epoch = epochs[blockIdx.x] + 1;
    bool used = index < count / 4;
    uint2 own = used ? ((const uint2 *)x)[index] : make_uint2(0, 0);
    i64 half = (i64)(epoch & 1) * ranks * packets;
    for (int step = 1; step < ranks; step++) {
        // Each begins with another one.
        int to = (rank + step) % ranks;
        store_packet((uint4 *)boxes[to] + half + (i64)rank * packets + index, own.x, own.y, epoch);
    }
    const uint4 *box = (const uint4 *)boxes[rank] + half + index;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int from = 0; from < ranks; from++) {
        uint2 part = from == rank ? own : await_packet(box + (i64)from * packets, epoch, stop);
        sums[0] += act_low(part.x);
        sums[1] += act_high(part.x);
        sums[2] += act_low(part.y);
        sums[3] += act_high(part.y);
    }
    if (used) ((uint2 *)x)[index] = make_uint2(pack_act(sums[0], sums[1]), pack_act(sums[2], sums[3]));
    __syncthreads();
    if (threadIdx.x == 0) epochs[blockIdx.x] = epoch;
}
