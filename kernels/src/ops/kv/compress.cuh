// compress: rows that close a window of RATIO positions write its entry
//
// values, gates   [R, stride] f32, of this step; older positions from the rings [slots, CAPC, columns] f32, position
//                 p at p % CAPC. columns = 2 * WIDTH for ratio 4 (the first half joins the next window), else WIDTH
// ape             [RATIO, columns] f32, added to gates      norm  [WIDTH] f32
// entries         paged: entry w at ((u64)page * EPP + w % EPP) * WIDTH, page = pages[slot * pages_max + w / EPP]
// cost            2 * RATIO * columns * 4 bytes per closed window; rare
// twin            ops/compressor/reference.rs::pool, reference.rs::compress
#include "ptx.cuh"

constexpr int WARPS = THREADS / LANES;

DEVICE void copy_row(void* to, const void* from, u32 bytes) {
    for (u32 i = threadIdx.x; i < bytes / 16; i += THREADS)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

#if RATIO != 0
DEVICE constexpr int columns_of(int width) { return RATIO == 4 ? 2 * width : width; }
// Long windows: threads that share four channels, each with a run of the positions.
DEVICE constexpr int sharing_of(int width) { return 4 * THREADS / width; }
// Shared memory of a block: an entry, or every run's largest gate, sum of weights and sum of weighted values.
constexpr int POOL_FLOATS = RATIO == 4 ? HD : 3 * 4 * THREADS;

template <int WIDTH>
DEVICE void store_projections(const CompressArgs& c, const Row& row, u32 r) {
    constexpr int COLUMNS = columns_of(WIDTH);
    u64 to = ((u64)row.slot * CAPC + row.position % CAPC) * COLUMNS, from = (u64)r * c.stride;
    copy_row(c.ring_values + to, c.values + from, COLUMNS * 4);
    copy_row(c.ring_gates + to, c.gates + from, COLUMNS * 4);
}

// Where a position's projections are: in the step, or in the ring.
template <int COLUMNS>
DEVICE void find(const CompressArgs& c, const Row& row, u32 position, const float*& values, const float*& gates) {
    bool in_step = position >= row.start;
    u64 step = (u64)(row.first + position - row.start) * c.stride;
    u64 ring = ((u64)row.slot * CAPC + position % CAPC) * COLUMNS;
    values = in_step ? c.values + step : c.ring_values + ring;
    gates = in_step ? c.gates + step : c.ring_gates + ring;
}

#if RATIO == 4
// Eight rows: the first halves of the previous window's (the first window has none), the second halves of this one's.
template <int WIDTH>
DEVICE void pool(const CompressArgs& c, const Row& row, float* pooled) {
    constexpr int COLUMNS = columns_of(WIDTH);
    u32 end = row.position + 1;
    bool has_previous = end > 4;
    for (u32 at = 2 * threadIdx.x; at < WIDTH; at += 2 * THREADS) {
        float2 v[8], g[8], bias[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < 4 && !has_previous) continue;
            const float *values, *gates;
            find<COLUMNS>(c, row, end - 8 + i, values, gates);
            u32 column = i < 4 ? at : WIDTH + at;
            v[i] = load_pair(values + column);
            g[i] = load_pair(gates + column);
            bias[i] = load_pair(c.ape + i % 4 * COLUMNS + column);
        }
        float2 max = {-3.4e38f, -3.4e38f}, sum = {0.0f, 0.0f}, out = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < 4 && !has_previous) continue;
            g[i].x += bias[i].x;
            g[i].y += bias[i].y;
            max.x = fmaxf(max.x, g[i].x);
            max.y = fmaxf(max.y, g[i].y);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < 4 && !has_previous) continue;
            float x = expf(g[i].x - max.x), y = expf(g[i].y - max.y);
            sum.x += x;
            sum.y += y;
            out.x += x * v[i].x;
            out.y += y * v[i].y;
        }
        pooled[at] = out.x / sum.x;
        pooled[at + 1] = out.y / sum.y;
    }
}
#else
// Positions of a window that a thread loads at once.
constexpr int AT_ONCE = 4;

