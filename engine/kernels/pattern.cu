// Fills a weight with a repeated pattern: out[r, c] = pattern[(first + r * stride + c) mod period].
//
// pattern [period] act or e4m3, out [rows, cols] of the same type, dense. A thread an element, a grid-stride loop. For dummy
// weights, which so never cross the bus. Bound: 2 bytes an element, or 1.

template <typename T> __device__ __forceinline__ void fill(const T *pattern, int period, T *out, i64 first, i64 stride, int cols, i64 count) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        out[i] = pattern[(first + i / cols * stride + i % cols) % period];
    }
}

extern "C" __global__ void pattern_act(const u16 *pattern, int period, u16 *out, i64 first, i64 stride, int cols, i64 count) {
    fill(pattern, period, out, first, stride, cols, count);
}

extern "C" __global__ void pattern_e4m3(const u8 *pattern, int period, u8 *out, i64 first, i64 stride, int cols, i64 count) {
    fill(pattern, period, out, first, stride, cols, count);
}
