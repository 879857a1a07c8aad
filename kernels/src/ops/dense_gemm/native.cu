// native_fp8: y[r,n] = sum_k x[r,k] w[n,k] for many rows and up to 8 weights; native_quant: x as E4M3 codes and scales
//
// x      [tokens, x_stride] E4M3 codes, x_scales [tokens, scale_stride] UE8M0 per 128 columns
// w      [rows, cols] E4M3 at its row 0; scales at those of the stored matrix's row 0, row0 before this one
// y      [tokens, y_stride] f32 or bf16
// grid   one block of THREADS per TILE_TOKENS x TILE_OUTS of a segment; GROUP tiles of tokens take the weights in
//        turn, so that both stay in the L2 cache
// cost   2 * tokens * rows * cols on the block-scaled tensor cores of sm_121a; per 16 mma (32 columns of a warp) 6
//        ldmatrix and nothing that widens
// twin   reference.rs::matmul; the same sums as gemm.cu in another order
//
// ptx_sm121.cuh and native_tile.cuh stand before this text.

#define FLAG_F32 2

template <class T, class Value>
DEVICE void store_sums(const TileSums<T>& sums, Value* y, const NativeSeg& seg, u32 tokens, u32 token0, u32 out) {
    bool whole = ((u64)y | (u64)seg.y_stride * sizeof(Value)) % 16 == 0 && out + 8 <= seg.rows;
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
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

KERNEL(native_fp8, NativeArgs, THREADS) {
    wait_for_previous();
    typedef TileShape<TILE_TOKENS, TILE_OUTS, TILE_STAGES, WEIGHT_FP8, false> T;
    static_assert(T::BLOCK == THREADS, "threads of a block");
    DYNAMIC_SHARED(u8, shared);
    u32 which = 0;
    while (which + 1 < a.count && blockIdx.x >= a.segs[which + 1].first_block) which++;
    const NativeSeg& seg = a.segs[which];
    u32 tile = blockIdx.x - seg.first_block;
    u32 m_tiles = (a.tokens + TILE_TOKENS - 1) / TILE_TOKENS, n_tiles = (seg.rows + TILE_OUTS - 1) / TILE_OUTS;
    u32 m_first = tile / (GROUP * n_tiles) * GROUP;
    u32 m_count = m_tiles - m_first < GROUP ? m_tiles - m_first : GROUP;
    tile -= m_first * n_tiles;
    u32 token0 = (m_first + tile % m_count) * TILE_TOKENS, out0 = tile / m_count * TILE_OUTS;

    // Tokens and outputs past the end repeat the last one; they are not stored.
    TileSource<T> s;
    s.x = seg.x;
    s.w = seg.w;
    s.steps = seg.cols / SCALE_COLS;
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++) {
        u32 token = token0 + copy_x_row<T>() + i * T::X_STEP;
        token = token < a.tokens ? token : a.tokens - 1;
        s.x_at[i] = token * (seg.x_stride / 16) + copy_x_chunk<T>();
    }
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++) {
        u32 out = out0 + weight_row<T>(copy_w_place<T>()) + i * T::W_STEP;
        out = out < seg.rows ? out : seg.rows - 1;
        s.w_at[i] = out * (seg.cols / 16) + copy_w_chunk<T>();
    }
    u32 token = token0 + warp_token<T>() + lane_scale_token(), out = out0 + warp_out<T>();
    s.x_scales = seg.x_scales + (u64)(token < a.tokens ? token : a.tokens - 1) * seg.scale_stride;
    // All of a warp's outputs are under one scale.
    u32 scale_row = (seg.row0 + (out < seg.rows ? out : seg.rows - 1)) / 128;
    s.w_scales[0] = s.w_scales[1] = seg.scales + (u64)scale_row * (seg.cols / 128);

    TileSums<T> sums;
    multiply_tile<T>(sums, shared, s);
    out += lane_out<T>();
    if (seg.flags & FLAG_F32)
        store_sums<T>(sums, reinterpret_cast<float*>(seg.y), seg, a.tokens, token0, out);
    else
        store_sums<T>(sums, reinterpret_cast<u16*>(seg.y), seg, a.tokens, token0, out);
}

// Two groups of 128 values per warp: a half-warp each, 8 values per lane.
KERNEL(native_quant, NativeQuantArgs, QUANT_THREADS) {
    wait_for_previous();
    u32 groups = a.cols / 128;
    u64 all = (u64)a.rows * groups;
    u64 group = ((u64)blockIdx.x * (QUANT_THREADS / LANES) + warp_id()) * 2 + lane_id() / 16;
    bool real = group < all;
    u64 row = (real ? group : all - 1) / groups;
    u32 of_row = (u32)((real ? group : all - 1) % groups), col = of_row * 128 + lane_id() % 16 * 8;
    float v[8], amax = 0.0f;
    load8(a.x + row * a.x_stride + col, v);
#pragma unroll
    for (int i = 0; i < 8; i++) amax = fabsf(v[i]) > amax ? fabsf(v[i]) : amax;
#pragma unroll
    for (int m = 8; m > 0; m /= 2) {
        float other = shuffle_xor(amax, m);
        amax = other > amax ? other : amax;
    }
    int e = scale_exponent(amax, FP8_INVERSE_MAX, FP8_AMAX_MIN);
    float inverse = pow2(-e);
    u32 codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) codes[i] = e4m3x2_of(v[2 * i] * inverse, v[2 * i + 1] * inverse);
    if (!real) return;
    *reinterpret_cast<uint2*>(a.codes + row * a.cols + col) =
        uint2{codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
    if (lane_id() % 16 == 0) a.scales[row * groups + of_row] = (u8)(e + 127);
}
