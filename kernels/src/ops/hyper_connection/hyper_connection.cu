// hc_mix:       h'[k] = post[k] * y + sum_j comb[j][k] * h[j] in place, rounded; partial sums of its dot products
//               with the mixing matrix and of its squares
// hc_mix_tiled: the same bits for many rows: a block keeps a part of the matrix for TILE_ROWS of them
// hc_collapse:  adds the partial sums; mixing weights; x = norm(round(sum_j pre[j] * h[j])), rounded; post, comb
// hc_finish:    only the first line of hc_mix
// hc_head:      x = norm(round(sum_j pre[j] * h[j])) of the wanted rows under the head's own weights
//
// h        [rows,M,D] act      y [rows,D] act, or parts [n][count] f32 that are added in their order and rounded
// w        [(2+M)*M, M*D] f32  base, scale as stored      norm [D] f32
// partials [rows][count][VALUES] f32, VALUES = (2+M)*M dot products and the sum of squares; count = SPLITS, or
//          GROUPS where `merged` splits are already added up
// grid     hc_mix (SPLITS, rows / FEW)   hc_mix_tiled (count, rows / TILE_ROWS)   hc_collapse, hc_head a block per row
//          hc_finish eight columns per thread
// order    A split is SPLIT columns of all streams. Chain c of a split: columns 4c..4c+3 of stream 0, of stream 1, ...;
//          its dot product adds the chains in order; GROUP splits in order make a group; the groups in order the sum.
//          No kernel departs from this, so that a row has the same bits whatever runs beside it.
// cost     few rows: the matrix once, 4*(2+M)*M*M*D bytes; many: h read twice and written once, 6*M*D bytes a row in
//          bfloat16
// twin     reference.rs: mix, collapse, add_back, head_mix; rms_norm/reference.rs
#include "base.cuh"
#include "ptx.cuh"

#define OUTPUTS ((2 + M) * M)
#define VALUES (OUTPUTS + 1)
#define SPLITS (D / SPLIT)
#define GROUPS ((SPLITS + GROUP - 1) / GROUP)
#define CHAINS (SPLIT / 4)
// Threads that share a row's columns of a split, eight each.
#define SHARES (SPLIT / 8)

// Adds the finished sublayer to the streams at eight columns.
DEVICE void add_sublayer(float (&h)[M][8], const float (&y)[8], const float* post, const float* comb) {
    float p[M], c[M][M];
#pragma unroll
    for (int k = 0; k < M; k++) p[k] = post[k];
#pragma unroll
    for (int j = 0; j < M; j++)
#pragma unroll
        for (int k = 0; k < M; k++) c[j][k] = comb[j * M + k];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        float sum[M];
#pragma unroll
        for (int k = 0; k < M; k++) {
            sum[k] = p[k] * y[e];
#pragma unroll
            for (int j = 0; j < M; j++) sum[k] = fmaf(c[j][k], h[j][e], sum[k]);
        }
#pragma unroll
        for (int k = 0; k < M; k++) h[k][e] = round_act(sum[k]);
    }
}

// The streams of a row at eight columns, as they are after the finished sublayer; written back where there was one.
template <class Args>
DEVICE void finished_streams(const Args& a, u64 row, u32 column, float (&h)[M][8]) {
    act_t* at = a.h + row * M * D + column;
#pragma unroll
    for (int j = 0; j < M; j++) load8(at + j * D, h[j]);
    float y[8];
    u64 from = row * D + column;
    if (a.y) {
        load8(a.y + from, y);
    } else if (a.parts) {
        load8(a.parts + from, y);
        for (u32 n = 1; n < a.n; n++) {
            float part[8];
            load8(a.parts + n * a.count + from, part);
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] += part[e];
        }
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = round_act(y[e]);
    } else {
        return;
    }
    add_sublayer(h, y, a.post + row * M, a.comb + row * M * M);
#pragma unroll
    for (int j = 0; j < M; j++) store8(at + j * D, h[j]);
}

