// gate:  affinities of a few rows to all experts, and their route, in one launch
// route: the K experts of a row, ascending, and their weights
//
// affinity    sqrt(softplus(score)), score = the gate's row times x; the K largest of affinity + bias, on equal values
//             the lower index; or the experts that `table` gives the row's token
// weights     affinity / (sum over the chosen, ascending) * scale
// x [rows,D] act    w [E,D] bf16    bias [E] f32    table [vocab,K]    chosen, weights [rows,K]
// scores      [rows,E] f32: route reads what the gate gave, gate keeps affinities there
// arrivals    a counter for every ROWS rows: zero before and after
// grid        gate: (E / EXPERTS, rows / ROWS), the last block of ROWS rows routes them    route: one warp per row
// order       A thread has eight columns in every GATE_THREADS' turn and adds their products in order; the lanes of a
//             warp by a tree, the warps in order: the same for any number of rows
// cost        the gate once, 2*E*D bytes, then latencies
// twin        reference.rs: affinity, choose, weights; dense_gemm/reference.rs::matmul
#include "base.cuh"
#include "ptx.cuh"
#include "eight.cuh"

#define EACH ((E + LANES - 1) / LANES)
#define CHUNKS ((D / 8 + GATE_THREADS - 1) / GATE_THREADS)
#define GATE_WARPS (GATE_THREADS / LANES)
// Rows of x that are asked for together, ahead of those that are worked on.
#define AHEAD 2

DEVICE float affinity(float x) { return sqrtf(x > 20.0f ? x : log1pf(expf(x))); }
// From scores to affinities, where they are not that yet.
struct Scores {};
struct Affinities {};
DEVICE float affinity_of(Scores, float x) { return affinity(x); }
DEVICE float affinity_of(Affinities, float x) { return x; }

