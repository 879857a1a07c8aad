// attend: o[r,h,:] = turned back(sum_t p_t key_t / (sum_t p_t + exp2(sink_h * log2 e - m))), q' = rotate(q[r,h,:] * rms^-1),
// p_t = exp2(q' . key_t * log2 e / sqrt(HD) - m), m the largest exponent; numerators are rounded to bfloat16 relative to
// the largest so far
//
// q, o     [R, heads, HD] act, q as projected     kv  [R, HD] act, window rows of this step
// window   [slots, CAPW, HD] act, position p at p % CAPW, for positions before the step
// entries  paged rows of HD act; RATIO 4: all visible, or if they are more than TOPK those of selected [R, TOPK], as
//          rows of the cache; other: all visible; 0: none
// sinks    [heads] f32     turns  [R, ROPE/2] of the rows' positions
// partial  [R, splits, heads, HD] f32 unscaled sums and stats [R, splits, heads, 2] f32 (m, sum of p): the last block
//          of a row's heads (and channels) to arrive sums them; arrived: zeros before and after, one for each
// grid     attend: short steps, HEADS_SHORT heads a block (splits, R, ceil(heads / HEADS_SHORT) * parts): a part has
//          the dot products of all channels, but sums HD / parts
//          attend_long: (splits, R, ceil(heads / HEADS_LONG)); float: (splits, R, heads)     smem  see mod.rs
// cost     4 * HD flops per head and key. One split of long steps reads 2 * HD bytes per key and HEADS heads out of
//          the L2 cache: bounded by shared memory, about twice the time of the tensor cores. With many splits (decode)
//          a launch is a few latencies.
// twin     reference.rs::attend, which rounds relative to the largest of all. (Relative to a power of two, in any order
//          the same, the rounding's error is a tenth to a quarter larger: the largest is no longer exact.)

#if PUBLISHED
// A warp owns SLICE channels: it copies and multiplies these of every key, so that keys need no barrier before their
// dot products. Those of the slices are summed over shared memory, in the order of the slices.
constexpr int SLICE = HD / WARPS;
constexpr int CHUNKS = SLICE / 8;
constexpr int STEPS = SLICE / 16;

template <int HEADS>
struct Shared {
    u16 keys[2][WARPS][KEYS * SLICE];
    // While queries are finished and splits merged: other numbers of heads.
    float dots[WARPS][HEADS * KEYS];
    u16 numerators[HEADS * KEYS];
    float factor[HEADS], top[HEADS], sum[HEADS];
    u32 last, pad[3];
};

// Places of 16 bytes in a key's slice, dot products and numerators are permuted so that the rows of a matrix lie in
// different banks.
DEVICE int key_place(int key, int chunk) { return key * SLICE + 8 * (CHUNKS == 8 ? chunk ^ (key & 7) : chunk); }
DEVICE int dot_place(int head, int key) { return head * KEYS + (key ^ (head & 3) << 3); }
DEVICE int numerator_place(int head, int chunk) { return head * KEYS + 8 * (chunk ^ (head >> 1 & 3)); }

// Begins to copy this warp's slice of a tile; lane l knows key l. Returns which of the keys there are.
DEVICE u32 copy_keys(u16* to, const u16* own, bool real) {
    u32 mask = ballot(real);
    u64 address = (u64)own;
    u32 low = (u32)address, high = (u32)(address >> 32);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        int item = i * LANES + (int)lane_id(), key = item / CHUNKS, chunk = item % CHUNKS;
        u64 from = (u64)shuffle(low, key) | (u64)shuffle(high, key) << 32;
        copy_async16_or_zero(to + key_place(key, chunk), (const u16*)from + warp_id() * SLICE + 8 * chunk,
                             mask >> key & 1);
    }
    return mask;
}

// The warp's slice of the queries of `16 * BLOCKS` heads, as operands. Heads that are not there are zeros.
template <int BLOCKS>
DEVICE void load_queries(const AttendArgs& a, u32 r, u32 head0, float (*squares)[16 * BLOCKS],
                         u32 (&q)[BLOCKS][STEPS][4]) {
    u32 lane = lane_id(), warp = warp_id();
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 head = head0 + m * 16 + half * 8 + lane / 4;
            bool real = head < a.heads;
            const u16* from = a.q + ((u64)r * a.heads + (real ? head : 0)) * HD + warp * SLICE + 2 * (lane % 4);
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                q[m][k][half] = real ? *reinterpret_cast<const u32*>(from + 16 * k) : 0;
                q[m][k][half + 2] = real ? *reinterpret_cast<const u32*>(from + 16 * k + 8) : 0;
            }
        }
    }
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < STEPS; k++)
#pragma unroll
                for (int i = half; i < 4; i += 2) {
                    float x, y;
                    widen_bf16x2(q[m][k][i], x, y);
                    sum += x * x + y * y;
                }
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (lane % 4 == 0) squares[warp][m * 16 + half * 8 + lane / 4] = sum;
        }
    }
    sync_block();
    const float2* turns = a.turns + (u64)r * (ROPE / 2);
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += squares[w][m * 16 + half * 8 + lane / 4];
            float scale = 1.0f / sqrtf(sum / HD + a.eps);
