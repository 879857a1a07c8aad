// hc_site:     h'[k] = post[k] * y + sum_j comb[j][k] * h[j] in place, rounded; partial sums of its dot products with
//              the mixing matrix and of its squares; with `arrivals` the last block does what hc_collapse does
// hc_tiled:    the first part of hc_site for many rows: a block keeps a part of the matrix for TILE_ROWS of them
// hc_collapse: adds the partial sums; mixing weights; x = norm(round(sum_j pre[j] * h[j])), rounded; post, comb
// hc_finish:   only the first line of hc_site
// hc_head:     x = norm(round(sum_j pre[j] * h[j])) of the wanted rows under the head's own weights
//
// h        [rows,M,D] act      y [rows,D] act, or parts [n][count] f32 that are added in their order and rounded
// w        [(2+M)*M, M*D] f32  base, scale as stored      norm [D] f32      rows first .. first + rows of all
// partials [rows][SPLITS][VALUES] f32, VALUES = (2+M)*M dot products and the sum of squares
// arrivals a counter for every FEW rows: zero before and after
// grid     hc_site (SPLITS, rows / FEW)   hc_tiled (SPLITS, rows / TILE_ROWS)   hc_collapse, hc_head a block per row
//          hc_finish eight columns per thread
// order    A split is SPLIT columns of all streams. Chain c of a split: columns 4c..4c+3 of stream 0, of stream 1, ...;
//          its dot product adds the chains in order; GROUP splits in order make a group; the groups in order the sum.
//          Squares are a dot product of the streams with themselves. No kernel departs from this, so that a row has
//          the same bits whatever runs beside it.
// cost     few rows: the matrix once, 4*(2+M)*M*M*D bytes, then latencies; many: h read and written, and read again
//          from the L2 cache if it is still there: 4*M*D bytes a row in bfloat16
// twin     reference.rs: mix, collapse, add_back, head_mix; rms_norm/reference.rs
#include "base.cuh"
#include "ptx.cuh"
#include "eight.cuh"

#define OUTPUTS ((2 + M) * M)
#define VALUES (OUTPUTS + 1)
#define SPLITS (D / SPLIT)
#define GROUPS ((SPLITS + GROUP - 1) / GROUP)
#define CHAINS (SPLIT / 4)
// Warps that collapse a row, and one for the Sinkhorn rounds.
#define SITE_THREADS (THREADS + LANES)
// Two blocks are to fit a multiprocessor, so that all of a row are on 48 of them at once, if its threads (1536 on a
// GB10) allow it; float32 streams would spill.
#if PUBLISHED && 2 * (THREADS + 32) <= 1536 && !defined(DSV4_EMULATED)
#define SITE_BOUNDS SITE_THREADS, 2
#else
#define SITE_BOUNDS SITE_THREADS
#endif
// Wide rows of float32 leave no registers for what is asked for early.
#define AHEAD (PUBLISHED || D <= 4096)
// Turns in which a block has eight columns a thread, and whether those are columns of a row.
#define EACH_OF(threads) ((D / 8 + (threads) - 1) / (threads))
#define IS_COLUMN(threads, column) (D % (8 * (threads)) == 0 || (column) < D)

// Neighbouring values, a few at once; those that are stored are rounded already.
DEVICE void load_values(const float* at, float (&v)[2]) {
    float2 w = *reinterpret_cast<const float2*>(at);
    v[0] = w.x, v[1] = w.y;
}
DEVICE void load_values(const u16* at, float (&v)[2]) {
    widen_bf16x2(*reinterpret_cast<const u32*>(at), v[0], v[1]);
}
template <class T>
DEVICE void load_values(const T* at, float (&v)[8]) {
    load8(at, v);
}
// Those of another row or stream, of which there are few.
template <int N>
DEVICE void load_weights(const float* at, float (&v)[N]) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) load4(at + i, reinterpret_cast<float (&)[4]>(v[i]));
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = at[i];
    }
}
DEVICE u32 pack_rounded(float lo, float hi) { return permute_bytes(bits_of(lo), bits_of(hi), 0x7632); }
DEVICE void store_values(float* at, const float (&v)[2]) { *reinterpret_cast<float2*>(at) = float2{v[0], v[1]}; }
DEVICE void store_values(u16* at, const float (&v)[2]) { *reinterpret_cast<u32*>(at) = pack_rounded(v[0], v[1]); }
DEVICE void store_values(float* at, const float (&v)[4]) { store4(at, v); }
DEVICE void store_values(u16* at, const float (&v)[4]) {
    *reinterpret_cast<uint2*>(at) = uint2{pack_rounded(v[0], v[1]), pack_rounded(v[2], v[3])};
}
DEVICE void store_values(float* at, const float (&v)[8]) { store8(at, v); }
DEVICE void store_values(u16* at, const float (&v)[8]) {
    uint4 w = {pack_rounded(v[0], v[1]), pack_rounded(v[2], v[3]), pack_rounded(v[4], v[5]), pack_rounded(v[6], v[7])};
    *reinterpret_cast<uint4*>(at) = w;
}
template <int N>
DEVICE void round_values(float (&v)[N]) {
#if PUBLISHED
#pragma unroll
    for (int i = 0; i < N; i += 2) widen_bf16x2(bf16x2_near(v[i], v[i + 1]), v[i], v[i + 1]);
#endif
}

