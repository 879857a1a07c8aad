// moe_up:   mid[r,j,f] = swiglu(round(w1 x[r]), round(w3 x[r])) * weights[r,j] of expert chosen[r,j]; slot K is the
//           shared expert, weight 1
// moe_down: y[r,d] = sum over slots j, in order, of w2 mid[r,j]
//
// x      [rows, D] act        mid [rows, K+1, F] act        y [rows, D] f32; x and mid are rounded to FP8 per 128
// w1, w3 stacks [F, D] FP4    w2 stack [D, F] FP4, matrices `stride` bytes apart; shared: one FP8 matrix each
// chosen [rows, K]            no expert twice in a row
// grid   moe_up: blocks of UP_TILES tiles of 16 F rows: first for the shared expert (ROWS rows of x at once, it is the
//        longer work), then for every (row, slot), where up to SHARE of them that chose the same expert are the work
//        of the first one's block; moe_down: blocks of DOWN_TILES tiles of 16 D rows, for every GROUP rows, which read
//        an expert once
// smem   rings, activations in the order of the operands, partial sums (decode.rs: up_shared, down_shared)
// cost   the chosen experts' bytes, about once; per 2 KB of a warp 4 copies, 4 reads back, 16 mma and about 350 other
//        instructions
// twin   reference/forward.rs::experts                   space  decode.rs::MoePoint
#include "stream.cuh"

#define ALIGNED(bytes) (((u64)(bytes) + 255) / 256 * 256)
#define UP_CODES_FP4 ALIGNED((u64)F * D / 2)
#define UP_CODES_FP8 ALIGNED((u64)F * D)
#define TILES_OF(rows) (((rows) + TILE_ROWS - 1) / TILE_ROWS)

// Asks for tiles first.. (`tiles` of them) of a matrix of `rows` rows into the L2 cache.
DEVICE void prefetch_tiles(const u8* w, u32 first, u32 tiles, u32 rows, u32 row_bytes, u32 most) {
    u32 from = first * TILE_ROWS, count = rows - from < tiles * TILE_ROWS ? rows - from : tiles * TILE_ROWS;
    u32 bytes = count * row_bytes;
    prefetch(w + (u64)from * row_bytes, bytes < most ? bytes : most);
}

// Tiles first.. of w1 (`tiles` of them), then the same of w3.
struct UpTiles {
    const u8 *w1, *w3;
    u32 first, tiles, format;
    float* parts;
    u32 at_once;
};
DEVICE Strip strip_of(const UpTiles& t, u32 tile) {
    const u8* w = tile < t.tiles ? t.w1 : t.w3;
    return strip_at(w, t.first + (tile < t.tiles ? tile : tile - t.tiles), F);
}
DEVICE const u8* scales_of(const UpTiles& t, const Strip& strip, u32 tile) {
    if (t.format == FORMAT_FP4) return strip.w + UP_CODES_FP4;
    const u8* w = tile < t.tiles ? t.w1 : t.w3;
    return w + UP_CODES_FP8 + scales_before(0, t.first + (tile < t.tiles ? tile : tile - t.tiles), D);
}
DEVICE u32 x_of(const UpTiles&, u32) { return 0; }
// parts[tile][split][at_once][16]
DEVICE float* part_of(const UpTiles& t, const Slice& k, u32 tile, u32 n) {
    return t.parts + ((tile * k.split + k.part) * t.at_once + n) * TILE_ROWS;
}

DEVICE float swiglu(float gate, float up, float limit, float weight) {
    if (limit > 0.0f) {
        gate = fminf(gate, limit);
        up = fminf(fmaxf(up, -limit), limit);
    }
    return gate / (1.0f + expf(-gate)) * up * weight;
}

// What a block works on: rows first.. of x for the shared expert, or (row, slot) pairs.
struct UpWork {
    u32 first, count;
    const u32* pairs;
};
DEVICE u32 row_of(const UpWork& w, u32 n) { return w.pairs ? w.pairs[n] / K : w.first + n; }
DEVICE u32 slot_of(const UpWork& w, u32 n) { return w.pairs ? w.pairs[n] % K : K; }

