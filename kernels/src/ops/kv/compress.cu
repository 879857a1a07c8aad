// compress: rows that close a window of RATIO positions write its entry
//
// values, gates   [R, stride] f32, of this step; older positions from the rings [slots, CAPC, CW] f32, position p
//                 at p % CAPC. CW = 2 * WIDTH for ratio 4 (the first half joins the next window), else WIDTH
// ape             [RATIO, CW] f32, added to gates      norm  [WIDTH] f32
// turns           [R, ROPE/2], of the position where the row's window begins
// entries         paged: entry w at ((u64)page * EPP + w % EPP) * WIDTH, page = pages[slot * pages_max + w / EPP]
// grid            one block of THREADS per row; a thread has a channel
// cost            2 * RATIO * CW * 4 bytes per closed window, gates twice for ratio 128; rare
// twin            ops/compressor/reference.rs::pool, reference.rs::compress

constexpr int CW = RATIO == 4 ? 2 * WIDTH : WIDTH;
// Rows that are pooled.
constexpr int POOLED = RATIO == 4 ? 8 : RATIO;

struct Pool {
    const float *step_values, *step_gates, *ring_values, *ring_gates;
    u32 start, stride;
};

// Where a position's projections are.
DEVICE void find(const Pool& pool, u32 position, const float*& values, const float*& gates) {
    bool in_step = position >= pool.start;
    u64 at = in_step ? (u64)(position - pool.start) * pool.stride : (u64)(position % CAPC) * CW;
    values = (in_step ? pool.step_values : pool.ring_values) + at;
    gates = (in_step ? pool.step_gates : pool.ring_gates) + at;
}

KERNEL(compress, CompressArgs, THREADS) {
    SHARED float2 pooled_pairs[WIDTH / 2];
    float* pooled = reinterpret_cast<float*>(pooled_pairs);
    u32 r = blockIdx.x;
    Row row = a.rows[r];
    u32 end = row.position + 1;
    if (end % RATIO != 0) return;
    u64 ring = (u64)row.slot * CAPC * CW, step = (u64)row.first * a.stride;
    Pool pool{a.values + step, a.gates + step, a.ring_values + ring, a.ring_gates + ring, row.start, a.stride};
    // Ratio 4: four rows of the previous window come first. The first window has none.
    bool has_previous = end > RATIO;
    u32 from = end - RATIO;
    for (u32 c = threadIdx.x; c < WIDTH; c += THREADS) {
        float max = -3.4e38f, sum = 0.0f, out = 0.0f;
        auto row_of = [&](int i, const float*& values, const float*& gates, u32& bias) {
            u32 at = RATIO == 4 && i >= 4 ? WIDTH + c : c;
            find(pool, RATIO == 4 ? from - 4 + i : from + i, values, gates);
            values += at;
            gates += at;
            bias = (u32)(RATIO == 4 ? i % 4 : i) * CW + at;
        };
        if (RATIO == 4) {
            float v[POOLED], g[POOLED];
#pragma unroll
            for (int i = 0; i < POOLED; i++) {
                if (i < 4 && !has_previous) continue;
                const float *values, *gates;
                u32 bias;
                row_of(i, values, gates, bias);
                v[i] = *values;
                g[i] = *gates + a.ape[bias];
                max = fmaxf(max, g[i]);
            }
#pragma unroll
            for (int i = 0; i < POOLED; i++) {
                if (i < 4 && !has_previous) continue;
                float weight = expf(g[i] - max);
                sum += weight;
                out += weight * v[i];
            }
        } else {
#pragma unroll 8
            for (int i = 0; i < POOLED; i++) {
                const float *values, *gates;
                u32 bias;
                row_of(i, values, gates, bias);
                max = fmaxf(max, *gates + a.ape[bias]);
            }
#pragma unroll 8
            for (int i = 0; i < POOLED; i++) {
                const float *values, *gates;
                u32 bias;
                row_of(i, values, gates, bias);
                float weight = expf(*gates + a.ape[bias] - max);
                sum += weight;
                out += weight * *values;
            }
        }
        pooled[c] = out / sum;
    }
    sync_block();
    if (warp_id() != 0) return;
    float v[WIDTH / 64][2];
    load_row(v, pooled);
    round_row(v);
    norm_row(v, a.norm, a.eps);
    rotate_row<ROPE>(v, a.turns + (u64)r * (ROPE / 2));
#if INDEX
    index_round_row(v, HADAMARD_SCALE);
#else
    kv_round_row<ROPE>(v);
#endif
    u32 w = row.position / RATIO;
    u64 page = a.pages[(u64)row.slot * a.pages_max + w / EPP];
    store_row(v, a.entries + (page * EPP + w % EPP) * WIDTH);
}