// Larger for larger floats, of all bit patterns.
DEVICE u32 order_key(float v) {
    u32 bits = bits_of(v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
template <int N>
DEVICE u32 largest(const u32 (&keys)[N]) {
    u32 best = keys[0];
#pragma unroll
    for (int i = 1; i < N; i++) best = keys[i] > best ? keys[i] : best;
    return best;
}

// Routes a row; called by a whole warp.
template <class Args, class Given>
DEVICE void route_row(Given given, const Args& a, u32 row, const float (&bias)[EACH]) {
    u32 lane = lane_id(), picked[K];
    const float* scores = a.scores + (u64)row * E;
    if (a.table) {
        const int* from = a.table + (u64)a.rows[row].token * K;
#pragma unroll
        for (int k = 0; k < K; k++) picked[k] = (u32)from[k];
    } else {
        u32 keys[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            u32 e = lane * EACH + i;
            keys[i] = e < E ? order_key(affinity_of(given, scores[e]) + bias[i]) : 0;
        }
        u32 best = largest(keys);
#pragma unroll
        for (int k = 0; k < K; k++) {
            // A lane's experts are neighbours, so that the lowest lane has the lowest index.
            u32 owners = ballot(best == warp_max(best));
            u32 owner = count_bits((owners & -owners) - 1), at = 0;
#pragma unroll
            for (int i = EACH - 1; i >= 0; i--) at = keys[i] == best ? (u32)i : at;
            picked[k] = shuffle(lane * EACH + at, (int)owner);
#pragma unroll
            for (int i = 0; i < EACH; i++) keys[i] = lane == owner && at == (u32)i ? 0 : keys[i];
            best = largest(keys);
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
    float weight = lane < K ? affinity_of(given, scores[mine]) : 0.0f;
    float sum = shuffle(weight, 0);
#pragma unroll
    for (int k = 1; k < K; k++) sum += shuffle(weight, k);
    if (lane < K) {
        a.chosen[(u64)row * K + lane] = mine;
        a.weights[(u64)row * K + lane] = weight / sum * a.scale;
    }
}
DEVICE void load_bias(const float* from, float (&bias)[EACH]) {
    u32 lane = lane_id();
#pragma unroll
    for (int i = 0; i < EACH; i++) bias[i] = from && lane * EACH + i < E ? from[lane * EACH + i] : 0.0f;
}

KERNEL(route, RouteArgs, THREADS) {
    u32 row = blockIdx.x * (THREADS / LANES) + warp_id();
    // The bias is a weight: it may be read before the gate has finished.
    float bias[EACH];
    load_bias(a.bias, bias);
    wait_for_previous();
    if (row < a.count) route_row(Scores(), a, row, bias);
}

// A thread's columns of AHEAD rows from `row` on; zeros past the last row and column.
DEVICE void ask_rows(const act_t* x, u32 row, u32 rows, Eight (&to)[AHEAD][CHUNKS]) {
#pragma unroll
    for (int r = 0; r < AHEAD; r++)
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            u32 column = (i * GATE_THREADS + threadIdx.x) * 8;
            to[r][i] = row + r < rows && column < D ? ask_eight(x + (u64)(row + r) * D + column) : Eight{};
        }
}

KERNEL(gate, GateArgs, GATE_THREADS) {
    SHARED float sums[ROWS][EXPERTS][GATE_WARPS];
    SHARED u32 ticket;
    u32 t = threadIdx.x, lane = lane_id(), expert = blockIdx.x * EXPERTS;
    u32 first = blockIdx.y * ROWS, rows = a.count - first < ROWS ? a.count - first : ROWS;
    // A thread keeps its weights in registers, asked for before x is there.
    uint4 w[EXPERTS][CHUNKS];
#pragma unroll
    for (int e = 0; e < EXPERTS; e++)
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            u32 column = (i * GATE_THREADS + t) * 8;
            bool there = expert + e < E && column < D;
            w[e][i] = there ? load_ahead(a.w + (u64)(expert + e) * D + column) : uint4{0, 0, 0, 0};
        }
    if (blockIdx.x == 0 && a.bias && t * 32 < E) prefetch_l2(a.bias + t * 32);
    wait_for_previous();
    const act_t* x = a.x + (u64)first * D;
    Eight next[AHEAD][CHUNKS];
    ask_rows(x, 0, rows, next);
    if (a.table && t < rows) prefetch_l2(a.table + (u64)a.rows[first + t].token * K);
#pragma unroll 1
    for (u32 r0 = 0; r0 < rows; r0 += AHEAD) {
        float own[AHEAD][EXPERTS] = {};
        Eight now[AHEAD][CHUNKS];
#pragma unroll
        for (int r = 0; r < AHEAD; r++)
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) now[r][i] = next[r][i];
        ask_rows(x, r0 + AHEAD, rows, next);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            float weights[EXPERTS][8];
#pragma unroll
            for (int e = 0; e < EXPERTS; e++) widen_eight(w[e][i], weights[e]);
#pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                float v[8];
                widen_eight(now[r][i], v);
#pragma unroll
                for (int e = 0; e < EXPERTS; e++)
#pragma unroll
                    for (int c = 0; c < 8; c++) own[r][e] = fmaf(v[c], weights[e][c], own[r][e]);
            }
        }
#pragma unroll
        for (int r = 0; r < AHEAD; r++)
#pragma unroll
            for (int e = 0; e < EXPERTS; e++) {
                float sum = warp_sum(own[r][e]);
                if (lane == 0 && r0 + r < rows) sums[r0 + r][e][warp_id()] = sum;
            }
    }
    sync_block();
    // One warp has all sums of the block: ROWS * EXPERTS lanes at most.
    if (warp_id() == 0) {
        u32 e = lane % EXPERTS, r = lane / EXPERTS;
        if (r < rows && expert + e < E) {
            float sum = sums[r][e][0];
#pragma unroll
            for (int n = 1; n < GATE_WARPS; n++) sum += sums[r][e][n];
            a.scores[(u64)(first + r) * E + expert + e] = affinity(sum);
        }
        sync_warp();
        if (t == 0) ticket = arrive(a.arrivals + blockIdx.y);
    }
    sync_block();
    if (ticket != gridDim.x - 1) return;
    if (t == 0) a.arrivals[blockIdx.y] = 0;
    float bias[EACH];
    load_bias(a.bias, bias);
    for (u32 r = warp_id(); r < rows; r += GATE_WARPS) route_row(Affinities(), a, first + r, bias);
}