#pragma unroll
            for (int k = 0; k < STEPS; k++)
#pragma unroll
                for (int i = half; i < 4; i += 2) {
                    int channel = warp * SLICE + 16 * k + 2 * (lane % 4) + (i < 2 ? 0 : 8);
                    float x, y;
                    widen_bf16x2(q[m][k][i], x, y);
                    finish_query(x, y, scale, channel, turns);
                    q[m][k][i] = pack_bf16x2(x, y);
                }
        }
    }
}

// A block's heads of a row, over the keys of a split. PARTS: blockIdx.z says which of a.parts parts of the channels it
// sums, too; else it sums all.
template <int BLOCKS, bool PARTS>
DEVICE void attend_block(const AttendArgs& a, Shared<16 * BLOCKS>* s) {
    constexpr int HEADS = 16 * BLOCKS;
    // Threads that share a head in the softmax, and keys of each.
    constexpr int SHARING = THREADS / HEADS;
    constexpr int EACH = KEYS / SHARING;
    static_assert(EACH == 2 || EACH % 4 == 0, "keys are read in pairs or fours");
    u32 r = blockIdx.y, lane = lane_id(), warp = warp_id();
    u32 parts = PARTS ? a.parts : 1, group = blockIdx.z / parts, head0 = group * HEADS;
    // Channels that are summed: of the block and of this warp.
    u32 channels = HD / parts, channel0 = blockIdx.z % parts * channels, own0 = channel0 + warp * (channels / WARPS);
    // The warp's are in one slice.
    u32 slice = own0 / SLICE;
    int chunk0 = (int)(own0 % SLICE / 8);
    // Rows and pages were written before the step.
    List list = list_of(a, r);
    u32 begin = blockIdx.x * list.each, end = begin + list.each < list.tiles ? begin + list.each : list.tiles;
    // Tiles before position 0 add nothing.
    u32 empty = list.row.position + 1 < WINDOW ? (WINDOW - 1 - list.row.position) / KEYS : 0;
    bool idle = begin >= end;
    if (begin < empty) begin = empty;

    u32 masks[2] = {0, 0}, places[2] = {0, 0};
    if (!list.chosen && !idle) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            places[i] = place_of(a, list, (begin + i) * KEYS + lane);
            const u16* at;
            // Keys come from far.
            if (begin + i < end && key_at(a, list, (begin + i) * KEYS + lane, places[i], at))
                prefetch_l2(at + warp * SLICE);
        }
    }
    wait_for_previous();
    if (idle) return;
    // Addresses of chosen keys take a load; it is asked for a tile before the copy needs it.
    if (list.chosen) {
#pragma unroll
        for (int i = 0; i < 2; i++) places[i] = place_of(a, list, (begin + i) * KEYS + lane);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (begin + i < end) {
            const u16* at;
            bool real = key_at(a, list, (begin + i) * KEYS + lane, places[i], at);
            masks[i] = copy_keys(s->keys[i][warp], at, real);
        }
        copy_commit();
    }
    u32 place = place_of(a, list, (begin + 2) * KEYS + lane);

    u32 q[BLOCKS][STEPS][4];
    load_queries<BLOCKS>(a, r, head0, reinterpret_cast<float(*)[HEADS]>(s->numerators), q);
    float o[BLOCKS][CHUNKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int n = 0; n < CHUNKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[m][n][i] = 0.0f;
    int head_of_thread = threadIdx.x / SHARING, first_key = threadIdx.x % SHARING * EACH;
    float top = NO_SCORE, sum = 0.0f;

#pragma unroll 1
    for (u32 t = begin; t < end; t++) {
        u16(*keys)[KEYS * SLICE] = s->keys[(t - begin) & 1];
        copy_wait<1>();
        sync_warp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float dots[BLOCKS][2][4];
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int i = 0; i < 8; i++) dots[m][i / 4][i % 4] = 0.0f;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                u32 b[4];
                int key = half * 16 + (int)(lane / 16) * 8 + (int)(lane % 8), chunk = 2 * k + (int)(lane / 8 % 2);
                load_matrix_x4(b, keys[warp] + key_place(key, chunk));
                u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    mma_bf16(dots[m][0], q[m][k], b0);
                    mma_bf16(dots[m][1], q[m][k], b1);
                }
            }
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    int head = m * 16 + (int)(lane / 4), key = half * 16 + n * 8 + 2 * (int)(lane % 4);
                    float* to = s->dots[warp];
                    *reinterpret_cast<float2*>(to + dot_place(head, key)) = float2{dots[m][n][0], dots[m][n][1]};
                    *reinterpret_cast<float2*>(to + dot_place(head + 8, key)) = float2{dots[m][n][2], dots[m][n][3]};
                }
        }
        sync_block();
        {
            float x[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) x[i] = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float* from = s->dots[w] + dot_place(head_of_thread, first_key);
                if constexpr (EACH % 4 == 0) {
#pragma unroll
                    for (int i = 0; i < EACH; i += 4) {
                        float4 v = *reinterpret_cast<const float4*>(from + i);
                        x[i] += v.x;
                        x[i + 1] += v.y;
                        x[i + 2] += v.z;
                        x[i + 3] += v.w;
                    }
                } else {
                    float2 v = *reinterpret_cast<const float2*>(from);
                    x[0] += v.x;
                    x[1] += v.y;
                }
            }
            u32 mask = masks[0] >> first_key;
            float before = top;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                x[i] = mask >> i & 1 ? x[i] * SCALE : NO_SCORE;
                top = fmaxf(top, x[i]);
            }
