// Tables of what sequences hold, made anew: of each token of the vocabulary how often an answer has it, and whether the prompt has
// it, a bias is for it, or it ends an answer. `choose.cu` reads and counts.
//
// Words at `words`: a Job for each block, then their lists of tokens; biases are pairs of token and f32. A table is u32 [V], then
// the number of biases, then these. Tokens outside the vocabulary are passed over. One block a table. Bound: 4 V bytes a table.

#define PROMPT 0x80000000u
#define BANNABLE 0x40000000u
#define BIASED 0x20000000u

struct Job {
    u32 *table;
    // Where the lists are, in words from the start; they follow each other in the order of their lengths here.
    u32 vocab, first, prompt, answer, bannable, biases;
};

extern "C" __global__ void seen_u32(const u32 *words) {
    Job job = ((const Job *)words)[blockIdx.x];
    const u32 *list = words + job.first;
    for (u32 i = threadIdx.x; i < job.vocab; i += blockDim.x) job.table[i] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < job.prompt; i += blockDim.x)
        if (list[i] < job.vocab) atomicOr(&job.table[list[i]], PROMPT);
    list += job.prompt;
    for (u32 i = threadIdx.x; i < job.answer; i += blockDim.x)
        if (list[i] < job.vocab) atomicAdd(&job.table[list[i]], 1u);
    list += job.answer;
    for (u32 i = threadIdx.x; i < job.bannable; i += blockDim.x)
        if (list[i] < job.vocab) atomicOr(&job.table[list[i]], BANNABLE);
    list += job.bannable;
    u32 *biases = job.table + job.vocab;
    if (threadIdx.x == 0) biases[0] = job.biases;
    for (u32 i = threadIdx.x; i < job.biases; i += blockDim.x) {
        biases[1 + 2 * i] = list[2 * i];
        biases[2 + 2 * i] = list[2 * i + 1];
        if (list[2 * i] < job.vocab) atomicOr(&job.table[list[2 * i]], BIASED);
    }
}
