// index_score: the entries that each row of a short step attends to: queries finished, entries scored, the best chosen
//
// scores[r,w] = sum_h weight[r,h] * relu(q'[r,h,:] . entry_w), weight = round(round(hw) * scale),
// q' = index_round(rotate(q[r,h,:]))
//
// q        [R, IH, ID] act, as projected    hw  [R, IH] act, raw head weights     turns  [R, ROPE/2]
// entries  paged: entry w at ((u64)page * EPP + w % EPP) * ID, page = pages[slot * pages_max + w / EPP]
// scores   [R, stride] f32, bins [R, BINS] u32 counts of their first digits, arrived [R] u32: between the blocks of a
//          row; bins and arrived are zeros before and after
// selected [R, TOPK] u32, see select.cuh; rows that see no more than TOPK entries have no list
// grid     (blocks, R): a block has every blocks-th tile of KEYS entries. The last to arrive of a row selects.
// smem     see mod.rs
// cost     every visible entry is read once a row; 2 * IH * ID flops each
// twin     reference.rs::scores, top_k

constexpr int KEYS = 16 * WARPS;
// Tiles of a block that are asked for before its queries are there.
constexpr u32 TILES_AHEAD = 2;

struct Score {
    Select select;
    float weights[HEADS];
};

DEVICE void finish_queries(const IndexScoreArgs& a, u32 r, act_t* q) {
    constexpr int PIECES = ID * sizeof(act_t) / 16, STEP = 16 / sizeof(act_t);
    for (u32 i = threadIdx.x; i < IH * PIECES; i += THREADS)
        copy_async16(q + i / PIECES * Q_STRIDE + i % PIECES * STEP, a.q + (u64)r * IH * ID + i * STEP);
    copy_commit();
    // Heads that are not there score nothing.
    for (u32 i = IH * ID + threadIdx.x; i < HEADS * ID; i += THREADS) store(q + i / ID * Q_STRIDE + i % ID, 0.0f);
    const float2* turns = a.turns + (u64)r * (ROPE / 2);
    copy_wait<0>();
    sync_block();
#pragma unroll 2
    for (u32 h = warp_id(); h < IH; h += WARPS) {
        float v[ID / 64][2];
        load_row(v, q + h * Q_STRIDE);
        rotate_row<ROPE>(v, turns);
        index_round_row(v, HADAMARD_SCALE);
        store_row(v, q + h * Q_STRIDE);
    }
}

KERNEL(index_score, IndexScoreArgs, THREADS) {
    DYNAMIC_SHARED(Score, s);
    act_t* q = reinterpret_cast<act_t*>(s + 1);
    u32 r = blockIdx.y, lane = lane_id();
    // Rows and pages were written before the step.
    Row row = a.rows[r];
    u32 visible = visible_to(row), tiles = (visible + KEYS - 1) / KEYS;
    const u32* pages = a.pages + (u64)row.slot * a.pages_max;
    // Entries come from far: the first of them, while the kernel before still reads its weights. More would push one
    // another out of the L2 cache.
    constexpr u32 LINES = (ID * sizeof(act_t) + 127) / 128;
    u32 ahead = blockIdx.x + TILES_AHEAD * gridDim.x;
    if (visible > TOPK)
        for (u32 t = blockIdx.x; t < tiles && t < ahead; t += gridDim.x)
            for (u32 i = threadIdx.x; i < KEYS * LINES; i += THREADS) {
                u32 w = t * KEYS + i / LINES;
                if (w < visible) prefetch_l2(entry_at(a.entries, pages, w) + i % LINES * (128 / sizeof(act_t)));
            }
    clear(s->select.bins, BINS);
    wait_for_previous();
    if (visible <= TOPK || blockIdx.x >= tiles) return;
    float* scores = a.scores + (u64)r * a.stride;
    auto put = [&](u32 w, float score) {
        if (w >= visible) return;
        scores[w] = score;
        atomic_add(&s->select.bins[order_of(score) >> 21], 1);
    };
#if PUBLISHED
    auto load_keys = [&](u32 tile, uint4 (&key)[1][2][CHUNKS]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 w = tile * KEYS + warp_id() * 16 + half * 8 + lane / 4;
            const act_t* at = entry_at(a.entries, pages, w < visible ? w : 0) + 8 * (lane % 4);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) key[0][half][c] = *reinterpret_cast<const uint4*>(at + 32 * c);
        }
    };
    uint4 key[1][2][CHUNKS];
    load_keys(blockIdx.x, key);
    load_head_weights<THREADS>(a.hw + (u64)r * IH, a.scale, s->weights);
    finish_queries(a, r, q);
    sync_block();
#pragma unroll 1
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        uint4 next[1][2][CHUNKS];
        load_keys(tile + gridDim.x, next);
        float sum[1][2];
        score_tiles<1>(key, q, s->weights, sum);
        u32 half = lane % 4;
        if (half < 2) put(tile * KEYS + warp_id() * 16 + half * 8 + lane / 4, half ? sum[0][1] : sum[0][0]);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) key[0][half][c] = next[0][half][c];
    }
#else
    load_head_weights<THREADS>(a.hw + (u64)r * IH, a.scale, s->weights);
    finish_queries(a, r, q);
    sync_block();
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x)
#pragma unroll 1
        for (u32 i = 0; i < 16; i++) {
            u32 w = tile * KEYS + warp_id() * 16 + i;
            if (w >= visible) break;
            float score = score_entry(entry_at(a.entries, pages, w), q, s->weights);
            if (lane == 0) put(w, score);
        }
#endif
    sync_block();
    u32* bins = a.bins + (u64)r * BINS;
    for (u32 b = threadIdx.x; b < BINS; b += THREADS)
        if (s->select.bins[b]) atomic_add(&bins[b], s->select.bins[b]);
    fence_device();
    sync_block();
    if (threadIdx.x == 0) {
        u32 blocks = tiles < gridDim.x ? tiles : gridDim.x;
        s->select.last = atomic_add(&a.arrived[r], 1) + 1 == blocks;
        if (s->select.last) a.arrived[r] = 0;
    }
    sync_block();
    if (!s->select.last) return;
    fence_device();
    for (u32 b = threadIdx.x; b < BINS; b += THREADS) {
        s->select.bins[b] = bins[b];
        bins[b] = 0;
    }
    sync_block();
    // The queries have done their work.
    select_row(scores, visible, pages, a.selected + (u64)r * TOPK, s->select, reinterpret_cast<u32*>(q));
}
