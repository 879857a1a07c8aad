// index_select: the TOPK best of a row's visible entries, ascending; on equal scores the lower index wins
//
// scores    [R, stride] f32, stride a multiple of 4; the first visible = (position + 1) / RATIO count
// selected  [R, TOPK] u32, counts [R] u32: all visible entries where they are at most TOPK
// grid      one block of SELECT_THREADS per row
// cost      five passes over the row's scores, out of the L2 cache: three find the TOPK-th score by its bits, two
//           write. Exact, the same on every rank.
// twin      reference.rs::top_k
#include "base.cuh"

constexpr int BINS = 2048;
constexpr int WARPS = SELECT_THREADS / LANES;

// Bits that are ordered as the scores are, minus zero before zero.
DEVICE u32 order_of(float score) {
    u32 bits = bits_of(score);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The sum of `v` over the lower lanes of a warp, and over all of them.
DEVICE u32 warp_prefix(u32 v, u32& total) {
    u32 sum = v;
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) {
        u32 below = shuffle(sum, (int)lane_id() - d);
        if (lane_id() >= (u32)d) sum += below;
    }
    total = shuffle(sum, LANES - 1);
    return sum - v;
}

// The same over the block; `scratch` has a word per warp.
DEVICE u32 block_prefix(u32 v, u32* scratch) {
    u32 total, before = warp_prefix(v, total);
    sync_block();
    if (lane_id() == 0) scratch[warp_id()] = total;
    sync_block();
    for (u32 w = 0; w < warp_id(); w++) before += scratch[w];
    return before;
}

KERNEL(index_select, IndexSelectArgs, SELECT_THREADS) {
    SHARED u32 bins[BINS];
    SHARED u32 scratch[WARPS];
    SHARED u32 found[2];
    u32 r = blockIdx.x, lane = lane_id();
    u32 visible = (a.rows[r].position + 1) / RATIO;
    u32* selected = a.selected + (u64)r * TOPK;
    if (threadIdx.x == 0) a.counts[r] = visible < TOPK ? visible : TOPK;
    if (visible <= TOPK) {
        for (u32 w = threadIdx.x; w < visible; w += SELECT_THREADS) selected[w] = w;
        return;
    }
    const float4* scores = reinterpret_cast<const float4*>(a.scores + (u64)r * a.stride);
    u32 quads = (visible + 3) / 4;

    // The bits of the TOPK-th score, 11, 11 and 10 at a time; `wanted` of those that begin so are still to be chosen.
    u32 prefix = 0, wanted = TOPK;
#pragma unroll 1
    for (int pass = 0; pass < 3; pass++) {
        int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        int width = pass == 2 ? 10 : 11;
        for (u32 b = threadIdx.x; b < BINS; b += SELECT_THREADS) bins[b] = 0;
        sync_block();
#pragma unroll 8
        for (u32 i = threadIdx.x; i < quads; i += SELECT_THREADS) {
            float4 v = scores[i];
            float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 order = order_of(four[j]);
                bool counts = 4 * i + j < visible && (pass == 0 || order >> (shift + width) == prefix);
                if (counts) atomic_add(&bins[order >> shift & ((1u << width) - 1)], 1);
            }
        }
        sync_block();
        // From the highest bin down.
        constexpr int EACH = BINS / SELECT_THREADS;
        u32 own[EACH], sum = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            own[j] = bins[BINS - 1 - (threadIdx.x * EACH + j)];
            sum += own[j];
        }
        u32 above = block_prefix(sum, scratch);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            if (above < wanted && wanted <= above + own[j]) {
                found[0] = BINS - 1 - (threadIdx.x * EACH + j);
                found[1] = wanted - above;
            }
            above += own[j];
        }
        sync_block();
        prefix = prefix << width | found[0];
        wanted = found[1];
    }

    // Each warp has a stretch of the row: what it will write is counted first.
    u32 each = (quads + WARPS * LANES - 1) / (WARPS * LANES) * LANES;
    u32 begin = warp_id() * each, end = begin + each < quads ? begin + each : quads;
    u32 greater = 0, equal = 0;
#pragma unroll 8
    for (u32 i = begin + lane; i < end; i += LANES) {
        float4 v = scores[i];
        float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 order = order_of(four[j]);
            bool real = 4 * i + j < visible;
            greater += real && order > prefix;
            equal += real && order == prefix;
        }
    }
    u32 of_warp;
    warp_prefix(greater, of_warp);
    u32 greater_before = block_prefix(lane == 0 ? of_warp : 0, scratch);
    warp_prefix(equal, of_warp);
    u32 equal_before = block_prefix(lane == 0 ? of_warp : 0, scratch);
    // Lane 0 has the sums of the warps before.
    greater_before = shuffle(greater_before, 0);
    equal_before = shuffle(equal_before, 0);
    for (u32 i0 = begin; i0 < end; i0 += LANES) {
        u32 i = i0 + lane;
        float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (i < end) {
            float4 v = scores[i];
            four[0] = v.x, four[1] = v.y, four[2] = v.z, four[3] = v.w;
        }
        // Counts of this lane's greater and equal scores, in halves of a word: at most 128 in a warp.
        u32 own = 0;
        bool is_greater[4], is_equal[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 order = order_of(four[j]);
            bool real = i < end && 4 * i + j < visible;
            is_greater[j] = real && order > prefix;
            is_equal[j] = real && order == prefix;
            own += (is_greater[j] ? 1u : 0u) + (is_equal[j] ? 0x10000u : 0u);
        }
        if (ballot(own != 0) == 0) continue;
        u32 total, before = warp_prefix(own, total);
        u32 g = greater_before + (before & 0xffffu), e = equal_before + (before >> 16);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (is_greater[j] || (is_equal[j] && e < wanted)) selected[g + (e < wanted ? e : wanted)] = 4 * i + j;
            g += is_greater[j];
            e += is_equal[j];
        }
        greater_before += total & 0xffffu;
        equal_before += total >> 16;
    }
}