// The streams of a row at N columns, as they are after the finished sublayer; written back where there was one.
template <int N, class Args>
DEVICE void finished_streams(const Args& a, u64 row, u32 column, float (&h)[M][N]) {
    act_t* at = a.h + row * M * D + column;
#pragma unroll
    for (int j = 0; j < M; j++) load_values(at + j * D, h[j]);
    if (!a.y && !a.parts) return;
    // All that is read is asked for before any of it is needed.
    float post[M], comb[M * M], y[N];
    load_weights(a.post + row * M, post);
    load_weights(a.comb + row * M * M, comb);
    u64 from = row * D + column;
    if (a.y) {
        load_values(a.y + from, y);
    } else {
        load_values(a.parts + from, y);
#pragma unroll 1
        for (u32 n = 1; n < a.n; n++) {
            float part[N];
            load_values(a.parts + n * a.count + from, part);
#pragma unroll
            for (int e = 0; e < N; e++) y[e] += part[e];
        }
        round_values(y);
    }
#pragma unroll
    for (int e = 0; e < N; e++) {
        float sum[M];
#pragma unroll
        for (int k = 0; k < M; k++) {
            sum[k] = post[k] * y[e];
#pragma unroll
            for (int j = 0; j < M; j++) sum[k] = fmaf(comb[j * M + k], h[j][e], sum[k]);
        }
#pragma unroll
        for (int k = 0; k < M; k++) h[k][e] = sum[k];
    }
#pragma unroll
    for (int j = 0; j < M; j++) {
        round_values(h[j]);
        store_values(at + j * D, h[j]);
    }
}

// Four steps of a chain.
DEVICE float chain(float sum, const float (&h)[4], const float (&w)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) sum = fmaf(h[e], w[e], sum);
    return sum;
}

DEVICE float sigmoid(float x) { return reciprocal_near(1.0f + expf(-x)); }

// Row softmax, then alternating column and row normalisation of an M x M matrix, by one thread: a row's sum costs
// less than the exchange between lanes would.
//
// Rounds multiply rows and columns by factors, so these are followed in place of the matrix, as reciprocals u and v.
// The sum of row j is (sum_k m[j][k] / v[k]) / u[j]: division of the row by sum + eps makes u[j] the sum in brackets
// plus eps * u[j].
DEVICE void sinkhorn(float (&m)[M][M], float eps) {
    float u[M], v[M], r[M], c[M];
#pragma unroll
    for (int j = 0; j < M; j++) {
        float most = m[j][0], sum = 0.0f;
#pragma unroll
        for (int k = 1; k < M; k++) most = m[j][k] > most ? m[j][k] : most;
#pragma unroll
        for (int k = 0; k < M; k++) m[j][k] = expf(m[j][k] - most);
#pragma unroll
        for (int k = 0; k < M; k++) sum += m[j][k];
        float inverse = reciprocal_near(sum);
#pragma unroll
        for (int k = 0; k < M; k++) m[j][k] = fmaf(m[j][k], inverse, eps);
        u[j] = v[j] = r[j] = 1.0f;
    }
#pragma unroll 1
    for (int i = 0; i < SINKHORN; i++) {
        if (i > 0) {
#pragma unroll
            for (int j = 0; j < M; j++) {
                u[j] *= eps;
#pragma unroll
                for (int k = 0; k < M; k++) u[j] = fmaf(m[j][k], c[k], u[j]);
            }
#pragma unroll
            for (int j = 0; j < M; j++) r[j] = reciprocal_near(u[j]);
        }
#pragma unroll
        for (int k = 0; k < M; k++) {
            v[k] *= eps;
#pragma unroll
            for (int j = 0; j < M; j++) v[k] = fmaf(m[j][k], r[j], v[k]);
        }
#pragma unroll
        for (int k = 0; k < M; k++) c[k] = reciprocal_near(v[k]);
    }
#pragma unroll
    for (int j = 0; j < M; j++)
#pragma unroll
        for (int k = 0; k < M; k++) m[j][k] *= r[j] * c[k];
}