template <int NROWS>
DEVICE void finish_up(const MoeUpArgs& a, const float* parts, const UpTiles& t, u32 split, const UpWork& w) {
    for (u32 i = threadIdx.x; i < t.tiles * (NROWS * TILE_ROWS); i += THREADS) {
        u32 r = i % TILE_ROWS, at = i / TILE_ROWS % NROWS, tile = i / (TILE_ROWS * NROWS);
        u32 f = (t.first + tile) * TILE_ROWS + r;
        if (f >= F || at >= w.count) continue;
        float gate = round_act(part_sum(parts, tile, split, NROWS, at, r));
        float up = round_act(part_sum(parts, t.tiles + tile, split, NROWS, at, r));
        u32 row = row_of(w, at), slot = slot_of(w, at);
        float weight = slot < K ? a.weights[(u64)row * K + slot] : 1.0f;
        store(a.mid + ((u64)row * (K + 1) + slot) * F + f, swiglu(gate, up, a.limit, weight));
    }
}

#if PUBLISHED
template <int NROWS, class E>
DEVICE void up(E, u8* shared, const MoeUpArgs& a, UpTiles t, const UpWork& w) {
    constexpr u32 row_bytes = E::FORMAT == FORMAT_FP4 ? D / 2 : D, steps = (row_bytes + STEP_BYTES - 1) / STEP_BYTES;
    constexpr u32 x_row = X_ROW_BYTES(steps, E::UNITS);
    u8* x = shared + RING_BYTES;
    float* scales = reinterpret_cast<float*>(x + NROWS * x_row);
    float* parts = scales + (E::QUANTISED ? NROWS * steps : 0);
    t.parts = parts;
    t.at_once = NROWS;
    u32 split = split_of(steps, WARPS);
    Slice k = slice_of(warp_id(), WARPS, 2 * t.tiles, row_bytes, split);
    Walk walk;
    begin(E(), walk, shared, t, k);
    // What is not waited for is read at once: all of it.
    u32 most = !w.pairs ? a.prefetch / 256 * 128 : a.prefetch ? 0xffffffffu : 0;
    prefetch_tiles(t.w1, t.first, t.tiles, F, row_bytes, most);
    prefetch_tiles(t.w3, t.first, t.tiles, F, row_bytes, most);
    // Which weights a routed block reads was only known after the wait; the shared expert's are always the same.
    if (!w.pairs) {
        wait_for_previous();
    }
    auto row_at = [&](u32 r) { return a.x + (u64)row_of(w, r) * D; };
    stage<NROWS, 2>(E(), x, x_row, scales, row_at, w.count, D, steps, [] {});
    sync_block();
    run<NROWS>(E(), walk, t, k, x, x_row, w.count, scales);
    sync_block();
    finish_up<NROWS>(a, parts, t, split, w);
}
#else
template <int NROWS, int FORMAT>
DEVICE void up_plain(u8* shared, const MoeUpArgs& a, const UpTiles& t, const UpWork& w) {
    float* x = reinterpret_cast<float*>(shared);
    float* parts = x + NROWS * D;
    u32 row_bytes = FORMAT == FORMAT_FP4 ? D / 2 : D;
    u64 codes = FORMAT == FORMAT_FP4 ? UP_CODES_FP4 : UP_CODES_FP8;
    stage_plain<NROWS>(x, a.x + (u64)row_of(w, 0) * D, D, w.count, D);
    sync_block();
    plain<FORMAT, NROWS>(t.w1, t.w1 + codes, t.first, t.tiles, F, 0, D, row_bytes, x, parts);
    plain<FORMAT, NROWS>(t.w3, t.w3 + codes, t.first, t.tiles, F, 0, D, row_bytes, x,
                         parts + t.tiles * (NROWS * TILE_ROWS));
    sync_block();
    finish_up<NROWS>(a, parts, t, 1, w);
}
#endif

// Rows among which blocks of moe_up look for others of their expert.