// The sum of squares over SHARES neighbouring threads' columns of a split.
DEVICE float sum_of_squares(const float (&h)[M][8]) {
    float own = 0.0f;
#pragma unroll
    for (int j = 0; j < M; j++)
#pragma unroll
        for (int e = 0; e < 8; e++) own = fmaf(h[j][e], h[j][e], own);
    int first = (int)(lane_id() / SHARES * SHARES);
    float sum = shuffle(own, first);
#pragma unroll
    for (int q = 1; q < SHARES; q++) sum += shuffle(own, first + q);
    return sum;
}

// Four steps of a chain.
DEVICE float chain(float sum, const float (&h)[4], const float (&w)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) sum = fmaf(h[e], w[e], sum);
    return sum;
}

// A thread is one chain of one output and keeps its weights in registers, asked for before the sublayer is finished.
KERNEL(hc_mix, HcMixArgs, OUTPUTS * CHAINS) {
    alignas(16) SHARED float tile[FEW][M * SPLIT];
    u32 output = threadIdx.x / CHAINS, c = threadIdx.x % CHAINS, split = blockIdx.x, first = blockIdx.y * FEW;
    release_next();
    float w[M][4];
#pragma unroll
    for (int j = 0; j < M; j++) {
        uint4 words = load_stream(a.w + ((u64)output * M + j) * D + split * SPLIT + c * 4);
        w[j][0] = float_of(words.x), w[j][1] = float_of(words.y);
        w[j][2] = float_of(words.z), w[j][3] = float_of(words.w);
    }
    wait_for_previous();
    if (threadIdx.x < FEW * SHARES) {
        u32 r = threadIdx.x / SHARES, q = threadIdx.x % SHARES;
        bool real = first + r < a.rows;
        float h[M][8] = {};
        if (real) {
            finished_streams(a, first + r, split * SPLIT + q * 8, h);
#pragma unroll
            for (int j = 0; j < M; j++) store8(&tile[r][j * SPLIT + q * 8], h[j]);
        }
        float squares = sum_of_squares(h);
        if (real && q == 0) a.partials[((u64)(first + r) * SPLITS + split) * VALUES + OUTPUTS] = squares;
    }
    sync_block();
    int base = (int)(lane_id() / CHAINS * CHAINS);
    u32 rows = a.rows - first < FEW ? a.rows - first : FEW;
#pragma unroll 2
    for (u32 r = 0; r < rows; r++) {
        float own = 0.0f;
#pragma unroll
        for (int j = 0; j < M; j++) {
            float h[4];
            load4(&tile[r][j * SPLIT + c * 4], h);
            own = chain(own, h, w[j]);
        }
        float sum = shuffle(own, base);
#pragma unroll
        for (int i = 1; i < CHAINS; i++) sum += shuffle(own, base + i);
        if (c == 0) a.partials[((u64)(first + r) * SPLITS + split) * VALUES + output] = sum;
    }
}

// A lane has PER_LANE rows, a warp OUTPUTS / 4 of the outputs: the weights are the same for a warp's lanes.
#define TILED_WARPS 4
#define TILED_THREADS (TILED_WARPS * LANES)
#define PER_WARP (OUTPUTS / TILED_WARPS)
#define PER_LANE (TILE_ROWS / LANES)
#define ITEMS (TILE_ROWS * SHARES / TILED_THREADS)
// Elements behind a row of the tile, so that the lanes' rows lie in different banks.
#define TILE_PAD 4

