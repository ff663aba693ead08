// What one thread of an elementwise kernel takes of a sample: a few elements that lie side by side in memory, and the
// noise that belongs to them.
#pragma once

#include "common/cuda/noise.cuh"
#include "common/cuda/vec.cuh"

namespace fastddpm::cuda {

constexpr int THREADS = 256;

// How the elements of a thread lie: V neighbours in C, H, W order (Channels = 0), or V neighbouring pixels with all their
// channels in NHWC order. V, 4 or 8, makes 16 bytes of a float32 or a half-precision number.
// The number of elements of a sample (of its pixels) is a multiple of V, and every image is in order and aligned.
template <int V, int Channels>
struct Tile {
    static constexpr int SIZE = V * (Channels ? Channels : 1);
    static constexpr bool WHOLE = true;
    int64_t first;  // element in memory order, within the sample

    static int64_t per_sample(const Shape& s) { return s.channels * s.height * s.width / SIZE; }

    __device__ __forceinline__ Tile(const Shape&, int64_t index) : first(index * SIZE) {}

    // Whether element i of the tile is one of the sample's.
    __device__ __forceinline__ bool has(int) const { return true; }

    __device__ __forceinline__ void load(const Image& a, const Shape&, int64_t row, float (&x)[SIZE]) const {
        with_type(a.dtype, a.data, [&](const auto* p) { cuda::load(p + row * a.sample_stride + first, x); });
    }
    // The same where the type is known.
    template <class T>
    __device__ __forceinline__ void load_as(const Image& a, const Shape&, int64_t row, float (&x)[SIZE]) const {
        cuda::load(static_cast<const T*>(a.data) + row * a.sample_stride + first, x);
    }
    __device__ __forceinline__ void store(const Image& a, const Shape&, int64_t row, const float (&x)[SIZE]) const {
        with_output_type(a.dtype, a.data, [&](auto* p) { cuda::store(p + row * a.sample_stride + first, x); });
    }
    template <class T>
    __device__ __forceinline__ void store_as(const Image& a, const Shape&, int64_t row, const float (&x)[SIZE]) const {
        cuda::store(static_cast<T*>(a.data) + row * a.sample_stride + first, x);
    }

    __device__ __forceinline__ void draw(const Stream& stream, const Shape& s, float (&z)[SIZE]) const {
        constexpr int C = Channels ? Channels : 1;
        const int64_t pixel = first / C, pixels = s.height * s.width;
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int v = 0; v < V; v += 4) {
                float four[4];
                normals(stream, static_cast<uint32_t>((c * pixels + pixel + v) / 4), four);
#pragma unroll
                for (int i = 0; i < 4; ++i) z[(v + i) * C + c] = four[i];
            }
    }
};

// Any other size, order, alignment or mirroring: four elements in C, H, W order, each where its strides say.
struct AnyTile {
    static constexpr int SIZE = 4;
    static constexpr bool WHOLE = false;
    int64_t first, elements;

    static int64_t per_sample(const Shape& s) { return ceil_div(s.channels * s.height * s.width, 4); }

    __device__ __forceinline__ AnyTile(const Shape& s, int64_t index)
        : first(4 * index), elements(s.channels * s.height * s.width) {}

    __device__ __forceinline__ bool has(int i) const { return first + i < elements; }

    __device__ __forceinline__ int64_t offset(const Image& a, const Shape& s, int i, bool flip) const {
        const int64_t pixels = s.height * s.width, channel = (first + i) / pixels;
        int64_t pixel = (first + i) % pixels;
        if (flip) pixel += s.width - 1 - 2 * (pixel % s.width);
        return channel * a.channel_stride + pixel * a.pixel_stride;
    }
    // ``flip`` mirrors the picture left to right.
    __device__ __forceinline__ void load(const Image& a, const Shape& s, int64_t row, float (&x)[SIZE], bool flip = false) const {
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
            x[i] = has(i) ? read(a.dtype, a.data, row * a.sample_stride + offset(a, s, i, flip)) : 0.0f;
    }
    __device__ __forceinline__ void store(const Image& a, const Shape& s, int64_t row, const float (&x)[SIZE]) const {
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
            if (has(i)) write(a.dtype, a.data, row * a.sample_stride + offset(a, s, i, false), x[i]);
    }
    template <class T>
    __device__ __forceinline__ void load_as(const Image& a, const Shape& s, int64_t row, float (&x)[SIZE]) const {
        load(a, s, row, x);
    }
    template <class T>
    __device__ __forceinline__ void store_as(const Image& a, const Shape& s, int64_t row, const float (&x)[SIZE]) const {
        store(a, s, row, x);
    }

    __device__ __forceinline__ void draw(const Stream& stream, const Shape&, float (&z)[SIZE]) const {
        normals(stream, static_cast<uint32_t>(first / 4), z);
    }
};

// Whether tiles of V suit the sample, and every image given: in order, and aligned to what a thread reads at once.
inline bool suits(const Shape& s, int v, std::initializer_list<const Image*> images) {
    const bool nhwc = s.nhwc && s.channels > 1;
    if (nhwc && s.channels > 4) return false;
    if ((nhwc ? s.height * s.width : s.channels * s.height * s.width) % v) return false;
    for (const Image* a : images) {
        if (!a->data) continue;
        const int64_t bytes = element_size(a->dtype) * v * (nhwc ? s.channels : 1), needed = bytes & -bytes;
        if (!a->in_order || alignment(*a, element_size(a->dtype)) < (needed < 16 ? needed : 16)) return false;
    }
    return true;
}

// Call f with the tile for a shape, as a type; f.template operator()<Tile>(). See suits.
template <int V, class F>
cudaError_t with_tile(const Shape& s, bool fast, F f) {
    if (!fast) return f.template operator()<AnyTile>();
    switch (s.nhwc ? s.channels : 1) {
        case 2: return f.template operator()<Tile<V, 2>>();
        case 3: return f.template operator()<Tile<V, 3>>();
        case 4: return f.template operator()<Tile<V, 4>>();
        default: return f.template operator()<Tile<V, 0>>();
    }
}

// One grid for an elementwise kernel: blocks along a sample by samples, of which a block may take several.
template <class T>
Launch over_tiles(const Shape& s, cudaStream_t stream) {
    Launch l;
    const int64_t blocks = ceil_div(T::per_sample(s), THREADS);
    l.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(s.batch < 65535 ? s.batch : 65535));
    // one block is enough for a small sample, and then one of as many warps as it needs
    l.block = dim3(blocks == 1 ? static_cast<unsigned>(ceil_div(T::per_sample(s), 32) * 32) : THREADS);
    l.stream = stream;
    l.dependent = true;
    return l;
}

// f(sample, tile) for the tiles of a thread in such a grid.
template <class T, class F>
__device__ __forceinline__ void for_tiles(const Shape& s, int64_t per_sample, F f) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= per_sample) return;
    const T tile(s, index);
    for (int64_t b = blockIdx.y; b < s.batch; b += gridDim.y) f(b, tile);
}

}  // namespace fastddpm::cuda
