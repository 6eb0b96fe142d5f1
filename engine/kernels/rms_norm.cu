// out = x / sqrt(mean(x²) + epsilon) · weight per row; and with x += y before.
//
// x, y, out [T, E] bf16 with rows of ld elements, weight [E] bf16; 16-byte aligned where E and every ld are multiples of 8.
// One block a row, so that a decode step of few rows is one wave; each thread keeps its part of the row in registers
// between the two passes. Sums in f32; x + y is rounded to bf16 before it is squared, as the next layer reads it.
// Bound: 4 E bytes a row, 8 E with the sum.

#define VECTORS_MAX 4

__device__ __forceinline__ float squares(uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = bf16_low(words[i]), high = bf16_high(words[i]);
        sum += low * low + high * high;
    }
    return sum;
}

__device__ __forceinline__ u32 add_pair(u32 a, u32 b) {
    return pack_bf16(bf16_low(a) + bf16_low(b), bf16_high(a) + bf16_high(b));
}

__device__ __forceinline__ u32 scale_pair(u32 x, u32 weight, float scale) {
    return pack_bf16(bf16_low(x) * scale * bf16_low(weight), bf16_high(x) * scale * bf16_high(weight));
}

// y may be null. x is written only where it is not.
__device__ __forceinline__ void norm_row(u16 *x, const u16 *y, const u16 *weight, u16 *out, int cols, float epsilon, bool aligned) {
    __shared__ float shared[WARP];
    if (aligned && cols <= VECTORS_MAX * 8 * (int)blockDim.x) {
        uint4 held[VECTORS_MAX];
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < VECTORS_MAX; k++) {
            int i = k * blockDim.x + threadIdx.x;
            if (i < cols / 8) {
                held[k] = ((const uint4 *)x)[i];
                if (y) {
                    uint4 more = ((const uint4 *)y)[i];
                    held[k].x = add_pair(held[k].x, more.x);
                    held[k].y = add_pair(held[k].y, more.y);
                    held[k].z = add_pair(held[k].z, more.z);
                    held[k].w = add_pair(held[k].w, more.w);
                    ((uint4 *)x)[i] = held[k];
                }
                sum += squares(held[k]);
            }
        }
        float scale = rsqrtf(block_sum(sum, shared) / cols + epsilon);
#pragma unroll
        for (int k = 0; k < VECTORS_MAX; k++) {
            int i = k * blockDim.x + threadIdx.x;
            if (i < cols / 8) {
                uint4 w = ((const uint4 *)weight)[i];
                uint4 to;
                to.x = scale_pair(held[k].x, w.x, scale);
                to.y = scale_pair(held[k].y, w.y, scale);
                to.z = scale_pair(held[k].z, w.z, scale);
                to.w = scale_pair(held[k].w, w.w, scale);
                ((uint4 *)out)[i] = to;
            }
        }
        return;
    }
    float sum = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        float value = bf16_to_float(x[i]);
        if (y) {
            u16 bits = float_to_bf16(value + bf16_to_float(y[i]));
            x[i] = bits;
            value = bf16_to_float(bits);
        }
        sum += value * value;
    }
    float scale = rsqrtf(block_sum(sum, shared) / cols + epsilon);
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        out[i] = float_to_bf16(bf16_to_float(x[i]) * scale * bf16_to_float(weight[i]));
    }
}

extern "C" __global__ void rms_norm_bf16(const u16 *x, int ld_x, const u16 *weight, u16 *out, int ld_out, int cols, float epsilon) {
    bool aligned = cols % 8 == 0 && ld_x % 8 == 0 && ld_out % 8 == 0;
    norm_row((u16 *)x + (i64)blockIdx.x * ld_x, 0, weight, out + (i64)blockIdx.x * ld_out, cols, epsilon, aligned);
}

extern "C" __global__ void add_rms_norm_bf16(u16 *x, int ld_x, const u16 *y, int ld_y, const u16 *weight, u16 *out, int ld_out, int cols, float epsilon) {
    bool aligned = cols % 8 == 0 && ld_x % 8 == 0 && ld_y % 8 == 0 && ld_out % 8 == 0;
    norm_row(x + (i64)blockIdx.x * ld_x, y + (i64)blockIdx.x * ld_y, weight, out + (i64)blockIdx.x * ld_out, cols, epsilon, aligned);
}

// In place on each head: x [T, heads · D], weight [D]. A warp a head, any D.
extern "C" __global__ void head_norm_bf16(u16 *x, int ld, const u16 *weight, int heads, int dim, int rows, float epsilon) {
    i64 index = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    int lane = threadIdx.x % WARP;
    if (index >= (i64)rows * heads) return;
    u16 *head = x + index / heads * ld + index % heads * dim;
    float sum = 0.0f;
    for (int i = lane; i < dim; i += WARP) {
        float value = bf16_to_float(head[i]);
        sum += value * value;
    }
    float scale = rsqrtf(warp_sum(sum) / dim + epsilon);
    for (int i = lane; i < dim; i += WARP) {
        head[i] = float_to_bf16(bf16_to_float(head[i]) * scale * bf16_to_float(weight[i]));
    }
}