KERNEL(hc_mix_tiled, HcMixArgs, TILED_THREADS) {
    alignas(16) SHARED float weights[OUTPUTS][M][SPLIT];
    alignas(16) SHARED act_t tile[TILE_ROWS][M * SPLIT + TILE_PAD];
    u32 first = blockIdx.y * TILE_ROWS, lane = lane_id(), output = warp_id() * PER_WARP;
    float total[PER_LANE][PER_WARP], squares[ITEMS];
    release_next();
    wait_for_previous();
    for (u32 s = 0; s < a.merged; s++) {
        u32 split = blockIdx.x * a.merged + s;
        if (split >= SPLITS) break;
        sync_block();
        for (u32 i = threadIdx.x; i < OUTPUTS * M * CHAINS; i += TILED_THREADS) {
            u32 row = i / CHAINS, c = i % CHAINS;  // row: of the matrix cut into its streams
            copy_async16(&weights[0][0][0] + row * SPLIT + c * 4, a.w + (u64)row * D + split * SPLIT + c * 4);
        }
        copy_commit();
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            u32 item = threadIdx.x + i * TILED_THREADS, r = item / SHARES, q = item % SHARES;
            float h[M][8] = {};
            if (first + r < a.rows) finished_streams(a, first + r, split * SPLIT + q * 8, h);
#pragma unroll
            for (int j = 0; j < M; j++) {
                float low[4] = {h[j][0], h[j][1], h[j][2], h[j][3]}, high[4] = {h[j][4], h[j][5], h[j][6], h[j][7]};
                store4(&tile[r][j * SPLIT + q * 8], low);
                store4(&tile[r][j * SPLIT + q * 8 + 4], high);
            }
            float sum = sum_of_squares(h);
            squares[i] = s == 0 ? sum : squares[i] + sum;
        }
        copy_wait<0>();
        sync_block();
        float dot[PER_LANE][PER_WARP];
#pragma unroll 1
        for (u32 c = 0; c < CHAINS; c++) {
            float own[PER_LANE][PER_WARP] = {};
#pragma unroll
            for (int j = 0; j < M; j++) {
                float h[PER_LANE][4];
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) load4(&tile[lane + i * LANES][j * SPLIT + c * 4], h[i]);
#pragma unroll
                for (int o = 0; o < PER_WARP; o++) {
                    float w[4];
                    load4(&weights[output + o][j][c * 4], w);
#pragma unroll
                    for (int i = 0; i < PER_LANE; i++) own[i][o] = chain(own[i][o], h[i], w);
                }
            }
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
#pragma unroll
                for (int o = 0; o < PER_WARP; o++) dot[i][o] = c == 0 ? own[i][o] : dot[i][o] + own[i][o];
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
#pragma unroll
            for (int o = 0; o < PER_WARP; o++) total[i][o] = s == 0 ? dot[i][o] : total[i][o] + dot[i][o];
    }
    // gridDim.x is the number of partial sums of a row.
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        u32 row = first + lane + i * LANES;
        float* to = a.partials + ((u64)row * gridDim.x + blockIdx.x) * VALUES + output;
#pragma unroll
        for (int o = 0; o < PER_WARP; o++)
            if (row < a.rows) to[o] = total[i][o];
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        u32 item = threadIdx.x + i * TILED_THREADS, row = first + item / SHARES;
        if (row < a.rows && item % SHARES == 0)
            a.partials[((u64)row * gridDim.x + blockIdx.x) * VALUES + OUTPUTS] = squares[i];
    }
}

