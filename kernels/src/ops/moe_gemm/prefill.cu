// Experts for many rows: pairs (row, slot) sorted by expert, then tiles of tokens of one expert on the tensor cores.
//
// moe_count, moe_place   chosen [rows, TOP_K] -> pairs (row * TOP_K + slot, by expert, then row), tiles {expert, first
//                        pair, tokens, 0}, at most TILE_TOKENS tokens each, and their number. One block per expert.
// moe_up                 mid[r, slot] = fp8(bf16(swiglu(bf16(w1 x), bf16(w3 x)) * weight)), rounded as w2 wants it.
//                        One block per 128 of F and tile; gate and up rows of W alternate by 32, so that a lane
//                        has both of an output. moe_up_shared: the shared expert, slot TOP_K, weight 1.
// moe_down               out[r, slot] = w2 mid[r, slot], f32, outputs first_out .. first_out + outs
// moe_sum                y[r] = sum of out[r, slot], slots ascending: the routed ascending by expert, then the shared
//
// x [rows, D], mid [rows, TOP_K + 1, F] bf16     out [rows, TOP_K + 1, outs], y [rows, D] f32
// w1, w3 [E, F, D], w2 [E, D, F] E2M1, `stride` bytes apart, scales `scales_at` bytes behind a matrix's start
// twin   reference/forward.rs::experts
//
// dense_gemm/tile.cuh stands before this text.

#define SLOTS (TOP_K + 1)

KERNEL(moe_count, MoeSortArgs, SORT_THREADS) {
    wait_for_previous();
    SHARED float scratch[SORT_THREADS / LANES];
    u32 mine = 0;
#pragma unroll 8
    for (u32 i = threadIdx.x; i < a.pair_count; i += SORT_THREADS) mine += a.chosen[i] == blockIdx.x;
    // Exact: fewer than 2^24 pairs.
    float sum = block_sum<SORT_THREADS>((float)mine, scratch);
    if (threadIdx.x == 0) a.counts[blockIdx.x] = (u32)sum;
}

KERNEL(moe_place, MoeSortArgs, SORT_THREADS) {
    wait_for_previous();
    constexpr u32 WARPS = SORT_THREADS / LANES;
    SHARED float scratch[WARPS];
    SHARED u32 of_warp[WARPS];
    u32 expert = blockIdx.x, before = 0, tiles_before = 0;
    for (u32 e = threadIdx.x; e < expert; e += SORT_THREADS) {
        before += a.counts[e];
        tiles_before += (a.counts[e] + TILE_TOKENS - 1) / TILE_TOKENS;
    }
    u32 first = (u32)block_sum<SORT_THREADS>((float)before, scratch);
    u32 first_tile = (u32)block_sum<SORT_THREADS>((float)tiles_before, scratch);
    u32 count = a.counts[expert], tiles = (count + TILE_TOKENS - 1) / TILE_TOKENS;
    for (u32 t = threadIdx.x; t < tiles; t += SORT_THREADS) {
        u32* tile = a.tiles + (u64)(first_tile + t) * 4;
        tile[0] = expert;
        tile[1] = first + t * TILE_TOKENS;
        tile[2] = count - t * TILE_TOKENS < TILE_TOKENS ? count - t * TILE_TOKENS : TILE_TOKENS;
        tile[3] = 0;
    }
    if (expert == gridDim.x - 1 && threadIdx.x == 0) a.tile_count[0] = first_tile + tiles;

    // Every warp a run of pairs: counts first, then each writes behind the warps before it.
    u32 each = (a.pair_count + SORT_THREADS - 1) / SORT_THREADS * LANES, start = warp_id() * each, found = 0;
#pragma unroll 8
    for (u32 i = 0; i < each; i += LANES) {
        u32 p = start + i + lane_id();
        found += count_bits(ballot(p < a.pair_count && a.chosen[p] == expert));
    }
    if (lane_id() == 0) of_warp[warp_id()] = found;
    sync_block();
    u32 at = first;
    for (u32 w = 0; w < warp_id(); w++) at += of_warp[w];
#pragma unroll 8
    for (u32 i = 0; i < each; i += LANES) {
        u32 p = start + i + lane_id();
        bool mine = p < a.pair_count && a.chosen[p] == expert;
        u32 all = ballot(mine);
        if (mine) a.pairs[at + count_bits(all & ((1u << lane_id()) - 1))] = p;
        at += count_bits(all);
    }
}

