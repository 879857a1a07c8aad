// embed:     y[r,:] = table[token(r) - first_token,:], zeros where that is another rank's
// expand:    h[r,m,:] = x[r,:], or what settle would make of parts
// settle:    y = parts[0] + parts[1] + ..., in this order, rounded
// draft_add: y[r,m,:] = h[r,m,:] + e[r,:], rounded
//
// table [vocab,D] bf16    x, e [rows,D] act    h, y [rows,M,D] act (embed: [rows,D] f32)    parts [n][count] f32
// grid  a block of THREADS per row; settle: eight values per thread
// cost  memory-bound
// twin  reference/forward.rs: embed, expand, all_reduce, draft_input
#include "base.cuh"
#include "ptx.cuh"

KERNEL(embed, EmbedArgs, THREADS) {
    u32 row = blockIdx.x;
    wait_for_previous();
    // Tokens below the first wrap around to large numbers.
    u32 local = a.rows[row].token - a.first_token;
    for (u32 c = threadIdx.x * 8; c < D; c += THREADS * 8) {
        float v[8] = {};
        if (local < a.vocab) load8(a.table + (u64)local * D + c, v);
        store8(a.y + (u64)row * D + c, v);
    }
}

// Eight values of the sum of all parts.
DEVICE void sum_parts(const float* parts, u64 count, u32 n, u64 at, float (&sum)[8]) {
    load8(parts + at, sum);
#pragma unroll 1
    for (u32 p = 1; p < n; p++) {
        float v[8];
        load8(parts + p * count + at, v);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += v[i];
    }
}

KERNEL(expand, ExpandArgs, THREADS) {
    u64 row = blockIdx.x;
    wait_for_previous();
    for (u32 c = threadIdx.x * 8; c < D; c += THREADS * 8) {
        float v[8];
        if (a.x) load8(a.x + row * D + c, v);
        else sum_parts(a.parts, a.count, a.n, row * D + c, v);
#pragma unroll
        for (u32 m = 0; m < M; m++) store8(a.h + (row * M + m) * D + c, v);
    }
}

KERNEL(settle, SettleArgs, THREADS) {
    u64 at = ((u64)blockIdx.x * THREADS + threadIdx.x) * 8;
    wait_for_previous();
    if (at >= a.count) return;
    float sum[8];
    sum_parts(a.parts, a.count, a.n, at, sum);
    store8(a.y + at, sum);
}

KERNEL(draft_add, DraftAddArgs, THREADS) {
    u64 row = blockIdx.x;
    wait_for_previous();
    for (u32 c = threadIdx.x * 8; c < D; c += THREADS * 8) {
        float e[8];
        load8(a.e + row * D + c, e);
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            float v[8];
            u64 at = (row * M + m) * D + c;
            load8(a.h + at, v);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += e[i];
            store8(a.y + at, v);
        }
    }
}