// Eight columns of all streams in every one of BLOCK threads' turns, zeros past the end.
template <int BLOCK>
DEVICE void ask_streams(const act_t* row, Eight (&h)[EACH_OF(BLOCK)][M]) {
#pragma unroll
    for (int i = 0; i < EACH_OF(BLOCK); i++) {
        u32 column = (threadIdx.x + i * BLOCK) * 8;
#pragma unroll
        for (int j = 0; j < M; j++) h[i][j] = IS_COLUMN(BLOCK, column) ? ask_eight(row + j * D + column) : Eight{};
    }
}
template <int BLOCK>
DEVICE void load_norm(const float* from, float (&norm)[EACH_OF(BLOCK)][8]) {
#pragma unroll
    for (int i = 0; i < EACH_OF(BLOCK); i++) {
        u32 column = (threadIdx.x + i * BLOCK) * 8;
#pragma unroll
        for (int e = 0; e < 8; e++) norm[i][e] = 0.0f;
        if (IS_COLUMN(BLOCK, column)) load8(from + column, norm[i]);
    }
}
// The sum of the streams under the weights `pre`, rounded, and the thread's part of its squares.
template <int EACH>
DEVICE float collapsed(const Eight (&h)[EACH][M], const float (&pre)[M], float (&x)[EACH][8]) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
#pragma unroll
        for (int j = 0; j < M; j++) {
            float v[8];
            widen_eight(h[i][j], v);
#pragma unroll
            for (int e = 0; e < 8; e++) x[i][e] = j == 0 ? pre[0] * v[e] : fmaf(pre[j], v[e], x[i][e]);
        }
        round_values(x[i]);
#pragma unroll
        for (int e = 0; e < 8; e++) squares = fmaf(x[i][e], x[i][e], squares);
    }
    return squares;
}
template <int BLOCK>
DEVICE void store_normed(const float (&x)[EACH_OF(BLOCK)][8], const float (&norm)[EACH_OF(BLOCK)][8], float squares,
                         float eps, act_t* to) {
    float r = rsqrtf(squares / D + eps);
#pragma unroll
    for (int i = 0; i < EACH_OF(BLOCK); i++) {
        u32 column = (threadIdx.x + i * BLOCK) * 8;
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = norm[i][e] * (x[i][e] * r);
        round_values(y);
        if (IS_COLUMN(BLOCK, column)) store_values(to + column, y);
    }
}

// What collapsing a row takes beside what earlier kernels gave.
struct SiteWeights {
    float norm[EACH_OF(THREADS)][8];
    float base, scale;  // of the lane's output
};
DEVICE SiteWeights site_weights(const HcSiteArgs& a) {
    SiteWeights w;
    u32 lane = lane_id();
    if (threadIdx.x < THREADS) load_norm<THREADS>(a.norm, w.norm);
    w.base = lane < OUTPUTS ? a.base[lane] : 0.0f;
    w.scale = lane < OUTPUTS ? a.scale[lane < M ? 0 : lane < 2 * M ? 1 : 2] : 0.0f;
    return w;
}

// Adds up the lane's partial sum of a row; gives the output, normalised, scaled and shifted. Called by whole warps.
DEVICE float mixed(const float (&groups)[GROUPS][VALUES], const SiteWeights& w, float eps) {
    u32 lane = lane_id();
    float sum = 0.0f;
    if (lane < VALUES) {
        sum = groups[0][lane];
#pragma unroll
        for (int g = 1; g < GROUPS; g++) sum += groups[g][lane];
    }
    float r = rsqrtf(shuffle(sum, OUTPUTS) / (M * D) + eps);
    return sum * r * w.scale + w.base;
}

