// attend of float numerics: plain float32, a block per split, row and head. See attend.cu for shapes.
#if !PUBLISHED
DEVICE void attend_head(const AttendArgs& a) {
    SHARED float q[HD];
    SHARED float scores[KEYS];
    SHARED float numerators[KEYS];
    SHARED const float* keys[KEYS];
    SHARED float stats[2 * SPLITS_MAX];
    SHARED float scratch[WARPS];
    SHARED u32 last;
    u32 r = blockIdx.y, head = blockIdx.z, lane = lane_id();
    List list = list_of(a, r);
    u32 begin = blockIdx.x * list.each, end = begin + list.each < list.tiles ? begin + list.each : list.tiles;
    wait_for_previous();
    if (begin >= end) return;
    const float2* turns = a.turns + (u64)r * (ROPE / 2);
    float squares = 0.0f;
    for (u32 c = threadIdx.x; c < HD; c += THREADS) {
        float x = a.q[((u64)r * a.heads + head) * HD + c];
        squares += x * x;
    }
    float scale = 1.0f / sqrtf(block_sum<THREADS>(squares, scratch) / HD + a.eps);
    // A thread sums pairs of channels.
    constexpr int PAIRS = (HD / 2 + THREADS - 1) / THREADS;
    float o[PAIRS][2];
    for (int j = 0; j < PAIRS; j++) {
        u32 c = 2 * (threadIdx.x + j * THREADS);
        o[j][0] = o[j][1] = 0.0f;
        if (c >= HD) continue;
        float2 v = *reinterpret_cast<const float2*>(a.q + ((u64)r * a.heads + head) * HD + c);
        finish_query(v.x, v.y, scale, c, turns);
        q[c] = v.x;
        q[c + 1] = v.y;
    }
    float top = NO_SCORE, sum = 0.0f;
    for (u32 t = begin; t < end; t++) {
        sync_block();
        if (threadIdx.x < KEYS) {
            u32 i = t * KEYS + threadIdx.x;
            const float* at;
            bool real = key_at(a, list, i, place_of(a, list, i), at);
            keys[threadIdx.x] = real ? at : nullptr;
        }
        sync_block();
        for (int j = warp_id(); j < KEYS; j += WARPS) {
            const float* key = keys[j];
            float dot = 0.0f;
            if (key)
                for (u32 c = lane; c < HD; c += LANES) dot += q[c] * key[c];
            dot = warp_sum(dot);
            if (lane == 0) scores[j] = key ? dot * SCALE : NO_SCORE;
        }
        sync_block();
        float before = top;
        for (int j = 0; j < KEYS; j++) top = fmaxf(top, scores[j]);
        float factor = exp2f(before - top);
        if (threadIdx.x < KEYS)
            numerators[threadIdx.x] = keys[threadIdx.x] ? exp2f(scores[threadIdx.x] - top) : 0.0f;
        sync_block();
        sum *= factor;
        for (int j = 0; j < KEYS; j++) sum += numerators[j];
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            u32 c = 2 * (threadIdx.x + p * THREADS);
            if (c >= HD) continue;
            o[p][0] *= factor;
            o[p][1] *= factor;
            for (int j = 0; j < KEYS; j++) {
                if (!keys[j]) continue;
                float2 v = *reinterpret_cast<const float2*>(keys[j] + c);
                o[p][0] += numerators[j] * v.x;
                o[p][1] += numerators[j] * v.y;
            }
        }
    }
    bool merged = a.splits > 1;
    float all = sum + exp2f(a.sinks[head] * LOG2_E - top);
    u64 partial = partial_at(a, r, blockIdx.x, head);
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        u32 c = 2 * (threadIdx.x + p * THREADS);
        if (c >= HD) continue;
        if (!merged) finish_pair(o[p][0], o[p][1], all, c, turns);
        float* to = merged ? a.partial + partial * HD : a.o + ((u64)r * a.heads + head) * HD;
        *reinterpret_cast<float2*>(to + c) = float2{o[p][0], o[p][1]};
    }
    if (!merged) return;
    if (threadIdx.x == 0) *reinterpret_cast<float2*>(a.stats + 2 * partial) = float2{top, sum};
    if (is_last(a.arrived + (u64)r * a.heads + head, list.splits, last)) merge<1>(a, list, head, 0, HD, stats, scratch);
}

KERNEL(attend, AttendArgs, THREADS) { attend_head(a); }
KERNEL(attend_long, AttendArgs, THREADS) { attend_head(a); }
#endif