// The pairs of the window of `pair` that chose its expert, if it is the first of them, or the first after SHARE others,
// and so on: into `list`, and how many; else 0. Called by one warp.
DEVICE u32 share_expert(const MoeUpArgs& a, u32 pair, u32* list) {
    u32 first = pair / (WINDOW * K) * (WINDOW * K), end = a.rows * K - first < WINDOW * K ? a.rows * K : first + WINDOW * K;
    u32 expert = a.chosen[pair], before = 0, count = 0;
    for (u32 at = first; at < end; at += LANES) {
        u32 other = at + lane_id();
        u32 same = ballot(other < end && a.chosen[other < end ? other : pair] == expert);
        u32 rank = before + count_bits(same & ((1u << lane_id()) - 1));
        before += count_bits(same);
        // The place of `pair` is not known before its turn, but every list begins at a multiple of SHARE.
        if (same >> lane_id() & 1) list[rank] = other;
    }
    sync_warp();
    u32 place = 0;
    while (list[place] != pair) place++;
    if (place % SHARE) return 0;
    count = before - place < SHARE ? before - place : SHARE;
    sync_warp();
    u32 own = lane_id() < count ? list[place + lane_id()] : 0;
    sync_warp();
    if (lane_id() < count) list[lane_id()] = own;
    return count;
}

KERNEL_RESIDENT(moe_up, MoeUpArgs, THREADS, RESIDENT) {
    DYNAMIC_SHARED(u8, shared);
    SHARED u32 pairs[WINDOW * K], shared_count;
    constexpr u32 BLOCKS = (TILES_OF(F) + UP_TILES - 1) / UP_TILES;
    u32 first = blockIdx.x % BLOCKS * UP_TILES, job = blockIdx.x / BLOCKS, groups = (a.rows + ROWS - 1) / ROWS;
    u32 tiles = TILES_OF(F) - first < UP_TILES ? TILES_OF(F) - first : UP_TILES;
    if (job < groups) {
        u32 row = job * ROWS, n = a.rows - row < ROWS ? a.rows - row : ROWS;
        UpTiles t{a.shared_w1, a.shared_w3, first, tiles, FORMAT_FP8, nullptr, ROWS};
#if PUBLISHED
        up<ROWS>(Fp8Codes(), shared, a, t, UpWork{row, n, nullptr});
#else
        wait_for_previous();
        up_plain<ROWS, FORMAT_FP8>(shared, a, t, UpWork{row, n, nullptr});
#endif
        return;
    }
    // What was chosen is read from here on.
    wait_for_previous();
    u32 pair = job - groups;
    if (SHARE == 1) {
        if (threadIdx.x == 0) {
            pairs[0] = pair;
            shared_count = 1;
        }
    } else if (warp_id() == 0) {
        u32 count = share_expert(a, pair, pairs);
        if (lane_id() == 0) shared_count = count;
    }
    u64 at = a.chosen[pair] * a.stride;
    sync_block();
    if (shared_count == 0) return;
    UpTiles t{a.w1 + at, a.w3 + at, first, tiles, FORMAT_FP4, nullptr, SHARE};
    UpWork w{0, shared_count, pairs};
#if PUBLISHED
    up<SHARE>(Fp4<D>(), shared, a, t, w);
#else
    up_plain<1, FORMAT_FP4>(shared, a, t, w);
#endif
}

#define DOWN_CODES_FP4 ALIGNED((u64)D * F / 2)
#define DOWN_CODES_FP8 ALIGNED((u64)D * F)
// The shared expert is twice the bytes of one of six: a quarter of the warps begins with it.
#define SHARED_WARPS (WARPS / 4)
#define ROUTED_WARPS (WARPS - SHARED_WARPS)
#define NO_SLOT 0xffffffffu