KERNEL(hc_finish, HcFinishArgs, THREADS) {
    u64 item = (u64)blockIdx.x * THREADS + threadIdx.x;
    release_next();
    wait_for_previous();
    if (item >= (u64)a.rows * (D / 8)) return;
    float h[M][8];
    finished_streams(a, item / (D / 8), (u32)(item % (D / 8)) * 8, h);
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Row softmax, then alternating column and row normalisation of an M x M matrix, by one thread: a row's sum costs
// less than the exchange between lanes would.
DEVICE void sinkhorn(float (&m)[M][M], float eps) {
#pragma unroll
    for (int j = 0; j < M; j++) {
        float most = m[j][0], sum = 0.0f;
#pragma unroll
        for (int k = 1; k < M; k++) most = m[j][k] > most ? m[j][k] : most;
#pragma unroll
        for (int k = 0; k < M; k++) m[j][k] = expf(m[j][k] - most);
#pragma unroll
        for (int k = 0; k < M; k++) sum += m[j][k];
        float r = reciprocal_near(sum);
#pragma unroll
        for (int k = 0; k < M; k++) m[j][k] = fmaf(m[j][k], r, eps);
    }
#pragma unroll 1
    for (int i = 0; i < SINKHORN; i++) {
        if (i > 0) {
#pragma unroll
            for (int j = 0; j < M; j++) {
                float sum = m[j][0];
#pragma unroll
                for (int k = 1; k < M; k++) sum += m[j][k];
                float r = reciprocal_near(sum + eps);
#pragma unroll
                for (int k = 0; k < M; k++) m[j][k] *= r;
            }
        }
#pragma unroll
        for (int k = 0; k < M; k++) {
            float sum = m[0][k];
#pragma unroll
            for (int j = 1; j < M; j++) sum += m[j][k];
            float r = reciprocal_near(sum + eps);
#pragma unroll
            for (int j = 0; j < M; j++) m[j][k] *= r;
        }
    }
}

// The sum of the streams of a row under the weights `pre`, rounded, in place of stream 0; then normalised into `to`.
// Eight columns in every BLOCK threads' turn.
template <int BLOCK, int EACH>
DEVICE void collapse_and_norm(float (&h)[EACH][M][8], const float (&pre)[M], const float (&norm)[EACH][8], float eps,
                              act_t* to, float* scratch) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float x = pre[0] * h[i][0][e];
#pragma unroll
            for (int j = 1; j < M; j++) x = fmaf(pre[j], h[i][j][e], x);
            h[i][0][e] = round_act(x);
            squares = fmaf(h[i][0][e], h[i][0][e], squares);
        }
    float r = 1.0f / sqrtf(block_sum<BLOCK>(squares, scratch) / D + eps);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        u32 column = (threadIdx.x + i * BLOCK) * 8;
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = norm[i][e] * (h[i][0][e] * r);
        if (column < D) store8(to + column, y);
    }
}

// Eight columns of all streams, zeros past the end.
template <int BLOCK, int EACH>
DEVICE void load_streams(const act_t* row, float (&h)[EACH][M][8]) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        u32 column = (threadIdx.x + i * BLOCK) * 8;
#pragma unroll
        for (int j = 0; j < M; j++) {
#pragma unroll
            for (int e = 0; e < 8; e++) h[i][j][e] = 0.0f;
            if (column < D) load8(row + j * D + column, h[i][j]);
        }
    }
}
template <int BLOCK, int EACH>
DEVICE void load_norm(const float* from, float (&norm)[EACH][8]) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        u32 column = (threadIdx.x + i * BLOCK) * 8;
#pragma unroll
        for (int e = 0; e < 8; e++) norm[i][e] = 0.0f;
        if (column < D) load8(from + column, norm[i]);
    }
}

