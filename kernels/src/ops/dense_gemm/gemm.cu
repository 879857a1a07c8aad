// gemm: y[r,n] = sum_k x[r,k] w[n,k] for many rows and up to 8 weights; fake_quant: x as E4M3 rounds it
//
// x      [tokens, x_stride] bf16, already fake-quantised where the weight wants it
// w      [rows, cols] bf16 or E4M3, at its row 0; scales at those of the stored matrix's row 0, row0 before this one
// y      [tokens, y_stride] f32 or bf16
// grid   one block of THREADS per TILE_TOKENS x TILE_OUTS of a segment; GROUP tiles of tokens take the weights in
//        turn, so that both stay in the L2 cache
// cost   2 * tokens * rows * cols; tensor cores (mma.sync); 4 operations of other units per pair of FP8 codes
// twin   reference.rs::matmul
//
// tile.cuh stands before this text.

#define FLAG_F32 2

template <class T, class Value>
DEVICE void store_sums(const TileSums<T>& sums, Value* y, const GemmSeg& seg, u32 tokens, u32 token0, u32 out) {
    bool whole = ((u64)y | (u64)seg.y_stride * sizeof(Value)) % 16 == 0 && out + 8 <= seg.rows;
#pragma unroll
    for (int tile = 0; tile < T::TOKEN_TILES; tile++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            u32 token = token0 + lane_token<T>(tile, odd);
            if (token >= tokens) continue;
            Value* to = y + (u64)token * seg.y_stride + out;
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = finish<T>(sums, tile, odd, i);
            if (whole) {
                store8(to, v);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (out + i < seg.rows) store(to + i, v[i]);
            }
        }
}

template <int FORMAT>
DEVICE void gemm_tile(const GemmArgs& a) {
    typedef TileShape<TILE_TOKENS, TILE_OUTS, TILE_WARPS_M, TILE_STAGES, FORMAT, false> T;
    DYNAMIC_SHARED(u8, shared);
    u32 which = 0;
    while (which + 1 < a.count && blockIdx.x >= a.segs[which + 1].first_block) which++;
    const GemmSeg& seg = a.segs[which];
    u32 tile = blockIdx.x - seg.first_block;
    u32 m_tiles = (a.tokens + TILE_TOKENS - 1) / TILE_TOKENS, n_tiles = (seg.rows + TILE_OUTS - 1) / TILE_OUTS;
    u32 m_first = tile / (GROUP * n_tiles) * GROUP;
    u32 m_count = m_tiles - m_first < GROUP ? m_tiles - m_first : GROUP;
    tile -= m_first * n_tiles;
    u32 token0 = (m_first + tile % m_count) * TILE_TOKENS, out0 = tile / m_count * TILE_OUTS;

    // Tokens and outputs past the end repeat the last one; they are not stored.
    TileSource<T> s;
    s.x = seg.x;
    s.w[0] = s.w[1] = seg.w;
    s.steps = seg.cols / STAGE_COLS;
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++) {
        u32 token = token0 + copy_x_row() + i * T::X_STEP;
        token = token < a.tokens ? token : a.tokens - 1;
        s.x_at[i] = token * (seg.x_stride / 8) + copy_x_chunk();
    }
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++) {
        u32 out = out0 + copy_w_row<T>() + i * T::W_STEP;
        out = out < seg.rows ? out : seg.rows - 1;
        s.w_at[i] = out * (seg.cols / STAGE_COLS * T::CHUNKS) + copy_w_chunk<T>();
    }
    u32 warp_out = out0 + warp_id() % T::WARPS_N * WARP_OUTS;
    u32 scale_row = (seg.row0 + (warp_out < seg.rows ? warp_out : seg.rows - 1)) / 128;
    s.scales[0] = s.scales[1] = seg.scales + (u64)scale_row * ((seg.cols + 127) / 128);
    s.scale_row = 0;

    TileSums<T> sums;
    multiply_tile<T>(sums, shared, s);
    u32 out = warp_out + lane_out<T>();
    if (seg.flags & FLAG_F32)
        store_sums<T>(sums, reinterpret_cast<float*>(seg.y), seg, a.tokens, token0, out);
    else
        store_sums<T>(sums, reinterpret_cast<u16*>(seg.y), seg, a.tokens, token0, out);
}

#if FORMAT_BF16
KERNEL(gemm_bf16, GemmArgs, THREADS) {
    wait_for_previous();
    gemm_tile<WEIGHT_BF16>(a);
}
#else
KERNEL(gemm_fp8, GemmArgs, THREADS) {
    wait_for_previous();
    gemm_tile<WEIGHT_FP8>(a);
}

// Two groups of 128 values per warp: a half-warp each, 8 values per lane.
KERNEL(fake_quant, FakeQuantArgs, QUANT_THREADS) {
    wait_for_previous();
    u32 groups = a.cols / 128;
    u64 all = (u64)a.rows * groups;
    u64 group = ((u64)blockIdx.x * (QUANT_THREADS / LANES) + warp_id()) * 2 + lane_id() / 16;
    bool real = group < all;
    u64 row = (real ? group : all - 1) / groups;
    u32 col = (u32)((real ? group : all - 1) % groups) * 128 + lane_id() % 16 * 8;
    uint4 raw = *reinterpret_cast<const uint4*>(a.x + row * a.x_stride + col);
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    float v[8], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = from_bf16((u16)(words[i / 2] >> 16 * (i % 2)));
        amax = fabsf(v[i]) > amax ? fabsf(v[i]) : amax;
    }
#pragma unroll
    for (int m = 8; m > 0; m /= 2) {
        float other = shuffle_xor(amax, m);
        amax = other > amax ? other : amax;
    }
    int e = scale_exponent(amax, FP8_INVERSE_MAX, FP8_AMAX_MIN);
    float scale = pow2(e), inverse = pow2(-e);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = e4m3_round(v[i] * inverse) * scale;
    if (real) store8(a.y + row * a.cols + col, v);
}
#endif