// The experts of GROUP rows, each once, and which slot of every row it is.
struct Chosen {
    u32 count;
    u32 experts[GROUP * K];
    u32 slots[GROUP * K][GROUP];
};
// Of `rows` rows. Called by one warp.
DEVICE void list_experts(Chosen& to, const u32* chosen, u32 rows) {
    u32 lane = lane_id(), row = lane / K, own = lane < rows * K ? load_fresh(chosen + lane) : 0;
    u32 first = lane;
    for (u32 other = 0; other < rows * K; other++)
        if (shuffle(own, (int)other) == own && other < first) first = other;
    u32 firsts = ballot(lane < rows * K && first == lane);
    u32 place = count_bits(firsts & ((1u << first) - 1));
    for (u32 i = lane; i < GROUP * K * GROUP; i += LANES) to.slots[i / GROUP][i % GROUP] = NO_SLOT;
    sync_warp();
    if (lane < rows * K) {
        to.experts[place] = own;
        to.slots[place][row] = lane % K;
    }
    if (lane == 0) to.count = count_bits(firsts);
}

// Tiles first.. (`tiles` of them) of the chosen experts' w2, an expert after another.
struct RoutedDown {
    const u8* w2;
    u64 stride;
    const Chosen& chosen;
    u32 first, tiles, x_row, rows;
    float* parts;
};
DEVICE Strip strip_of(const RoutedDown& t, u32 job) {
    const u8* w = t.w2 + t.chosen.experts[job / t.tiles] * t.stride;
    return strip_at(w, t.first + job % t.tiles, D);
}
DEVICE const u8* scales_of(const RoutedDown&, const Strip& strip, u32) { return strip.w + DOWN_CODES_FP4; }
// A lane's column is a row of the group: where it has not chosen the expert, any activations do.
DEVICE u32 x_of(const RoutedDown& t, u32 job) {
    u32 n = lane_id() / 4 < t.rows ? lane_id() / 4 : 0, slot = t.chosen.slots[job / t.tiles][n];
    return (n * K + (slot == NO_SLOT ? 0 : slot)) * t.x_row;
}
// parts[row][slot][tile][16]
DEVICE float* part_of(const RoutedDown& t, const Slice&, u32 job, u32 n) {
    u32 slot = t.chosen.slots[job / t.tiles][n];
    return slot == NO_SLOT ? nullptr : t.parts + ((n * K + slot) * t.tiles + job % t.tiles) * TILE_ROWS;
}

struct SharedDown {
    const u8* w2;
    u32 first;
    float* parts;
};
DEVICE Strip strip_of(const SharedDown& t, u32 tile) {
    return strip_at(t.w2, t.first + tile, D);
}
DEVICE const u8* scales_of(const SharedDown& t, const Strip&, u32 tile) {
    return t.w2 + DOWN_CODES_FP8 + scales_before(0, t.first + tile, F);
}
DEVICE u32 x_of(const SharedDown&, u32) { return 0; }
// parts[tile][split][GROUP][16]
DEVICE float* part_of(const SharedDown& t, const Slice& k, u32 tile, u32 n) {
    return t.parts + ((tile * k.split + k.part) * GROUP + n) * TILE_ROWS;
}

// Every slot's sum first, then the slots in order.
DEVICE void finish_down(const MoeDownArgs& a, const float* routed, const float* last, u32 first, u32 tiles, u32 split,
                        u32 row, u32 rows) {
    for (u32 i = threadIdx.x; i < rows * tiles * TILE_ROWS; i += THREADS) {
        u32 r = i % TILE_ROWS, tile = i / TILE_ROWS % tiles, n = i / (TILE_ROWS * tiles);
        u32 d = (first + tile) * TILE_ROWS + r;
        if (d >= D) continue;
        float sum = 0.0f;
        for (u32 slot = 0; slot < K; slot++) sum += part_sum(routed, (n * K + slot) * tiles + tile, 1, 1, 0, r);
        a.y[(u64)(row + n) * D + d] = sum + part_sum(last, tile, split, GROUP, n, r);
    }
}