// Row of mid and out of a pair.
DEVICE u32 slot_row(u32 pair) { return pair + pair / TOP_K; }

template <int FORMAT>
struct UpShape
    : TileShape<TILE_TOKENS, TILE_OUTS, TILE_WARPS_M, FORMAT == WEIGHT_FP4 ? TILE_STAGES : SHARED_STAGES, FORMAT, true> {
};

// Tokens `first` .. `first + count` of the pair list (of all rows without one) times 128 outputs of w1 and of w3.
template <int FORMAT>
DEVICE void up_tile(const MoeUpArgs& a, u8* shared, const u8* w1, const u8* w3, const u32* pairs, u32 first, u32 count) {
    typedef UpShape<FORMAT> T;
    constexpr u32 BLOCK_F = TILE_OUTS / 2;
    static_assert(BLOCK_F == 128, "a block rounds whole groups of 128");
    TileSource<T> s;
    u32 f0 = blockIdx.x * BLOCK_F;
    s.x = a.x;
    s.steps = D / STAGE_COLS;
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++) {
        u32 t = copy_x_row() + i * T::X_STEP;
        t = first + (t < count ? t : count - 1);
        s.x_at[i] = (pairs ? pairs[t] / TOP_K : t) * (D / 8) + copy_x_chunk();
    }
    // 32 rows of w1, 32 of w3, and so on.
    u32 row = copy_w_row<T>();
    s.w[0] = row / 32 % 2 ? w3 : w1;
    s.w[1] = (row + T::W_STEP) / 32 % 2 ? w3 : w1;
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++) {
        u32 r = row + i * T::W_STEP;
        s.w_at[i] = (f0 + r / 64 * 32 + r % 32) * (D / STAGE_COLS * T::CHUNKS) + copy_w_chunk<T>();
    }
    u32 warp_n = warp_id() % T::WARPS_N, f = f0 + warp_n * 32 + lane_out<T>();
    u64 scale_row = FORMAT == WEIGHT_FP4 ? (u64)f * (D / 32) : (u64)(f / 128) * ((D + 127) / 128);
    s.scales[0] = w1 + a.scales_at + scale_row;
    s.scales[1] = w3 + a.scales_at + scale_row;
    s.scale_row = D / 32;

    TileSums<T> sums;
    multiply_tile<T>(sums, shared, s);

    // The largest of every token's 128 outputs: over a lane's 4, the lanes with the same tokens, and the warps.
    float* largest = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int j = 0; j < T::TOKEN_TILES; j++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            u32 t = lane_token<T>(j, odd);
            float weight = pairs && t < count ? a.weights[pairs[first + t]] : 1.0f;
            float amax = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float gate = round_act(finish<T>(sums, j, odd, i)), up = round_act(finish<T>(sums, j, odd, 4 + i));
                if (a.limit > 0.0f) {
                    gate = gate < a.limit ? gate : a.limit;
                    up = up < -a.limit ? -a.limit : up > a.limit ? a.limit : up;
                }
                float v = round_act(gate / (1.0f + expf(-gate)) * up * weight);
                sums.v[i / 2][j][i % 2 * 2 + odd] = v;
                amax = fabsf(v) > amax ? fabsf(v) : amax;
            }
#pragma unroll
            for (int d = 4; d < LANES; d *= 2) {
                float other = shuffle_xor(amax, d);
                amax = other > amax ? other : amax;
            }
            if (lane_id() < 4) largest[warp_n * TILE_TOKENS + t] = amax;
        }
    sync_block();
#pragma unroll
    for (int j = 0; j < T::TOKEN_TILES; j++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            u32 t = lane_token<T>(j, odd);
            if (t >= count) continue;
            float amax = largest[t];
#pragma unroll
            for (int w = 1; w < T::WARPS_N; w++) {
                float other = largest[w * TILE_TOKENS + t];
                amax = other > amax ? other : amax;
            }
            int e = scale_exponent(amax, FP8_INVERSE_MAX, FP8_AMAX_MIN);
            float scale = pow2(e), inverse = pow2(-e), v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = e4m3_round(sums.v[i / 2][j][i % 2 * 2 + odd] * inverse) * scale;
            u64 to = pairs ? slot_row(pairs[first + t]) : (u64)(first + t) * SLOTS + TOP_K;
            *reinterpret_cast<uint2*>(a.mid + to * F + f) = uint2{pack_bf16x2(v[0], v[1]), pack_bf16x2(v[2], v[3])};
        }
}

