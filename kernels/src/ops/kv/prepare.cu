// attn_prepare: everything between the projections of a sublayer's input and its attention, in one launch
//
// query        [R, Q_RANK] act, normalised in place                       query_norm  [Q_RANK] f32
// kv           [R, HD] act, kv_round(rotate(norm(kv_raw[r,:])))           kv_raw  [R, kv_stride] act
// compressors  of entries (RATIO > 0) and of index entries (RATIO 4), see compress.cuh
// store        the rows enter the rings too: steps so short that nothing they replace is still read
// turns, entry_turns  [R, ROPE/2] cosine and sine: of the row's position; of where the row's window of RATIO begins
// grid         two warps' work per row (query, window row), THREADS / 32 of it in a block; then a block per row and
//              compressor
// cost         each value is read and written once; one latency at few rows
// twin         reference/forward.rs: attn_inputs
//
// store_rings  the newest rows of a longer step into the rings, after everything that reads older rows of them
//              grid (R, 1 + compressors): a block per row and ring

DEVICE void normalise_query(const PrepareArgs& a, u32 r) {
    // Weights come from far and do not depend on the kernel before.
    float w[Q_RANK / 64][2], v[Q_RANK / 64][2];
    load_row(w, a.query_norm);
    wait_for_previous();
    act_t* row = a.query + (u64)r * Q_RANK;
    load_row(v, row);
    norm_row(v, w, a.eps);
    store_row(v, row);
}

DEVICE void make_window_row(const PrepareArgs& a, u32 r) {
    float w[HD / 64][2], v[HD / 64][2];
    load_row(w, a.kv_norm);
    Row row = a.rows[r];
    wait_for_previous();
    load_row(v, a.kv_raw + (u64)r * a.kv_stride);
    norm_row(v, w, a.eps);
    rotate_row<ROPE>(v, a.turns + (u64)r * (ROPE / 2));
    kv_round_row<ROPE>(v);
    store_row(v, a.kv + (u64)r * HD);
    if (a.store) store_row(v, a.window + ((u64)row.slot * CAPW + row.position % CAPW) * HD);
}

KERNEL(attn_prepare, PrepareArgs, THREADS) {
    u32 rows_blocks = (2 * a.count + WARPS - 1) / WARPS;
    if (blockIdx.x < rows_blocks) {
        u32 item = blockIdx.x * WARPS + warp_id();
        if (item >= 2 * a.count) return;
        if (item % 2 == 0) normalise_query(a, item / 2);
        else make_window_row(a, item / 2);
        return;
    }
#if RATIO != 0
    SHARED float4 pooled[POOL_FLOATS / 4];
    u32 item = blockIdx.x - rows_blocks;
#if RATIO == 4
    if (item >= a.count) {
        compress<ID, true>(a, a.compressors[1], item - a.count, reinterpret_cast<float*>(pooled));
        return;
    }
#endif
    compress<HD, false>(a, a.compressors[0], item, reinterpret_cast<float*>(pooled));
#endif
}

// Rows of the step that a newer row of the same sequence replaces in a ring of `capacity` are not written: two
// blocks must not write the same place.
DEVICE bool is_newest(const Row* rows, u32 r, u32 count, u32 capacity) {
    return r + capacity >= count || rows[r + capacity].slot != rows[r].slot;
}

KERNEL(store_rings, PrepareArgs, THREADS) {
    u32 r = blockIdx.x;
    Row row = a.rows[r];
    wait_for_previous();
    if (blockIdx.y == 0) {
        if (!is_newest(a.rows, r, a.count, CAPW)) return;
        u64 to = (u64)row.slot * CAPW + row.position % CAPW;
        copy_row(a.window + to * HD, a.kv + (u64)r * HD, HD * sizeof(act_t));
        return;
    }
#if RATIO != 0
    if (!is_newest(a.rows, r, a.count, CAPC)) return;
    if (blockIdx.y == 1) store_projections<HD>(a.compressors[0], row, r);
#if RATIO == 4
    else store_projections<ID>(a.compressors[1], row, r);
#endif
#endif
}