KERNEL_RESIDENT(moe_down, MoeDownArgs, THREADS, RESIDENT) {
    DYNAMIC_SHARED(u8, shared);
    constexpr u32 BLOCKS = (TILES_OF(D) + DOWN_TILES - 1) / DOWN_TILES;
    u32 first = blockIdx.x % BLOCKS * DOWN_TILES, row = blockIdx.x / BLOCKS * GROUP;
    u32 tiles = TILES_OF(D) - first < DOWN_TILES ? TILES_OF(D) - first : DOWN_TILES;
    u32 rows = a.rows - row < GROUP ? a.rows - row : GROUP;
    const act_t* mid = a.mid + (u64)row * ((K + 1) * F);
    const u32* chosen = a.chosen + (u64)row * K;
#if PUBLISHED
    SHARED Chosen list;
    constexpr u32 FP4_STEPS = (F / 2 + STEP_BYTES - 1) / STEP_BYTES, FP8_STEPS = (F + STEP_BYTES - 1) / STEP_BYTES;
    constexpr u32 x_row = X_ROW_BYTES(FP4_STEPS, 4), last_row = X_ROW_BYTES(FP8_STEPS, 2);
    u8 *x = shared + RING_BYTES, *last_x = x + GROUP * K * x_row;
    float* scales = reinterpret_cast<float*>(last_x + GROUP * last_row);
    float* parts = scales + GROUP * FP8_STEPS;
    float* last_parts = parts + GROUP * K * DOWN_TILES * TILE_ROWS;
    u32 split = split_of(FP8_STEPS, SHARED_WARPS);
    bool is_last = warp_id() >= ROUTED_WARPS;
    SharedDown last{a.shared_w2, first, last_parts};
    Slice last_k = slice_of(warp_id() - ROUTED_WARPS, SHARED_WARPS, tiles, F, split);
    Walk walk;
    if (is_last) begin(Fp8Codes(), walk, shared, last, last_k);
    // moe_up released this kernel after its own wait: what was chosen is complete, only mid is not.
    if (warp_id() == 0) list_experts(list, chosen, rows);
    sync_block();
    RoutedDown t{a.w2, a.stride, list, first, tiles, x_row, rows, parts};
    Slice k = slice_of(warp_id(), WARPS, list.count * tiles, F / 2, 1);
    if (!is_last) begin(Fp4<F>(), walk, shared, t, k);
    u32 most = a.prefetch / (GROUP * K + 2) / 128 * 128;
    for (u32 i = 0; i < list.count; i++)
        prefetch_tiles(a.w2 + list.experts[i] * a.stride, first, tiles, D, F / 2, most);
    if (row == 0) prefetch_tiles(a.shared_w2, first, tiles, D, F, 2 * most);
    wait_for_previous();
    auto row_at = [&](u32 r) { return mid + (r / K * (K + 1) + r % K) * F; };
    stage<GROUP, 3>(Fp4<F>(), x, x_row, nullptr, row_at, rows * K, F, FP4_STEPS, [] {});
    auto last_at = [&](u32 r) { return mid + (r * (K + 1) + K) * F; };
    stage<GROUP, 1>(Fp8Codes(), last_x, last_row, scales, last_at, rows, F, FP8_STEPS, [] {});
    sync_block();
    if (is_last) {
        run<GROUP>(Fp8Codes(), walk, last, last_k, last_x, last_row, rows, scales);
        // The experts beyond the first ROUTED_WARPS.
        begin(Fp4<F>(), walk, shared, t, k);
    }
    run<GROUP>(Fp4<F>(), walk, t, k, x, 0, rows, nullptr);
    sync_block();
    finish_down(a, parts, last_parts, first, tiles, split, row, rows);
#else
    wait_for_previous();
    float* x = reinterpret_cast<float*>(shared);
    float* parts = x + (K + 1) * F;
    float* last_parts = parts + K * DOWN_TILES * TILE_ROWS;
    stage_plain<1>(x, mid, 0, 1, (K + 1) * F);
    sync_block();
    for (u32 slot = 0; slot < K; slot++) {
        const u8* w = a.w2 + chosen[slot] * a.stride;
        plain<FORMAT_FP4, 1>(w, w + DOWN_CODES_FP4, first, tiles, D, 0, F, F / 2, x + slot * F,
                             parts + slot * tiles * TILE_ROWS);
    }
    plain<FORMAT_FP8, 1>(a.shared_w2, a.shared_w2 + DOWN_CODES_FP8, first, tiles, D, 0, F, F, x + K * F, last_parts);
    sync_block();
    finish_down(a, parts, last_parts, first, tiles, 1, row, rows);
#endif
}
