// tokens[t] = chosen[carried[t]] where carried[t] is not negative: the tokens that the step before chose, for this one.
//
// carried [T] i32, chosen [R] u32, tokens [T] u32. One thread a row. A row whose logits were not finite has no token; it
// goes on with token 0, and the host drops what comes of it. Bound: none, a few bytes a row.

#define NOT_FINITE 0xffffffffu

extern "C" __global__ void carry_u32(const int *carried, const u32 *chosen, u32 *tokens, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int from = carried[i];
    if (from < 0) return;
    u32 token = chosen[from];
    tokens[i] = token == NOT_FINITE ? 0 : token;
}
