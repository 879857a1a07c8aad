// The TOPK best of a row's scores: a radix select by the bits of the scores, 11, 11 and 10 at a time. Exact, the same
// on every rank; on equal scores the lower index wins.

// Scores that share the first digit of the TOPK-th and are kept in shared memory; more are looked up again.
constexpr int LISTED = 2048;
// Groups of four scores that a thread has under way.
constexpr int AT_ONCE = 8;

struct Select {
    u32 bins[BINS];
    u32 orders[LISTED], places[LISTED];
    u32 scratch[WARPS], found[2], listed, last;
};

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

// The sum over the lower threads of the block; `scratch` has a word per warp. A barrier before, and one within.
DEVICE u32 block_prefix(u32 v, u32* scratch) {
    u32 total, before = warp_prefix(v, total);
    sync_block();
    if (lane_id() == 0) scratch[warp_id()] = total;
    sync_block();
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        if (w < (int)warp_id()) before += scratch[w];
    return before;
}

DEVICE void clear(u32* words, u32 count) {
    for (u32 i = threadIdx.x; i < count; i += THREADS) words[i] = 0;
}

// The bin, from the highest down, in which the `wanted`-th is; `wanted` becomes its number within the bin.
DEVICE u32 find_bin(Select& s, u32& wanted) {
    constexpr int EACH = BINS / THREADS;
    static_assert(EACH % 4 == 0, "bins are read in fours");
    u32 own[EACH], sum = 0, first = BINS - (threadIdx.x + 1) * EACH;
#pragma unroll
    for (int j = 0; j < EACH; j += 4) {
        uint4 four = *reinterpret_cast<const uint4*>(s.bins + first + j);
        own[j] = four.x, own[j + 1] = four.y, own[j + 2] = four.z, own[j + 3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) sum += own[j];
    u32 above = block_prefix(sum, s.scratch);
#pragma unroll
    for (int j = EACH - 1; j >= 0; j--) {
        if (above < wanted && wanted <= above + own[j]) {
            s.found[0] = first + j;
            s.found[1] = wanted - above;
        }
        above += own[j];
    }
    sync_block();
    wanted = s.found[1];
    return s.found[0];
}

// `f(order, index)` of every score whose order is at least `low`, in no order.
template <class F>
DEVICE void for_scores(const float* scores, u32 visible, u32 low, F f) {
    const float4* fours = reinterpret_cast<const float4*>(scores);
    u32 count = (visible + 3) / 4;
#pragma unroll 1
    for (u32 begin = threadIdx.x; begin < count; begin += AT_ONCE * THREADS) {
        float4 v[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            u32 i = begin + j * THREADS;
            v[j] = fours[i < count ? i : 0];
        }
        // Few are: they are marked first, then worked on.
        u32 marked = 0;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            float four[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                bool real = 4 * (begin + j * THREADS) + k < visible;
                marked |= real && order_of(four[k]) >= low ? 1u << (4 * j + k) : 0u;
            }
        }
        while (marked) {
            u32 bit = count_bits((marked & (0u - marked)) - 1);
            marked &= marked - 1;
            u32 index = 4 * (begin + bit / 4 * THREADS) + bit % 4;
            f(order_of(scores[index]), index);
        }
    }
}

// `f(order, index)` of every score with this first digit, when they have been listed.
template <class F>
DEVICE void for_listed(const float* scores, u32 visible, u32 first, const Select& s, F f) {
    if (s.listed <= LISTED) {
        for (u32 i = threadIdx.x; i < s.listed; i += THREADS) f(s.orders[i], s.places[i]);
        return;
    }
    for_scores(scores, visible, first << 21, [&](u32 order, u32 index) {
        if (order >> 21 == first) f(order, index);
    });
}

// Counts the first digits of all scores into `s.bins`.
DEVICE void count_digits(const float* scores, u32 visible, Select& s) {
    const float4* fours = reinterpret_cast<const float4*>(scores);
    clear(s.bins, BINS);
    sync_block();
    u32 count = (visible + 3) / 4;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        float4 v = fours[i];
        float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (4 * i + k < visible) atomic_add(&s.bins[order_of(four[k]) >> 21], 1);
    }
    sync_block();
}

// Writes where the TOPK best of more than TOPK scores have their entries: (page of entry) * EPP + place in it, in the
// order of the entries. `s.bins` counts the first digits; `marks` has room for two bits of every score.
DEVICE void select_row(const float* scores, u32 visible, const u32* pages, u32* selected, Select& s, u32* marks) {
    u32 words = (visible + 31) / 32, *ties = marks + words;
    u32 wanted = TOPK, first = find_bin(s, wanted);
    clear(s.bins, BINS);
    clear(marks, 2 * words);
    if (threadIdx.x == 0) s.listed = 0;
    sync_block();
    // A bit is set once: adding it is setting it.
    auto mark = [](u32* bits, u32 index) { atomic_add(&bits[index / 32], 1u << index % 32); };
    for_scores(scores, visible, first << 21, [&](u32 order, u32 index) {
        if (order >> 21 > first) {
            mark(marks, index);
            return;
        }
        u32 at = atomic_add(&s.listed, 1);
        if (at < LISTED) {
            s.orders[at] = order;
            s.places[at] = index;
        }
        atomic_add(&s.bins[order >> 10 & (BINS - 1)], 1);
    });
    sync_block();
    u32 prefix = first << 11 | find_bin(s, wanted);
    clear(s.bins, BINS);
    sync_block();
    for_listed(scores, visible, first, s, [&](u32 order, u32) {
        if (order >> 10 == prefix) atomic_add(&s.bins[order & 1023], 1);
    });
    sync_block();
    u32 last = find_bin(s, wanted), threshold = prefix << 10 | last, equal = s.bins[last];
    for_listed(scores, visible, first, s, [&](u32 order, u32 index) {
        if (order > threshold || (order == threshold && equal == wanted)) mark(marks, index);
        else if (order == threshold) mark(ties, index);
    });
    sync_block();
    // A thread has a run of words; an odd number, so that neighbours' words lie in different banks.
    u32 each = (words + THREADS - 1) / THREADS | 1, begin = threadIdx.x * each;
    u32 end = begin + each < words ? begin + each : words;
    if (equal != wanted) {
        u32 own = 0;
        for (u32 i = begin; i < end; i++) own += count_bits(ties[i]);
        u32 before = block_prefix(own, s.scratch);
        for (u32 i = begin; i < end; i++)
            for (u32 left = ties[i]; left && before < wanted; left &= left - 1, before++) marks[i] |= left & (0u - left);
    }
    u32 own = 0;
    for (u32 i = begin; i < end; i++) own += count_bits(marks[i]);
    u32 before = block_prefix(own, s.scratch);
    // The bins have done their work.
    for (u32 i = begin; i < end; i++)
        for (u32 left = marks[i]; left; left &= left - 1)
            s.bins[before++] = 32 * i + count_bits((left & (0u - left)) - 1);
    sync_block();
    for (u32 i = threadIdx.x; i < TOPK; i += THREADS) {
        u32 w = s.bins[i];
        selected[i] = pages[w / EPP] * EPP + w % EPP;
    }
}