// What hc_collapse does, for `rows` (at most ROWS) rows by one block of SITE_THREADS: the last warp has the weights
// that only the end of the sublayer needs, the others the sublayer's input.
template <int ROWS>
DEVICE void collapse_rows(const HcSiteArgs& a, u32 first, u32 rows, const SiteWeights& w) {
    constexpr int EACH = EACH_OF(THREADS), WARPS = THREADS / LANES;
    SHARED float groups[ROWS][GROUPS][VALUES];
    SHARED float logits[ROWS][M][M];
    alignas(16) SHARED float squares[2][WARPS];
    u32 t = threadIdx.x, lane = lane_id();
    u64 row = a.first + first;
    // Streams are asked for behind the first partial sums, which are needed sooner.
    Eight h[EACH][M];
#pragma unroll 1
    for (u32 i = t; i < rows * (GROUPS * VALUES) || i == t; i += SITE_THREADS) {
        u32 v = i % VALUES, group = i / VALUES % GROUPS, r = i / (VALUES * GROUPS);
        const float* from = a.partials + ((u64)(first + r) * SPLITS + group * GROUP) * VALUES + v;
        float part[GROUP];
#pragma unroll
        for (u32 s = 0; s < GROUP; s++) part[s] = r < rows && group * GROUP + s < SPLITS ? from[s * VALUES] : 0.0f;
        if (AHEAD && i == t && t < THREADS) ask_streams<THREADS>(a.h + row * M * D, h);
        float sum = part[0];
#pragma unroll
        for (u32 s = 1; s < GROUP; s++) sum += part[s];
        if (r < rows) groups[r][group][v] = sum;
    }
    sync_block();
    if (t >= THREADS) {
#pragma unroll 1
        for (u32 r = 0; r < rows; r++) {
            float v = mixed(groups[r], w, a.eps);
            if (lane >= M && lane < 2 * M) a.next_post[(row + r) * M + lane - M] = 2.0f * sigmoid(v);
            if (lane >= 2 * M && lane < OUTPUTS) logits[r][(lane - 2 * M) / M][lane % M] = v;
            pass_first();
        }
        sync_warp();
        // A lane has a row: one thread's chain of divisions is as long as that of many.
        if (lane < rows) {
            float m[M][M];
#pragma unroll
            for (int j = 0; j < M; j++)
#pragma unroll
                for (int k = 0; k < M; k++) m[j][k] = logits[lane][j][k];
            sinkhorn(m, a.hc_eps);
            float* to = a.next_comb + (row + lane) * M * M;
#pragma unroll
            for (int i = 0; i < M * M; i += 4) store4(to + i, reinterpret_cast<const float (&)[4]>(m[i / M][i % M]));
        }
        return;
    }
#pragma unroll 1
    for (u32 r = 0; r < rows; r++) {
        float own = sigmoid(mixed(groups[r], w, a.eps)) + a.hc_eps, pre[M], x[EACH][8];
#pragma unroll
        for (int j = 0; j < M; j++) pre[j] = shuffle(own, j);
        if (!AHEAD) ask_streams<THREADS>(a.h + (row + r) * M * D, h);
        float part = warp_sum(collapsed(h, pre, x));
        if (AHEAD && r + 1 < rows) ask_streams<THREADS>(a.h + (row + r + 1) * M * D, h);
        // Two sets in turn: no warp is two rows ahead of another.
        if (lane == 0) squares[r % 2][warp_id()] = part;
        sync_first<THREADS>();
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i += 4) {
            float four[4];
            load4(&squares[r % 2][i], four);
#pragma unroll
            for (int e = 0; e < 4; e++) sum += four[e];
        }
        store_normed<THREADS>(x, w.norm, sum, a.eps, a.x + (row + r) * D);
    }
}

// Warps that multiply, a thread with one chain of one output or of the squares; the others finish the sublayer.
#define MIX_WARPS ((VALUES * CHAINS + LANES - 1) / LANES)
#define FINISH_WARPS (SITE_THREADS / LANES - MIX_WARPS)