KERNEL(moe_up, MoeUpArgs, THREADS) {
    wait_for_previous();
    DYNAMIC_SHARED(u8, shared);
    if (blockIdx.y >= a.tile_count[0]) return;
    const u32* tile = a.tiles + (u64)blockIdx.y * 4;
    u64 at = tile[0] * a.stride;
    up_tile<WEIGHT_FP4>(a, shared, a.w1 + at, a.w3 + at, a.pairs, tile[1], tile[2]);
}

KERNEL(moe_up_shared, MoeUpArgs, THREADS) {
    wait_for_previous();
    DYNAMIC_SHARED(u8, shared);
    u32 first = blockIdx.y * TILE_TOKENS;
    u32 count = a.rows - first < TILE_TOKENS ? a.rows - first : TILE_TOKENS;
    up_tile<WEIGHT_FP8>(a, shared, a.w1, a.w3, nullptr, first, count);
}

KERNEL(moe_down, MoeDownArgs, THREADS) {
    wait_for_previous();
    typedef TileShape<TILE_TOKENS, TILE_OUTS, TILE_WARPS_M, TILE_STAGES, WEIGHT_FP4, false> T;
    DYNAMIC_SHARED(u8, shared);
    if (blockIdx.y >= a.tile_count[0]) return;
    const u32* tile = a.tiles + (u64)blockIdx.y * 4;
    const u8* w = a.w2 + tile[0] * a.stride;
    const u32* pairs = a.pairs + tile[1];
    u32 count = tile[2], out0 = blockIdx.x * TILE_OUTS;
    TileSource<T> s;
    s.x = a.mid;
    s.w[0] = s.w[1] = w;
    s.steps = F / STAGE_COLS;
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++) {
        u32 t = copy_x_row() + i * T::X_STEP;
        s.x_at[i] = slot_row(pairs[t < count ? t : count - 1]) * (F / 8) + copy_x_chunk();
    }
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++) {
        u32 out = out0 + copy_w_row<T>() + i * T::W_STEP;
        out = a.first_out + (out < a.outs ? out : a.outs - 1);
        s.w_at[i] = out * (F / STAGE_COLS * T::CHUNKS) + copy_w_chunk<T>();
    }
    // A warp's 64 outputs are there or not: outs is a multiple of 64.
    u32 out = out0 + warp_id() % T::WARPS_N * WARP_OUTS + lane_out<T>();
    const u8* scales = w + a.scales_at + (u64)(a.first_out + (out < a.outs ? out : 0)) * (F / 32);
    s.scales[0] = scales;
    s.scales[1] = scales + 4 * (F / 32);
    s.scale_row = F / 32;

    TileSums<T> sums;
    multiply_tile<T>(sums, shared, s);
    if (out >= a.outs) return;
#pragma unroll
    for (int j = 0; j < T::TOKEN_TILES; j++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            u32 t = lane_token<T>(j, odd);
            if (t >= count) continue;
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = finish<T>(sums, j, odd, i);
            store8(a.out + (u64)slot_row(pairs[t]) * a.outs + out, v);
        }
}

KERNEL(moe_sum, MoeSumArgs, SORT_THREADS) {
    wait_for_previous();
    u32 quarters = a.outs / 4;
    u64 i = (u64)blockIdx.x * SORT_THREADS + threadIdx.x;
    if (i >= (u64)a.rows * quarters) return;
    u64 row = i / quarters;
    u32 col = (u32)(i % quarters) * 4;
    const float4* from = reinterpret_cast<const float4*>(a.out + row * SLOTS * a.outs + col);
    float4 sum = from[0];
#pragma unroll
    for (u32 slot = 1; slot < SLOTS; slot++) {
        float4 v = from[(u64)slot * quarters];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    *reinterpret_cast<float4*>(a.y + row * D + a.first_out + col) = sum;
}
