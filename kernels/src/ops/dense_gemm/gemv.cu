// gemv: y[n,r] = sum_k x[n,k] * w[r,k] for up to 8 matrices (segments) at once, few rows n
//
// w      as stored, rows of F32, BF16 or FP8 codes; scales of the whole stored matrix, of which row 0 is row0
// x      [rows, x_stride] act, rounded to FP8 per 128 columns on the way in where the segment says so
// y      [rows, y_stride] act (rounded) or f32
// grid   groups * blocks: a block has `tiles` tiles of 16 weight rows and ROWS rows of x; groups of rows lie next to
//        one another, so that the second one finds the weights in the L2 cache
// smem   rings, ROWS rows of x in the order of the operands, their scales, partial sums (gemv.rs, Gemv::shared)
// cost   the weights' bytes once; per 2 KB of a warp 4 copies, 4 reads back and 4..16 mma
// twin   reference.rs::matmul                            space  gemv.rs::GemvPoint
#include "stream.cuh"

struct SegmentTiles {
    const GemvSeg& s;
    u32 first, row_bytes;
    float* parts;
};
DEVICE Strip strip_of(const SegmentTiles& t, u32 tile) {
    return strip_at(t.s.w, t.first + tile, t.s.rows);
}
DEVICE const u8* scales_of(const SegmentTiles& t, const Strip&, u32 tile) {
    return t.s.scales + scales_before(t.s.row0, t.first + tile, t.s.cols);
}
DEVICE u32 x_of(const SegmentTiles&, u32) { return 0; }
// parts[tile][split][ROWS][16]
DEVICE float* part_of(const SegmentTiles& t, const Slice& k, u32 tile, u32 n) {
    return t.parts + ((tile * k.split + k.part) * ROWS + n) * TILE_ROWS;
}

DEVICE void write_out(const GemvSeg& s, const float* parts, u32 first, u32 tiles, u32 split, u32 row, u32 rows) {
    for (u32 i = threadIdx.x; i < tiles * (ROWS * TILE_ROWS); i += THREADS) {
        u32 r = i % TILE_ROWS, n = i / TILE_ROWS % ROWS, tile = i / (TILE_ROWS * ROWS);
        u32 out = (first + tile) * TILE_ROWS + r;
        if (out >= s.rows || n >= rows) continue;
        float sum = part_sum(parts, tile, split, ROWS, n, r);
        u64 at = (u64)(row + n) * s.y_stride + out;
        if (s.flags & Y_F32) reinterpret_cast<float*>(s.y)[at] = sum;
        else store(reinterpret_cast<act_t*>(s.y) + at, sum);
    }
}

#if PUBLISHED
template <class E>
DEVICE void segment(E, u8* shared, const GemvArgs& a, const GemvSeg& s, u32 block, u32 row, u32 rows, u32 row_bytes) {
    u32 first = block * s.tiles, all = (s.rows + TILE_ROWS - 1) / TILE_ROWS;
    u32 tiles = all - first < s.tiles ? all - first : s.tiles;
    u32 steps = steps_of(row_bytes), x_row = X_ROW_BYTES(steps, E::UNITS);
    u8* x = shared + RING_BYTES;
    float* scales = reinterpret_cast<float*>(x + ROWS * x_row);
    float* parts = scales + ROWS * steps;
    u32 split = split_of(steps, WARPS);
    Slice k = slice_of(warp_id(), WARPS, tiles, row_bytes, split);
    SegmentTiles source{s, first, row_bytes, parts};
    Walk walk;
    begin(E(), walk, shared, source, k);
    // The first group of rows asks for all.
    if (row == 0) {
        u32 from = first * TILE_ROWS, weight_rows = s.rows - from < tiles * TILE_ROWS ? s.rows - from : tiles * TILE_ROWS;
        u32 bytes = weight_rows * row_bytes;
        prefetch(s.w + (u64)from * row_bytes, bytes < a.prefetch ? bytes : a.prefetch);
    }
    wait_for_previous();
    auto row_at = [&](u32 r) { return s.x + (u64)(row + r) * s.x_stride; };
    stage<ROWS, 2>(E(), x, x_row, scales, row_at, rows, s.cols, steps, [] {});
    sync_block();
    run<ROWS>(E(), walk, source, k, x, x_row, rows, scales);
    sync_block();
    write_out(s, parts, first, tiles, split, row, rows);
}
#endif

template <int FORMAT>
DEVICE void plain_segment(u8* shared, const GemvSeg& s, u32 block, u32 row, u32 rows, u32 row_bytes) {
    u32 first = block * s.tiles, all = (s.rows + TILE_ROWS - 1) / TILE_ROWS;
    u32 tiles = all - first < s.tiles ? all - first : s.tiles;
    float* x = reinterpret_cast<float*>(shared);
    float* parts = x + ROWS * s.cols;
    wait_for_previous();
    stage_plain<ROWS>(x, s.x + (u64)row * s.x_stride, s.x_stride, rows, s.cols);
    sync_block();
    plain<FORMAT, ROWS>(s.w, s.scales, first, tiles, s.rows, s.row0, s.cols, row_bytes, x, parts);
    sync_block();
    write_out(s, parts, first, tiles, 1, row, rows);
}

KERNEL_RESIDENT(gemv, GemvArgs, THREADS, RESIDENT) {
    DYNAMIC_SHARED(u8, shared);
    u32 group = blockIdx.x % a.groups, block = blockIdx.x / a.groups, i = 0;
    while (i + 1 < a.count && block >= a.segments[i + 1].first_block) i++;
    const GemvSeg& s = a.segments[i];
    block -= s.first_block;
    u32 row = group * ROWS, rows = a.rows - row < ROWS ? a.rows - row : ROWS;
    if (s.format == FORMAT_F32) return plain_segment<FORMAT_F32>(shared, s, block, row, rows, s.cols * 4);
#if PUBLISHED
    if (s.format == FORMAT_BF16) return segment(Bf16Weights(), shared, a, s, block, row, rows, s.cols * 2);
    if (s.flags & QUANTISE) return segment(Fp8Codes(), shared, a, s, block, row, rows, s.cols);
    segment(Fp8Raw(), shared, a, s, block, row, rows, s.cols);
#else
    if (s.format == FORMAT_BF16) return plain_segment<FORMAT_BF16>(shared, s, block, row, rows, s.cols * 2);
    plain_segment<FORMAT_FP8>(shared, s, block, row, rows, s.cols);
#endif
}
