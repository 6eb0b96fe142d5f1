// out = x / sqrt(mean(x²) + epsilon) · weight per row; and with x += y before; and with out in e4m3 and a scale a row.
//
// x, y, out [T, E] act with rows of ld elements, weight [E] act; 16-byte aligned where E and every ld are multiples of 8. In
// e4m3, out is dense, scales [T] f32, E and every ld are multiples of 16 and E is at most VECTORS_MAX · 8 · 1,024; what is
// rounded are the values in act.
// One block a row, so that a decode step of few rows is one wave; each thread keeps its part of the row in registers
// between the two passes. Sums in f32; x + y is rounded to act before it is squared, as the next layer reads it.
// Bound: 4 E bytes a row, 8 E with the sum; E less in e4m3.

#define VECTORS_MAX 4

__device__ __forceinline__ float squares(uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = act_low(words[i]), high = act_high(words[i]);
        sum += low * low + high * high;
    }
    return sum;
}

__device__ __forceinline__ u32 add_pair(u32 a, u32 b) {
    return pack_act(act_low(a) + act_low(b), act_high(a) + act_high(b));
}

__device__ __forceinline__ u32 scale_pair(u32 x, u32 weight, float scale) {
    return pack_act(act_low(x) * scale * act_low(weight), act_high(x) * scale * act_high(weight));
}

__device__ __forceinline__ uint4 add8(uint4 a, uint4 b) {
    return make_uint4(add_pair(a.x, b.x), add_pair(a.y, b.y), add_pair(a.z, b.z), add_pair(a.w, b.w));
}

__device__ __forceinline__ uint4 scale8(uint4 x, uint4 weight, float scale) {
    return make_uint4(scale_pair(x.x, weight.x, scale), scale_pair(x.y, weight.y, scale), scale_pair(x.z, weight.z, scale), scale_pair(x.w, weight.w, scale));
}

// This thread's part of a row, to which y is added where it is not null, and its squares' sum.
__device__ __forceinline__ float hold_row(uint4 (&held)[VECTORS_MAX], u16 *x, const u16 *y, int cols) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS_MAX; k++) {
        int i = k * blockDim.x + threadIdx.x;
        if (i < cols / 8) {
            held[k] = ((const uint4 *)x)[i];
            if (y) {
                held[k] = add8(held[k], ((const uint4 *)y)[i]);
                ((uint4 *)x)[i] = held[k];
            }
            sum += squares(held[k]);
        }
    }
    return sum;
}

// The result in e4m3.
__device__ __forceinline__ void norm_row_narrow(u16 *x, const u16 *y, const u16 *weight, u8 *out, float *to_scale, int cols, float epsilon) {
    __shared__ float shared[WARP], shared_most[WARP];
    uint4 held[VECTORS_MAX];
    float sum = hold_row(held, x, y, cols);
    float scale = rsqrtf(block_sum(sum, shared) / cols + epsilon), most = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS_MAX; k++) {
        int i = k * blockDim.x + threadIdx.x;
        if (i < cols / 8) {
            held[k] = scale8(held[k], ((const uint4 *)weight)[i], scale);
            most = fmaxf(most, greatest(held[k]));
        }
    }
    float unit = scale_of(block_greatest(most, shared_most)), inverse = 1.0f / unit;
    if (threadIdx.x == 0) *to_scale = unit;
#pragma unroll
    for (int k = 0; k < VECTORS_MAX; k++) {
        int i = k * blockDim.x + threadIdx.x;
        if (i < cols / 8) ((uint2 *)out)[i] = round8(held[k], inverse);
    }
}

// y may be null. x is written only where it is not.
__device__ __forceinline__ void norm_row(u16 *x, const u16 *y, const u16 *weight, u16 *out, int cols, float epsilon, bool aligned) {
    __shared__ float shared[WARP];
    if (aligned && cols <= VECTORS_MAX * 8 * (int)blockDim.x) {
        uint4 held[VECTORS_MAX];
        float sum = hold_row(held, x, y, cols);
        float scale = rsqrtf(block_sum(sum, shared) / cols + epsilon);
#pragma unroll
        for (int k = 0; k < VECTORS_MAX; k++) {
            int i = k * blockDim.x + threadIdx.x;
            if (i < cols / 8) ((uint4 *)out)[i] = scale8(held[k], ((const uint4 *)weight)[i], scale);
        }
        return;
    }
    float sum = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float value = act_to_float(x[i]);
        if (y) {
            u16 bits = float_to_act(value + act_to_float(y[i]));
            x[i] = bits;
            value = act_to_float(bits);
        }
        sum += value * value;
    }
    float scale = rsqrtf(block_sum(sum, shared) / cols + epsilon);
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        out[i] = float_to_act(act_to_float(x[i]) * scale * act_to_float(weight[i]));
    }
}

extern "C" __global__ void rms_norm(const u16 *x, int ld_x, const u16 *weight, u16 *out, int ld_out, int cols, float epsilon) {
    bool aligned = cols % 8 == 0 && ld_x % 8 == 0 && ld_out % 8 == 0;
    norm_row((u16 *)x + (i64)blockIdx.x * ld_x, 0, weight, out + (i64)blockIdx.x * ld_out, cols, epsilon, aligned);
}

extern "C" __global__ void add_rms_norm(u16 *x, int ld_x, const u16 *y, int ld_y, const u16 *weight, u16 *out, int ld_out, int cols, float epsilon) {
    bool aligned = cols % 8 == 0 && ld_x % 8 == 0 && ld_y % 8 == 0 && ld_out % 8 == 0;
    norm_row(x + (i64)blockIdx.x * ld_x, y + (i64)blockIdx.x * ld_y, weight, out + (i64)blockIdx.x * ld_out, cols, epsilon, aligned);
}

// y may be null, and ld_y is not used then.
extern "C" __global__ void norm_e4m3(u16 *x, int ld_x, const u16 *y, int ld_y, const u16 *weight, u8 *out, float *scales, int cols, float epsilon) {
    const u16 *more = y ? y + (i64)blockIdx.x * ld_y : 0;
    norm_row_narrow(x + (i64)blockIdx.x * ld_x, more, weight, out + (i64)blockIdx.x * cols, scales + blockIdx.x, cols, epsilon);
}

// In place on each head: x [T, heads · D], weight [D]. A warp a head, any D.
extern "C" __global__ void head_norm(u16 *x, int ld, const u16 *weight, int heads, int dim, int rows, float epsilon) {
    i64 index = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    int lane = threadIdx.x % WARP;
    if (index >= (i64)rows * heads) return;
    u16 *head = x + index / heads * ld + index % heads * dim;
    float sum = 0.0f;
    for (int i = lane; i < dim; i += WARP) {
        float value = act_to_float(head[i]);
        sum += value * value;
    }
    float scale = rsqrtf(warp_sum(sum) / dim + epsilon);
    for (int i = lane; i < dim; i += WARP) {
        head[i] = float_to_act(act_to_float(head[i]) * scale * act_to_float(weight[i]));
    }
}