KERNEL(hc_collapse, HcCollapseArgs, THREADS) {
    constexpr int EACH = (D / 8 + THREADS - 1) / THREADS;
    SHARED float groups[GROUPS][VALUES];
    SHARED float weights[M], logits[M][M];
    SHARED float scratch[THREADS / LANES];
    u64 row = blockIdx.x;
    u32 t = threadIdx.x;
    release_next();
    // Weights come from far and do not depend on the kernel before.
    float norm[EACH][8];
    load_norm<THREADS, EACH>(a.norm, norm);
    float base = t < OUTPUTS ? a.base[t] : 0.0f;
    float scale = t < OUTPUTS ? a.scale[t < M ? 0 : t < 2 * M ? 1 : 2] : 0.0f;
    wait_for_previous();
    float h[EACH][M][8];
    load_streams<THREADS, EACH>(a.h + row * M * D, h);
    u32 per_group = GROUP / a.merged, count = a.merged == 1 ? SPLITS : GROUPS;
    for (u32 i = t; i < GROUPS * VALUES; i += THREADS) {
        u32 group = i / VALUES, v = i % VALUES;
        const float* from = a.partials + (row * count + group * per_group) * VALUES + v;
        float part[GROUP];
#pragma unroll
        for (u32 s = 0; s < GROUP; s++)
            part[s] = s < per_group && group * per_group + s < count ? from[s * VALUES] : 0.0f;
        float sum = part[0];
#pragma unroll
        for (u32 s = 1; s < GROUP; s++) sum += part[s];
        groups[group][v] = sum;
    }
    sync_block();
    if (warp_id() == 0) {
        float sum = 0.0f;
        if (t < VALUES) {
            sum = groups[0][t];
#pragma unroll
            for (int g = 1; g < GROUPS; g++) sum += groups[g][t];
        }
        float r = 1.0f / sqrtf(shuffle(sum, OUTPUTS) / (M * D) + a.eps);
        float v = sum * r * scale + base;
        if (t < M) weights[t] = sigmoid(v) + a.hc_eps;
        else if (t < 2 * M) a.post[row * M + t - M] = 2.0f * sigmoid(v);
        else if (t < OUTPUTS) logits[(t - 2 * M) / M][t % M] = v;
    }
    sync_block();
    float pre[M];
#pragma unroll
    for (int j = 0; j < M; j++) pre[j] = weights[j];
    collapse_and_norm<THREADS, EACH>(h, pre, norm, a.eps, a.x + row * D, scratch);
    if (t == 0) {
        float m[M][M];
#pragma unroll
        for (int j = 0; j < M; j++)
#pragma unroll
            for (int k = 0; k < M; k++) m[j][k] = logits[j][k];
        sinkhorn(m, a.hc_eps);
#pragma unroll
        for (int j = 0; j < M; j++)
#pragma unroll
            for (int k = 0; k < M; k++) a.comb[row * M * M + j * M + k] = m[j][k];
    }
}

KERNEL(hc_head, HcHeadArgs, HEAD_THREADS) {
    constexpr int EACH = (D / 8 + HEAD_THREADS - 1) / HEAD_THREADS, WARPS = HEAD_THREADS / LANES;
    SHARED float sums[M + 1][WARPS];
    SHARED float scratch[WARPS];
    u64 i = blockIdx.x;
    release_next();
    wait_for_previous();
    float h[EACH][M][8], norm[EACH][8], own[M + 1] = {};
    load_streams<HEAD_THREADS, EACH>(a.h + (u64)a.wanted[i] * M * D, h);
    load_norm<HEAD_THREADS, EACH>(a.norm, norm);
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        u32 column = (threadIdx.x + n * HEAD_THREADS) * 8;
        if (column >= D) continue;
#pragma unroll
        for (int j = 0; j < M; j++) {
#pragma unroll
            for (int o = 0; o < M; o++) {
                float w[8];
                load8(a.w + ((u64)o * M + j) * D + column, w);
#pragma unroll
                for (int e = 0; e < 8; e++) own[o] = fmaf(h[n][j][e], w[e], own[o]);
            }
#pragma unroll
            for (int e = 0; e < 8; e++) own[M] = fmaf(h[n][j][e], h[n][j][e], own[M]);
        }
    }
#pragma unroll
    for (int o = 0; o <= M; o++) {
        float sum = warp_sum(own[o]);
        if (lane_id() == 0) sums[o][warp_id()] = sum;
    }
    sync_block();
#pragma unroll
    for (int o = 0; o <= M; o++) {
        own[o] = sums[o][0];
#pragma unroll
        for (int n = 1; n < WARPS; n++) own[o] += sums[o][n];
    }
    float r = 1.0f / sqrtf(own[M] / (M * D) + a.eps), pre[M];
#pragma unroll
    for (int j = 0; j < M; j++) pre[j] = sigmoid(own[j] * r * a.scale[0] + a.base[j]) + a.hc_eps;
    collapse_and_norm<HEAD_THREADS, EACH>(h, pre, norm, a.eps, a.x + i * D, scratch);
}
