// route: the K experts of a row, ascending, and their weights
//
// affinity    sqrt(softplus(score)); the K largest of affinity + bias, on equal values the lower index;
//             or the experts that `table` gives the row's token
// weights     affinity / (sum over the chosen, ascending) * scale
// scores [rows,E] f32, what the gate gives    bias [E] f32    table [vocab,K]    chosen, weights [rows,K]
// grid        one warp per row
// twin        reference.rs: affinity, choose, weights
#include "base.cuh"
#include "ptx.cuh"

#define EACH ((E + LANES - 1) / LANES)

DEVICE float affinity(float x) { return sqrtf(x > 20.0f ? x : log1pf(expf(x))); }

// Larger for larger floats, of all bit patterns.
DEVICE u32 order_key(float v) {
    u32 bits = bits_of(v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

KERNEL(route, RouteArgs, THREADS) {
    u32 row = blockIdx.x * (THREADS / LANES) + warp_id(), lane = lane_id();
    release_next();
    if (row >= a.count) return;
    // A lane's experts are neighbours, so that the lowest lane has the lowest index. The bias is a weight:
    // it may be read before the gate has finished.
    float bias[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) bias[i] = a.bias && lane * EACH + i < E ? a.bias[lane * EACH + i] : 0.0f;
    wait_for_previous();
    const float* scores = a.scores + (u64)row * E;
    u32 picked[K];
    if (a.table) {
        const int* from = a.table + (u64)a.rows[row].token * K;
#pragma unroll
        for (int k = 0; k < K; k++) picked[k] = (u32)from[k];
    } else {
        u32 keys[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            u32 e = lane * EACH + i;
            keys[i] = e < E ? order_key(affinity(scores[e]) + bias[i]) : 0;
        }
#pragma unroll
        for (int k = 0; k < K; k++) {
            u32 best = 0, at = 0;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (keys[i] > best) {
                    best = keys[i];
                    at = i;
                }
            }
            u32 owners = ballot(best == warp_max(best));
            u32 owner = count_bits((owners & -owners) - 1);
            picked[k] = shuffle(lane * EACH + at, (int)owner);
#pragma unroll
            for (int i = 0; i < EACH; i++) keys[i] = lane == owner && at == (u32)i ? 0 : keys[i];
        }
    }
    u32 mine = 0;
#pragma unroll
    for (int i = 0; i < K; i++) {
        u32 rank = 0;
#pragma unroll
        for (int j = 0; j < K; j++) rank += picked[j] < picked[i] || (picked[j] == picked[i] && j < i);
        if (lane == rank) mine = picked[i];
    }
    float weight = lane < K ? affinity(scores[mine]) : 0.0f;
    float sum = shuffle(weight, 0);
#pragma unroll
    for (int k = 1; k < K; k++) sum += shuffle(weight, k);
    if (lane < K) {
        a.chosen[(u64)row * K + lane] = mine;
        a.weights[(u64)row * K + lane] = weight / sum * a.scale;
    }
}
