// Causal attention over paged KV, for any head size and any type of KV: the plain version.
//
// out[t, h] = softmax(scale · q[t, h] · keys) · values over the positions that t sees. q, out [T, H · D] act. One warp a
// (row, head); lanes over D; one pass with a running maximum. It reads all KV once a head: meant for head sizes and types
// that attention_prefill.cu and attention_decode.cu do not take. Bound: none claimed.

#define PER_LANE ((D + WARP - 1) / WARP)

extern "C" __global__ void attention_any(Attention a, int heads, int sequence_count) {
    int sequence = blockIdx.y, lane = threadIdx.x % WARP;
    i64 index = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (sequence >= sequence_count || index >= (i64)a.row_counts[sequence] * heads) return;
    int row = (int)(index / heads), head = (int)(index % heads);
    int position = a.past_lens[sequence] + row;
    int first = position + 1 > a.window ? position + 1 - a.window : 0;
    const int *blocks = a.blocks + a.block_starts[sequence];
    i64 keys = plane(a, 0, head / a.group), values = plane(a, 1, head / a.group);
    i64 at = a.first_rows[sequence] + row;
    float q[PER_LANE], sum[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = i * WARP + lane;
        q[i] = d < D ? act_to_float(a.q[at * a.ld_q + head * D + d]) * a.scale : 0.0f;
        sum[i] = 0.0f;
    }
    float largest = -INFINITY_F, total = 0.0f;
    for (int token = first; token <= position; token++) {
        const kv_t *page = a.pages + blocks[token / P] * a.page_len + token % P * D;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int d = i * WARP + lane;
            if (d < D) score += q[i] * kv_to_float(page[keys + d]);
        }
        score = warp_sum(score);
        float now = fmaxf(largest, score);
        float keep = exp2f(largest - now), weight = exp2f(score - now);
        // A NaN among the scores must show: fmaxf drops it.
        if (score != score) now = keep = weight = score;
        largest = now;
        total = total * keep + weight;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int d = i * WARP + lane;
            if (d < D) sum[i] = sum[i] * keep + weight * kv_to_float(page[values + d]);
        }
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int d = i * WARP + lane;
        if (d < D) a.out[at * a.ld_out + head * D + d] = float_to_act(sum[i] / total);
    }
}