KERNEL(hc_site, HcSiteArgs, SITE_BOUNDS) {
    alignas(16) SHARED float tile[FEW][M * SPLIT];
    // Rows of the chains begin in different banks.
    alignas(16) SHARED float chains[FEW][VALUES][CHAINS + 4];
    SHARED u32 ticket;
    u32 t = threadIdx.x, lane = lane_id();
    u32 split = blockIdx.x, first = blockIdx.y * FEW, rows = a.rows - first < FEW ? a.rows - first : FEW;
    SiteWeights weights;
    if (a.arrivals) weights = site_weights(a);
    if (warp_id() < MIX_WARPS) {
        // Weights stay in registers; they are asked for before the sublayer has ended.
        u32 output = t / CHAINS, c = t % CHAINS;
        float w[M][4] = {};
        if (output < OUTPUTS) {
#pragma unroll
            for (int j = 0; j < M; j++) {
                uint4 words = load_ahead(a.w + ((u64)output * M + j) * D + split * SPLIT + c * 4);
                w[j][0] = float_of(words.x), w[j][1] = float_of(words.y);
                w[j][2] = float_of(words.z), w[j][3] = float_of(words.w);
            }
        }
        wait_for_previous();
        sync_block();
#pragma unroll 1
        for (u32 r = 0; r < rows; r++) {
            float own = 0.0f;
#pragma unroll
            for (int j = 0; j < M; j++) {
                float h[4];
                load4(&tile[r][j * SPLIT + c * 4], h);
                own = output < OUTPUTS ? chain(own, h, w[j]) : chain(own, h, h);
            }
            if (output < VALUES) chains[r][output][c] = own;
        }
    } else {
        wait_for_previous();
        // A warp has a row, a lane two columns.
#pragma unroll 1
        for (u32 r = warp_id() - MIX_WARPS; r < rows; r += FINISH_WARPS) {
            float h[M][2];
            finished_streams(a, a.first + first + r, split * SPLIT + lane * 2, h);
#pragma unroll
            for (int j = 0; j < M; j++) store_values(&tile[r][j * SPLIT + lane * 2], h[j]);
        }
        sync_block();
    }
    sync_block();
#pragma unroll 1
    for (u32 i = t; i < rows * VALUES; i += SITE_THREADS) {
        u32 v = i % VALUES, r = i / VALUES;
        float sum = chains[r][v][0];
#pragma unroll
        for (int n = 1; n < CHAINS; n++) sum += chains[r][v][n];
        a.partials[((u64)(first + r) * SPLITS + split) * VALUES + v] = sum;
    }
    if (!a.arrivals) return;
    sync_block();
    if (t == 0) ticket = arrive(a.arrivals + blockIdx.y);
    sync_block();
    if (ticket != gridDim.x - 1) return;
    if (t == 0) a.arrivals[blockIdx.y] = 0;
    collapse_rows<FUSED>(a, first, rows, weights);
}

KERNEL(hc_collapse, HcSiteArgs, SITE_BOUNDS) {
    // Weights come from far and do not depend on the kernel before.
    SiteWeights w = site_weights(a);
    wait_for_previous();
    collapse_rows<1>(a, blockIdx.x, 1, w);
}

// A lane has PER_LANE rows, a warp OUTPUTS / 4 of the outputs: the weights are the same for a warp's lanes. A split is
// worked on in PARTs, for which there is room.
#define TILED_WARPS 4
#define TILED_THREADS (TILED_WARPS * LANES)
#define PER_WARP (OUTPUTS / TILED_WARPS)
#define PER_LANE (TILE_ROWS / LANES)
#define PART 32
#define PART_SHARES (PART / 8)
#define ITEMS (TILE_ROWS * PART_SHARES / TILED_THREADS)
// Elements behind a row of the tile, so that the lanes' rows lie in different banks.
#define TILE_PAD 4