#pragma unroll
            for (int m = 1; m < SHARING; m *= 2) top = fmaxf(top, shuffle_xor(top, m));
            float factor = exp2f(before - top);
            sum *= factor;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                x[i] = mask >> i & 1 ? exp2f(x[i] - top) : 0.0f;
                sum += x[i];
            }
            u16* to = s->numerators + numerator_place(head_of_thread, first_key / 8) + first_key % 8;
#pragma unroll
            for (int i = 0; i < EACH; i += 2) *reinterpret_cast<u32*>(to + i) = pack_bf16x2(x[i], x[i + 1]);
            if (first_key == 0) s->factor[head_of_thread] = factor;
        }
        sync_block();
        float factor[BLOCKS][2];
        bool changed = false;
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                factor[m][half] = s->factor[m * 16 + half * 8 + lane / 4];
                changed |= factor[m][half] != 1.0f;
            }
        if (ballot(changed)) {
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int n = 0; n < CHUNKS; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) o[m][n][i] *= factor[m][i / 2];
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            u32 p[BLOCKS][4];
#pragma unroll
            for (int m = 0; m < BLOCKS; m++) {
                int head = m * 16 + (int)(lane % 16);
                load_matrix_x4(p[m], s->numerators + numerator_place(head, 2 * k + (int)(lane / 16)));
            }
#pragma unroll
            for (int n = 0; n < CHUNKS; n += 2) {
                if (PARTS && n * 8 >= (int)(channels / WARPS)) break;
                u32 b[4];
                int key = k * 16 + (int)(lane % 16), chunk = (PARTS ? chunk0 : 0) + n + (int)(lane / 16);
                load_matrix_x4_trans(b, keys[PARTS ? slice : warp] + key_place(key, chunk));
                u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    mma_bf16(o[m][n], p[m], b0);
                    mma_bf16(o[m][n + 1], p[m], b1);
                }
            }
        }
        masks[0] = masks[1];
        if (t + 2 < end) {
            // Other warps may still sum this one's slice.
            if (PARTS && parts > 1) sync_block();
            else sync_warp();
            const u16* at;
            bool real = key_at(a, list, (t + 2) * KEYS + lane, place, at);
            masks[1] = copy_keys(keys[warp], at, real);
        }
        copy_commit();
        place = place_of(a, list, (t + 3) * KEYS + lane);
    }

#pragma unroll
    for (int m = 1; m < SHARING; m *= 2) sum += shuffle_xor(sum, m);
    bool merged = a.splits > 1;
    if (first_key == 0) {
        u32 head = head0 + head_of_thread;
        // Every part of the channels has the same two numbers, and needs them.
        if (merged && head < a.heads)
            *reinterpret_cast<float2*>(a.stats + 2 * partial_at(a, r, blockIdx.x, head)) = float2{top, sum};
        s->top[head_of_thread] = top;
        s->sum[head_of_thread] = sum;
    }
    sync_block();
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 local = m * 16 + half * 8 + lane / 4, head = head0 + local;
            if (head >= a.heads) continue;
            float* partial = a.partial + partial_at(a, r, blockIdx.x, head) * HD;
            u16* to = a.o + ((u64)r * a.heads + head) * HD;
            float all = merged ? 1.0f : s->sum[local] + exp2f(a.sinks[head] * LOG2_E - s->top[local]);
#pragma unroll
            for (int n = 0; n < CHUNKS; n++) {
                if (PARTS && n * 8 >= (int)(channels / WARPS)) break;
                int channel = own0 + 8 * n + 2 * (lane % 4);
                float x = o[m][n][2 * half], y = o[m][n][2 * half + 1];
                if (merged) {
                    *reinterpret_cast<float2*>(partial + channel) = float2{x, y};
                    continue;
                }
                finish_pair(x, y, all, channel, a.turns + (u64)r * (ROPE / 2));
                *reinterpret_cast<u32*>(to + channel) = pack_bf16x2(x, y);
            }
        }
    }
    if (!merged || !is_last(a.arrived + (u64)r * gridDim.z + blockIdx.z, list.splits, s->last)) return;
    merge<HEADS>(a, list, head0, channel0, channels, s->dots[0], s->sum);
}

KERNEL(attend, AttendArgs, THREADS) {
    DYNAMIC_SHARED(Shared<HEADS_SHORT>, s);
    attend_block<HEADS_SHORT / 16, true>(a, s);
}
KERNEL(attend_long, AttendArgs, THREADS) {
    DYNAMIC_SHARED(Shared<HEADS_LONG>, s);
    attend_block<HEADS_LONG / 16, false>(a, s);
}
#endif