// RATIO rows, in runs: a softmax over each, then over the runs in their order.
template <int WIDTH>
DEVICE void pool(const CompressArgs& c, const Row& row, float* pooled) {
    constexpr int RUNS = sharing_of(WIDTH), RUN = RATIO / RUNS;
    static_assert(RATIO % (RUNS * AT_ONCE) == 0, "whole runs");
    u32 from = row.position + 1 - RATIO, at = threadIdx.x % (WIDTH / 4) * 4, run = threadIdx.x / (WIDTH / 4);
    float max[4], sum[4], out[4];
#pragma unroll
    for (int k = 0; k < 4; k++) max[k] = -3.4e38f, sum[k] = out[k] = 0.0f;
#pragma unroll 1
    for (u32 first = run * RUN; first < (run + 1) * RUN; first += AT_ONCE) {
        float v[AT_ONCE][4], g[AT_ONCE][4], bias[AT_ONCE][4];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float *values, *gates;
            find<WIDTH>(c, row, from + first + i, values, gates);
            load4(values + at, v[i]);
            load4(gates + at, g[i]);
            load4(c.ape + (first + i) * WIDTH + at, bias[i]);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float most = max[k];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                g[i][k] += bias[i][k];
                most = fmaxf(most, g[i][k]);
            }
            float factor = expf(max[k] - most);
            max[k] = most;
            sum[k] *= factor;
            out[k] *= factor;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                float weight = expf(g[i][k] - most);
                sum[k] += weight;
                out[k] += weight * v[i][k];
            }
        }
    }
    float* own = pooled + run * 3 * WIDTH + at;
    store4(own, max);
    store4(own + WIDTH, sum);
    store4(own + 2 * WIDTH, out);
    sync_block();
    // The entry takes the place of the first run's largest gates: a channel's numbers are one thread's.
    for (u32 channel = threadIdx.x; channel < WIDTH; channel += THREADS) {
        const float* of = pooled + channel;
        float most = of[0];
#pragma unroll
        for (int i = 1; i < RUNS; i++) most = fmaxf(most, of[i * 3 * WIDTH]);
        float all = 0.0f, value = 0.0f;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            float factor = expf(of[i * 3 * WIDTH] - most);
            all += factor * of[i * 3 * WIDTH + WIDTH];
            value += factor * of[i * 3 * WIDTH + 2 * WIDTH];
        }
        pooled[channel] = value / all;
    }
}
#endif

template <int WIDTH, bool INDEX>
DEVICE void compress(const PrepareArgs& a, const CompressArgs& c, u32 r, float* pooled) {
    constexpr int COLUMNS = columns_of(WIDTH);
    Row row = a.rows[r];
    bool closes = (row.position + 1) % RATIO == 0;
    // The biases come from far and do not depend on the kernel before.
    if (closes)
        for (u32 i = threadIdx.x; i < RATIO * COLUMNS / 32; i += THREADS) prefetch_l2(c.ape + 32 * i);
    float norm[WIDTH / 64][2];
    if (closes) load_row(norm, c.norm);
    wait_for_previous();
    if (a.store) store_projections<WIDTH>(c, row, r);
    if (!closes) return;
    pool<WIDTH>(c, row, pooled);
    sync_block();
    if (warp_id() != 0) return;
    float v[WIDTH / 64][2];
    load_row(v, pooled);
    round_row(v);
    norm_row(v, norm, a.eps);
    rotate_row<ROPE>(v, a.entry_turns + (u64)r * (ROPE / 2));
    if constexpr (INDEX) index_round_row(v, HADAMARD_SCALE);
    else kv_round_row<ROPE>(v);
    u32 w = row.position / RATIO;
    u64 page = a.pages[(u64)row.slot * a.pages_max + w / EPP];
    store_row(v, c.entries + (page * EPP + w % EPP) * WIDTH);
}
#endif