KERNEL(hc_tiled, HcSiteArgs, TILED_THREADS) {
    alignas(16) SHARED float weights[OUTPUTS][M][PART];
    alignas(16) SHARED act_t tile[TILE_ROWS][M * PART + TILE_PAD];
    u32 split = blockIdx.x, first = blockIdx.y * TILE_ROWS, lane = lane_id(), warp = warp_id();
    // Squares of the rows lane + i * LANES are warp i's.
    float dot[PER_LANE][PER_WARP], squares = 0.0f;
#pragma unroll 1
    for (u32 part = 0; part < SPLIT / PART; part++) {
        u32 column = split * SPLIT + part * PART;
        if (part) sync_block();
        for (u32 i = threadIdx.x; i < OUTPUTS * M * (PART / 4); i += TILED_THREADS) {
            u32 row = i / (PART / 4), c = i % (PART / 4);  // row: of the matrix cut into its streams
            copy_async16(&weights[0][0][0] + row * PART + c * 4, a.w + (u64)row * D + column + c * 4);
        }
        copy_commit();
        if (part == 0) wait_for_previous();
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            u32 item = threadIdx.x + i * TILED_THREADS, r = item / PART_SHARES, q = item % PART_SHARES;
            float h[M][8] = {};
            if (first + r < a.rows) finished_streams(a, a.first + first + r, column + q * 8, h);
#pragma unroll
            for (int j = 0; j < M; j++) {
                float low[4] = {h[j][0], h[j][1], h[j][2], h[j][3]}, high[4] = {h[j][4], h[j][5], h[j][6], h[j][7]};
                store_values(&tile[r][j * PART + q * 8], low);
                store_values(&tile[r][j * PART + q * 8 + 4], high);
            }
        }
        copy_wait<0>();
        sync_block();
#pragma unroll 1
        for (u32 c = 0; c < PART / 4; c++) {
            float own[PER_LANE][PER_WARP] = {}, own_squares = 0.0f;
#pragma unroll
            for (int j = 0; j < M; j++) {
                float h[PER_LANE][4];
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) load4(&tile[lane + i * LANES][j * PART + c * 4], h[i]);
#pragma unroll
                for (int i = 0; i < PER_LANE; i++)
                    if (warp == i) own_squares = chain(own_squares, h[i], h[i]);
#pragma unroll
                for (int o = 0; o < PER_WARP; o++) {
                    float w[4];
                    load4(&weights[warp * PER_WARP + o][j][c * 4], w);
#pragma unroll
                    for (int i = 0; i < PER_LANE; i++) own[i][o] = chain(own[i][o], h[i], w);
                }
            }
            bool start = part == 0 && c == 0;
            squares = start ? own_squares : squares + own_squares;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
#pragma unroll
                for (int o = 0; o < PER_WARP; o++) dot[i][o] = start ? own[i][o] : dot[i][o] + own[i][o];
        }
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        u32 row = first + lane + i * LANES;
        float* to = a.partials + ((u64)row * SPLITS + split) * VALUES;
        if (row >= a.rows) continue;
#pragma unroll
        for (int o = 0; o < PER_WARP; o++) to[warp * PER_WARP + o] = dot[i][o];
        if (warp == i) to[OUTPUTS] = squares;
    }
}

KERNEL(hc_finish, HcFinishArgs, FINISH_THREADS) {
    u64 item = (u64)blockIdx.x * FINISH_THREADS + threadIdx.x;
    wait_for_previous();
    if (item >= (u64)a.rows * (D / 8)) return;
    float h[M][8];
    finished_streams(a, item / (D / 8), (u32)(item % (D / 8)) * 8, h);
}

KERNEL(hc_head, HcHeadArgs, HEAD_THREADS) {
    constexpr int EACH = EACH_OF(HEAD_THREADS), WARPS = HEAD_THREADS / LANES;
    SHARED float sums[M + 1][WARPS];
    SHARED float scratch[WARPS];
    u64 i = blockIdx.x;
    if (i == 0)
        for (u32 at = threadIdx.x * 32; at < M * M * D; at += HEAD_THREADS * 32) prefetch_l2(a.w + at);
    float norm[EACH][8], own[M + 1] = {};
    if (AHEAD) load_norm<HEAD_THREADS>(a.norm, norm);
    wait_for_previous();
    Eight h[EACH][M];
    ask_streams<HEAD_THREADS>(a.h + (u64)a.wanted[i] * M * D, h);
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        u32 column = (threadIdx.x + n * HEAD_THREADS) * 8;
        if (!IS_COLUMN(HEAD_THREADS, column)) continue;
#pragma unroll
        for (int j = 0; j < M; j++) {
            float v[8];
            widen_eight(h[n][j], v);
#pragma unroll
            for (int o = 0; o < M; o++) {
                float w[8];
                load8(a.w + ((u64)o * M + j) * D + column, w);
#pragma unroll
                for (int e = 0; e < 8; e++) own[o] = fmaf(v[e], w[e], own[o]);
            }
#pragma unroll
            for (int e = 0; e < 8; e++) own[M] = fmaf(v[e], v[e], own[M]);
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
    float r = rsqrtf(own[M] / (M * D) + a.eps), pre[M], x[EACH][8];
#pragma unroll
    for (int j = 0; j < M; j++) pre[j] = sigmoid(own[j] * r * a.scale[0] + a.base[j]) + a.hc_eps;
    float squares = block_sum<HEAD_THREADS>(collapsed(h, pre, x), scratch);
    if (!AHEAD) load_norm<HEAD_THREADS>(a.norm, norm);
    store_normed<HEAD_THREADS>(x, norm, squares, a.eps, a.x + i * D);
}
