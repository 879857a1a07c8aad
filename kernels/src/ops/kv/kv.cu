// kv: what attention reads of a row, from the raw projections
//
// kv_rows        y[r,:] = kv_round(rotate(norm(kv[r,:])))       kv [R, stride], y [R, HD] act
// query_heads    q[r,h,:] = rotate(q[r,h,:] * rms^-1)           in place, [R, heads, HD] act
// index_queries  q[r,h,:] = index_round(rotate(q[r,h,:]))       in place, [R, heads, ID] act
// turns          [R, ROPE/2] cosine and sine of every row's position
// grid           a warp per row or head, THREADS / 32 of them in a block
// store_rings    copies the step's newest rows into the rings; after everything that reads older rows of them
//                grid (R, 1 + compressors): a block per row and ring
// cost   each value is read and written once; memory-bound, or one latency at few rows
// twin   reference/forward.rs: attn_inputs, attn_queries

// The row or head of this warp.
DEVICE u64 warp_item() { return (u64)blockIdx.x * (THREADS / LANES) + warp_id(); }

KERNEL(kv_rows, KvRowsArgs, THREADS) {
    u64 r = warp_item();
    if (r >= a.count) return;
    float v[HD / 64][2];
    load_row(v, a.kv + r * a.stride);
    norm_row(v, a.w, a.eps);
    rotate_row<ROPE>(v, a.turns + r * (ROPE / 2));
    kv_round_row<ROPE>(v);
    store_row(v, a.y + r * HD);
}

KERNEL(query_heads, HeadsArgs, THREADS) {
    u64 i = warp_item();
    if (i >= (u64)a.count * a.heads) return;
    float v[HD / 64][2];
    load_row(v, a.q + i * HD);
    float r = inverse_rms_row(v, a.eps);
#pragma unroll
    for (int j = 0; j < HD / 64; j++) {
        v[j][0] *= r;
        v[j][1] *= r;
    }
    round_row(v);
    rotate_row<ROPE>(v, a.turns + i / a.heads * (ROPE / 2));
    store_row(v, a.q + i * HD);
}

KERNEL(index_queries, HeadsArgs, THREADS) {
    u64 i = warp_item();
    if (i >= (u64)a.count * a.heads) return;
    float v[ID / 64][2];
    load_row(v, a.q + i * ID);
    rotate_row<ROPE>(v, a.turns + i / a.heads * (ROPE / 2));
    index_round_row(v, HADAMARD_SCALE);
    store_row(v, a.q + i * ID);
}

// Rows of the step that a newer row of the same sequence replaces in a ring of `capacity` are not written: two
// blocks must not write the same place.
DEVICE bool is_newest(const Row* rows, u32 r, u32 count, u32 capacity) {
    return r + capacity >= count || rows[r + capacity].slot != rows[r].slot;
}

DEVICE void copy_row(void* to, const void* from, u32 bytes) {
    for (u32 i = threadIdx.x; i < bytes / 16; i += THREADS)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

KERNEL(store_rings, StoreRingsArgs, THREADS) {
    u32 r = blockIdx.x;
    Row row = a.rows[r];
    if (blockIdx.y == 0) {
        if (!is_newest(a.rows, r, a.count, CAPW)) return;
        u64 to = (u64)row.slot * CAPW + row.position % CAPW;
        copy_row(a.window + to * HD, a.kv + (u64)r * HD, HD * sizeof(act_t));
        return;
    }
    RingArgs ring = blockIdx.y == 1 ? a.rings[0] : a.rings[1];
    if (!is_newest(a.rows, r, a.count, ring.capacity)) return;
    u64 to = ((u64)row.slot * ring.capacity + row.position % ring.capacity) * ring.width;
    u64 from = (u64)r * ring.stride;
    copy_row(ring.ring_values + to, ring.values + from, ring.width * 4);
    copy_row(ring.ring_gates + to, ring.gates + from, ring.width * 4);
}
