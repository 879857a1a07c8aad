// Experts for many rows on the block-scaled tensor cores of sm_121a: what prefill.cu does, from and to codes.
//
// native_moe_up     mid[r, slot] = quantise(bf16(swiglu(bf16(w1 x), bf16(w3 x)) * weight)), in groups of 128. One block
//                   per 128 of F and tile; gate and up rows of W alternate by 32, so that a lane has both of an output.
//                   native_moe_up_shared: the shared expert, slot TOP_K, weight 1.
// native_moe_down   out[r, slot] = w2 mid[r, slot], f32, outputs first_out .. first_out + outs
//
// x [rows, D], mid [rows, TOP_K + 1, F] E4M3 codes; x_scales, mid_scales UE8M0 bytes, one per 128 of them
// w1, w3 [E, F, D], w2 [E, D, F] E2M1, `stride` bytes apart, scales `scales_at` bytes behind a matrix's start
// tiles  {expert, first pair, tokens, 0}, made by moe_place of prefill.cu for the same TILE_TOKENS
// cost   per 16 mma (32 columns of a warp) 2 ldmatrix, 4 loads of 8 bytes a lane, 48 operations that unpack
// twin   reference/forward.rs::experts
//
// ptx_sm121.cuh and dense_gemm/native_tile.cuh stand before this text.

#define SLOTS (TOP_K + 1)

// Row of mid and out of a pair.
DEVICE u32 slot_row(u32 pair) { return pair + pair / TOP_K; }

// Tokens `first` .. `first + count` of the pair list (of all rows without one) times 128 outputs of w1 and of w3.
template <int FORMAT, int STAGES>
DEVICE void up_tile(const NativeUpArgs& a, u8* shared, const u8* w1, const u8* w3, const u32* pairs, u32 first,
                    u32 count) {
    typedef TileShape<TILE_TOKENS, TILE_OUTS, STAGES, FORMAT, true> T;
    static_assert(T::BLOCK == THREADS, "threads of a block");
    constexpr u32 BLOCK_F = TILE_OUTS / 2;
    static_assert(BLOCK_F == 128, "a block rounds whole groups of 128");
    TileSource<T> s;
    u32 f0 = blockIdx.x * BLOCK_F;
    s.x = a.x;
    s.steps = D / SCALE_COLS;
    auto row_of = [&](u32 t) {
        t = first + (t < count ? t : count - 1);
        return pairs ? pairs[t] / TOP_K : t;
    };
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++)
        s.x_at[i] = row_of(copy_x_row<T>() + i * T::X_STEP) * (D / 16) + copy_x_chunk<T>();
    // 32 rows of w1, 32 of w3, and so on: this thread's are all of one of them.
    u32 row = weight_row<T>(copy_w_place<T>());
    s.w = row / 32 % 2 ? w3 : w1;
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++) {
        u32 r = row + i * T::W_STEP;
        s.w_at[i] = (f0 + r / 64 * 32 + r % 32) * (D / STAGE_COLS * T::CHUNKS) + copy_w_chunk<T>();
    }
    u32 warp_n = warp_id() % T::WARPS_N, warp_f = f0 + warp_n * 32;
    s.x_scales = a.x_scales + (u64)row_of(warp_token<T>() + lane_scale_token()) * (D / 128);
    u64 scale_row = FORMAT == WEIGHT_FP4 ? (u64)(warp_f + lane_scale_out<T>(0)) * (D / 32)
                                         : (u64)(warp_f / 128) * (D / 128);
    s.w_scales[0] = w1 + a.scales_at + scale_row;
    s.w_scales[1] = w3 + a.scales_at + scale_row;

    TileSums<T> sums;
    multiply_tile<T>(sums, shared, s);

    // The largest of every token's 128 outputs: over a lane's 4, the lanes with the same tokens, and the warps.
    float* largest = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int j = 0; j < 4; j++)
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
    for (int j = 0; j < 4; j++)
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
            float inverse = pow2(-e), v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = finish<T>(sums, j, odd, i) * inverse;
            u64 to = pairs ? slot_row(pairs[first + t]) : (u64)(first + t) * SLOTS + TOP_K;
            *reinterpret_cast<u32*>(a.mid + to * F + warp_f + lane_out<T>()) =
                e4m3x2_of(v[0], v[1]) | (u32)e4m3x2_of(v[2], v[3]) << 16;
            if (warp_n == 0 && lane_id() < 4) a.mid_scales[to * (F / 128) + blockIdx.x] = (u8)(e + 127);
        }
}

KERNEL(native_moe_up, NativeUpArgs, THREADS) {
    wait_for_previous();
    DYNAMIC_SHARED(u8, shared);
    if (blockIdx.y >= a.tile_count[0]) return;
    const u32* tile = a.tiles + (u64)blockIdx.y * 4;
    u64 at = tile[0] * a.stride;
    up_tile<WEIGHT_FP4, TILE_STAGES>(a, shared, a.w1 + at, a.w3 + at, a.pairs, tile[1], tile[2]);
}

KERNEL(native_moe_up_shared, NativeUpArgs, THREADS) {
    wait_for_previous();
    DYNAMIC_SHARED(u8, shared);
    u32 first = blockIdx.y * TILE_TOKENS;
    u32 count = a.rows - first < TILE_TOKENS ? a.rows - first : TILE_TOKENS;
    up_tile<WEIGHT_FP8, SHARED_STAGES>(a, shared, a.w1, a.w3, nullptr, first, count);
}

KERNEL(native_moe_down, NativeDownArgs, THREADS) {
    wait_for_previous();
    typedef TileShape<TILE_TOKENS, TILE_OUTS, TILE_STAGES, WEIGHT_FP4, false> T;
    DYNAMIC_SHARED(u8, shared);
    if (blockIdx.y >= a.tile_count[0]) return;
    const u32* tile = a.tiles + (u64)blockIdx.y * 4;
    const u8* w = a.w2 + tile[0] * a.stride;
    const u32* pairs = a.pairs + tile[1];
    u32 count = tile[2], out0 = blockIdx.x * TILE_OUTS;
    TileSource<T> s;
    s.x = a.mid;
    s.w = w;
    s.steps = F / SCALE_COLS;
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++) {
        u32 t = copy_x_row<T>() + i * T::X_STEP;
        s.x_at[i] = slot_row(pairs[t < count ? t : count - 1]) * (F / 16) + copy_x_chunk<T>();
    }
    u32 row = weight_row<T>(copy_w_place<T>());
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++) {
        u32 out = out0 + row + i * T::W_STEP;
        out = a.first_out + (out < a.outs ? out : a.outs - 1);
        s.w_at[i] = out * (F / STAGE_COLS * T::CHUNKS) + copy_w_chunk<T>();
    }
    u32 t = warp_token<T>() + lane_scale_token();
    s.x_scales = a.mid_scales + (u64)slot_row(pairs[t < count ? t : count - 1]) * (F / 128);
    // A warp's 64 outputs are there or not: outs is a multiple of 64.
    u32 out = out0 + warp_out<T>();
    bool real = out < a.outs;
#pragma unroll
    for (int i = 0; i < 2; i++)
        s.w_scales[i] = w + a.scales_at + (u64)(a.first_out + (real ? out : 0) + lane_scale_out<T>(i)) * (F / 32);

    TileSums<T> sums;
    multiply_tile<T>(sums, shared, s);
    if (!real) return;
    out += lane_out<T>();
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            u32 at = lane_token<T>(j, odd);
            if (at >= count) continue;
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = finish<T>(sums, j, odd, i);
            store8(a.out + (u64)slot_row(pairs[at]) * a.outs + out, v);
        }
}
