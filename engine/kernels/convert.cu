// Activations to and from f32, for the host: out[i] = x[i], and back, rounding to nearest even.
//
// x [T, E] act with rows of ld elements, values [T, E] f32, dense. A thread an element, a grid-stride loop.
// Bound: 6 bytes an element.

extern "C" __global__ void act_to_f32(const u16 *x, int ld, float *values, int cols, i64 count) {
    i64 stride = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        values[i] = act_to_float(x[i / cols * ld + i % cols]);
    }
}

extern "C" __global__ void f32_to_act(const float *values, u16 *x, int ld, int cols, i64 count) {
    i64 stride = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        x[i / cols * ld + i % cols] = float_to_act(values[i]);
    }
}
