// The same for longer steps, in three launches: rows enough that each reads and writes what is between them.
//
// index_queries     q[r,h,:] = index_round(rotate(q[r,h,:])), in place; a warp per head
// index_score_long  scores of rows that see more than TOPK entries
//                   grid (tiles of LONG_KEYS entries, groups of `per` rows): a block keeps its entries in registers
//                   for all its rows: bounded by the tensor cores
// index_select      one block per row; two passes over the row's scores, out of the L2 cache

constexpr int LONG_KEYS = LONG_THREADS;

KERNEL(index_queries, IndexQueriesArgs, THREADS) {
    wait_for_previous();
    u64 i = (u64)blockIdx.x * WARPS + warp_id();
    if (i >= (u64)a.count * IH) return;
    float v[ID / 64][2];
    load_row(v, a.q + i * ID);
    rotate_row<ROPE>(v, a.turns + i / IH * (ROPE / 2));
    index_round_row(v, HADAMARD_SCALE);
    store_row(v, a.q + i * ID);
}

KERNEL(index_score_long, IndexScoreArgs, LONG_THREADS) {
    DYNAMIC_SHARED(float, weights);
    act_t* q = reinterpret_cast<act_t*>(weights + HEADS);
    u32 lane = lane_id(), first = blockIdx.x * LONG_KEYS + warp_id() * 32;
    u32 r0 = blockIdx.y * a.per, r1 = r0 + a.per < a.count ? r0 + a.per : a.count;
    wait_for_previous();
#if PUBLISHED
    uint4 key[2][2][CHUNKS];
    u32 loaded = 0xffffffffu;
#endif
    for (u32 r = r0; r < r1; r++) {
        u32 slot = a.rows[r].slot, visible = visible_to(a.rows[r]);
        if (visible <= TOPK || visible <= blockIdx.x * LONG_KEYS) continue;
        const u32* pages = a.pages + (u64)slot * a.pages_max;
        float* scores = a.scores + (u64)r * a.stride;
#if PUBLISHED
        if (loaded != slot) {
            // All that any row of this sequence in this block sees.
            u32 end = visible;
            for (u32 next = r + 1; next < r1 && a.rows[next].slot == slot; next++) end = visible_to(a.rows[next]);
            loaded = slot;
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 w = first + m * 16 + half * 8 + lane / 4;
                    const act_t* at = entry_at(a.entries, pages, w < end ? w : 0) + 8 * (lane % 4);
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        uint4 zero = {0, 0, 0, 0};
                        key[m][half][c] = w < end ? *reinterpret_cast<const uint4*>(at + 32 * c) : zero;
                    }
                }
            }
        }
#endif
        sync_block();
        constexpr int PIECES = ID * sizeof(act_t) / 16, STEP = 16 / sizeof(act_t);
        for (u32 i = threadIdx.x; i < HEADS * PIECES; i += LONG_THREADS) {
            u32 h = i / PIECES;
            bool real = h < IH;
            copy_async16_or_zero(q + h * Q_STRIDE + i % PIECES * STEP,
                                 a.q + ((u64)r * IH + (real ? h : 0)) * ID + i % PIECES * STEP, real);
        }
        copy_commit();
        load_head_weights<LONG_THREADS>(a.hw + (u64)r * IH, a.scale, weights);
        copy_wait<0>();
        sync_block();
#if PUBLISHED
        float sum[2][2];
        score_tiles<2>(key, q, weights, sum);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 w = first + m * 16 + half * 8 + lane / 4;
                if (lane % 4 == 0 && w < visible) scores[w] = sum[m][half];
            }
#else
        for (u32 w = first; w < first + 32 && w < visible; w++) {
            float score = score_entry(entry_at(a.entries, pages, w), q, weights);
            if (lane == 0) scores[w] = score;
        }
#endif
    }
}

KERNEL(index_select, IndexScoreArgs, THREADS) {
    DYNAMIC_SHARED(Select, s);
    u32 r = blockIdx.x;
    Row row = a.rows[r];
    u32 visible = visible_to(row);
    wait_for_previous();
    if (visible <= TOPK) return;
    const float* scores = a.scores + (u64)r * a.stride;
    count_digits(scores, visible, *s);
    select_row(scores, visible, a.pages + (u64)row.slot * a.pages_max, a.selected + (u64)r * TOPK, *s,
               reinterpret_cast<u32*>(s + 1));
}
