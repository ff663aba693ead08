// A batch of pictures dealt out to the threads of kernels that draw noise in registers and mirror pictures.
//
// A thread takes one tile of a sample: Elements, Pixels, Patch or Scattered. Each has
//   SIZE                      numbers of the tile
//   at_once(image)            whether neighbours are read and written together; the launcher notes it as in_order
//   has(i)                    whether number i is one of the sample's
//   load<T>(image, .., x)     as floats; T is their type in memory, or Any: what the image says
//   store<T>(image, .., x)    rounded once
//   draw(stream, shape, z)    the noise that belongs to them
// A thread that has no tile repeats the last one, and stores nothing: so that all lanes of a warp stay together.
#pragma once

#include "common/cuda/noise.cuh"
#include "common/cuda/vec.cuh"

namespace fastddpm::cuda {

constexpr int BLOCK = 128;  // threads: of blocks this small every processor has its share, for small batches too

struct Any {};

// Whether N neighbours of an image can be loaded at once, wherever a multiple of N begins in a sample.
inline bool aligned(const Image& a, int64_t n) {
    const int64_t size = element_size(a.dtype), bytes = size == 8 ? 8 : n * size, needed = bytes & -bytes;
    return alignment(a, size) >= (needed < 16 ? needed : 16);
}

// N neighbours of an image.
template <class T, int N>
__device__ __forceinline__ void load_run(const Image& a, int64_t at, float (&x)[N]) {
    if constexpr (std::is_same_v<T, Any>)
        with_type(a.dtype, a.data, [&](const auto* p) { cuda::load(p + at, x); });
    else
        cuda::load(static_cast<const T*>(a.data) + at, x);
}
template <class T, int N>
__device__ __forceinline__ void store_run(const Image& a, int64_t at, const float (&x)[N]) {
    if constexpr (std::is_same_v<T, Any>)
        with_output_type(a.dtype, a.data, [&](auto* p) { cuda::store(p + at, x); });
    else
        cuda::store(static_cast<T*>(a.data) + at, x);
}

// The sample of a thread in a grid of over_samples; where there is none any more, the last one, and not ``exists``.
struct Sample {
    int64_t number;
    bool exists;

    __device__ __forceinline__ explicit Sample(const Shape& s) {
        number = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
        exists = number < s.batch;
        if (!exists) number = s.batch - 1;
    }
};

// A number of a table [rows, columns] in float32 or float64.
__device__ __forceinline__ float entry(const Values& table, int64_t row, int column) {
    const int64_t i = row * table.row_stride + column;
    return table.dtype == DType::f64 ? to_float(static_cast<const double*>(table.data)[i])
                                     : static_cast<const float*>(table.data)[i];
}

// Which run of a row takes the place of another in the picture turned left to right; the runs of a row are whole ones.
__device__ __forceinline__ uint32_t mirrored(uint32_t run, uint32_t runs_of_row) {
    return run + runs_of_row - 1 - 2 * (run % runs_of_row);
}

// Runs of ``Width`` elements that are neighbours in C, H, W order: where this is the order in memory, they are numbers
// of 16 bytes or less. The runs of a thread lie as far apart as the threads of its row, so that each access of a warp
// is to one piece of memory. The elements of a sample are a multiple of Width; for mirroring, those of a row too.
template <int Width, int Runs>
struct Elements {
    static constexpr int SIZE = Width * Runs, RUNS = Runs, LEAST_ACROSS = 1, SHARED = 0;
    uint32_t run[Runs];
    bool exists[Runs];

    static int64_t count(const Shape& s) { return s.channels * s.height * s.width / Width; }
    static bool at_once(const Image& a) { return a.in_order && aligned(a, Width); }  // must be so

    __device__ __forceinline__ Elements(const Shape&, int64_t count, const Sample& sample) {
#pragma unroll
        for (int k = 0; k < Runs; ++k) {
            const uint32_t number = (blockIdx.x * Runs + k) * blockDim.x + threadIdx.x;
            const uint32_t all = static_cast<uint32_t>(count);
            exists[k] = sample.exists && number < all;
            run[k] = number < all ? number : all - 1;
        }
    }

    __device__ __forceinline__ bool has(int i) const { return exists[i / Width]; }

    template <class T>
    __device__ __forceinline__ void load(const Image& a, const Shape& s, int64_t row, float (&x)[SIZE],
                                         bool mirror = false) const {
        float in[Runs][Width];
#pragma unroll
        for (int k = 0; k < Runs; ++k) {
            const uint32_t from = mirror ? mirrored(run[k], static_cast<uint32_t>(s.width) / Width) : run[k];
            load_run<T>(a, row * a.sample_stride + static_cast<int64_t>(from) * Width, in[k]);
        }
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            const int k = i / Width, j = i % Width;
            x[i] = mirror ? in[k][Width - 1 - j] : in[k][j];
        }
    }

    template <class T>
    __device__ __forceinline__ void store(const Image& a, const Shape&, int64_t row, const float (&x)[SIZE]) const {
#pragma unroll
        for (int k = 0; k < Runs; ++k) {
            float out[Width];
#pragma unroll
            for (int i = 0; i < Width; ++i) out[i] = x[k * Width + i];
            if (exists[k]) store_run<T>(a, row * a.sample_stride + static_cast<int64_t>(run[k]) * Width, out);
        }
    }

    __device__ __forceinline__ void draw(const Stream& stream, const Shape&, float (&z)[SIZE]) const {
#pragma unroll
        for (int i = 0; i < SIZE; i += 4) {
            float four[4];
            normals(stream, run[i / Width] * (Width / 4) + i % Width / 4, four);
#pragma unroll
            for (int j = 0; j < 4; ++j) z[i + j] = four[j];
        }
    }
};

// Four neighbouring pixels with all their channels, in NHWC order: four from each counter of the noise. Side by side
// the tiles of a warp are one piece of memory. What is stored goes through shared memory there, so that neighbouring lanes
// write neighbouring 16 bytes; what is loaded can count on the first cache. An image that lies in another order, or has
// more channels, is read and written number by number.
// The pixels of a sample are a multiple of 16; for mirroring, those of a row one of 4.
template <int Channels>
struct Pixels {
    static constexpr int SIZE = 4 * Channels, RUNS = 1, LEAST_ACROSS = 32;
    static constexpr int SHARED = BLOCK * SIZE * 4;  // bytes of a block
    uint32_t four, first;  // pixels 4 four .. 4 four + 3; the tile of the first lane
    int tiles;             // of the warp, from its first lane on
    bool exists;

    static int64_t count(const Shape& s) { return s.height * s.width / 4; }
    static bool at_once(const Image& a) { return a.in_order && aligned(a, SIZE); }

    __device__ __forceinline__ Pixels(const Shape&, int64_t count, const Sample& sample) {
        const uint32_t number = blockIdx.x * blockDim.x + threadIdx.x, all = static_cast<uint32_t>(count);
        first = number - threadIdx.x % 32;
        tiles = !sample.exists || first >= all ? 0 : all - first < 32 ? static_cast<int>(all - first) : 32;
        exists = sample.exists && number < all;
        four = number < all ? number : all - 1;
    }

    __device__ __forceinline__ bool has(int) const { return exists; }

    // Where number i of the tile lies in a row of any image; ``from`` may be the tile that it mirrors.
    __device__ __forceinline__ int64_t place(const Image& a, int64_t row, uint32_t from, int i) const {
        const int64_t pixel = 4 * static_cast<int64_t>(from) + i / Channels;
        return row * a.sample_stride + i % Channels * a.channel_stride + pixel * a.pixel_stride;
    }

    template <class T>
    __device__ __forceinline__ void load(const Image& a, const Shape& s, int64_t row, float (&x)[SIZE],
                                         bool mirror = false) const {
        float in[SIZE];
        const uint32_t from = mirror ? mirrored(four, static_cast<uint32_t>(s.width) / 4) : four;
        if (!std::is_same_v<T, Any> || a.in_order) {
            load_run<T>(a, row * a.sample_stride + static_cast<int64_t>(from) * SIZE, in);
        } else {
#pragma unroll
            for (int i = 0; i < SIZE; ++i) in[i] = read(a.dtype, a.data, place(a, row, from, i));
        }
#pragma unroll
        for (int i = 0; i < SIZE; ++i) x[i] = mirror ? in[(3 - i / Channels) * Channels + i % Channels] : in[i];
    }

    template <class T>
    __device__ __forceinline__ void store(const Image& a, const Shape&, int64_t row, const float (&x)[SIZE]) const {
        if constexpr (!std::is_same_v<T, Any>) {
            store_together(static_cast<T*>(a.data) + row * a.sample_stride, x);
        } else if (a.in_order) {
            with_output_type(a.dtype, a.data, [&](auto* p) { store_together(p + row * a.sample_stride, x); });
        } else {
#pragma unroll
            for (int i = 0; i < SIZE; ++i)
                if (exists) write(a.dtype, a.data, place(a, row, four, i), x[i]);
        }
    }

    __device__ __forceinline__ void draw(const Stream& stream, const Shape& s, float (&z)[SIZE]) const {
        const uint32_t fours = static_cast<uint32_t>(s.height * s.width / 4);
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
            float of_channel[4];
            normals(stream, static_cast<uint32_t>(c) * fours + four, of_channel);
#pragma unroll
            for (int v = 0; v < 4; ++v) z[v * Channels + c] = of_channel[v];
        }
    }

private:
    // Where 16 bytes lie in the shared memory of the warp. Tiles of 32 or 64 bytes would meet in its banks otherwise.
    template <int Words>
    __device__ __forceinline__ static int bank(int chunk) {
        return Words % 8 == 0 ? chunk ^ ((chunk >> 3) & 7) : chunk;
    }

    template <class T>
    __device__ __forceinline__ void store_together(T* sample, const float (&x)[SIZE]) const {
        constexpr int WORDS = SIZE * static_cast<int>(sizeof(T)) / 4, CHUNKS = 32 * WORDS / 4;
        const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x), lane = thread % 32;
        uint4* place = shared_memory<uint4>() + thread / 32 * CHUNKS;
        unsigned w[WORDS];
        pack<T>(x, w);
        __syncwarp();  // what was put here before has been read
        if constexpr (WORDS % 4 == 0) {
#pragma unroll
            for (int j = 0; j < WORDS / 4; ++j)
                place[bank<WORDS>(lane * (WORDS / 4) + j)] =
                    make_uint4(w[4 * j], w[4 * j + 1], w[4 * j + 2], w[4 * j + 3]);
        } else {
            store_words(reinterpret_cast<unsigned*>(place) + lane * WORDS, w);
        }
        __syncwarp();
        uint4* to = reinterpret_cast<uint4*>(sample + static_cast<int64_t>(first) * SIZE);
        const int chunks = tiles * WORDS / 4;
#pragma unroll
        for (int k = 0; k < (CHUNKS + 31) / 32; ++k) {
            const int chunk = 32 * k + lane;
            if (chunk < chunks) to[chunk] = place[bank<WORDS>(chunk)];
        }
    }
};

// Four neighbouring pixels with four of their many channels, in NHWC order: four from each counter of the noise.
// The channels are a multiple of four, and so are the pixels of a sample and, for mirroring, those of a row.
struct Patch {
    static constexpr int SIZE = 16, RUNS = 1, LEAST_ACROSS = 1, SHARED = 0;
    uint32_t four, channel;  // pixels 4 four .. 4 four + 3, channels channel .. channel + 3
    bool exists;

    static int64_t count(const Shape& s) { return s.channels * s.height * s.width / SIZE; }
    static bool at_once(const Image& a) { return a.channel_stride == 1 && a.pixel_stride % 4 == 0 && aligned(a, 4); }

    __device__ __forceinline__ Patch(const Shape& s, int64_t count, const Sample& sample) {
        const uint32_t number = blockIdx.x * blockDim.x + threadIdx.x, all = static_cast<uint32_t>(count);
        const uint32_t tile = number < all ? number : all - 1, across = static_cast<uint32_t>(s.channels) / 4;
        exists = sample.exists && number < all;
        four = tile / across, channel = tile % across * 4;
    }

    __device__ __forceinline__ bool has(int) const { return exists; }

    __device__ __forceinline__ int64_t place(const Image& a, int64_t row, uint32_t from, int pixel) const {
        const int64_t number = 4 * static_cast<int64_t>(from) + pixel;
        return row * a.sample_stride + channel * a.channel_stride + number * a.pixel_stride;
    }

    template <class T>
    __device__ __forceinline__ void load(const Image& a, const Shape& s, int64_t row, float (&x)[SIZE],
                                         bool mirror = false) const {
        const uint32_t from = mirror ? mirrored(four, static_cast<uint32_t>(s.width) / 4) : four;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const int64_t at = place(a, row, from, mirror ? 3 - v : v);
            float channels[4];
            if (a.in_order) {
                load_run<T>(a, at, channels);
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c) channels[c] = read(a.dtype, a.data, at + c * a.channel_stride);
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) x[4 * v + c] = channels[c];
        }
    }

    template <class T>
    __device__ __forceinline__ void store(const Image& a, const Shape&, int64_t row, const float (&x)[SIZE]) const {
        if (!exists) return;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const int64_t at = place(a, row, four, v);
            const float channels[4] = {x[4 * v], x[4 * v + 1], x[4 * v + 2], x[4 * v + 3]};
            if (a.in_order) {
                store_run<T>(a, at, channels);
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c) write(a.dtype, a.data, at + c * a.channel_stride, channels[c]);
            }
        }
    }

    __device__ __forceinline__ void draw(const Stream& stream, const Shape& s, float (&z)[SIZE]) const {
        const uint32_t fours = static_cast<uint32_t>(s.height * s.width / 4);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float of_channel[4];
            normals(stream, (channel + c) * fours + four, of_channel);
#pragma unroll
            for (int v = 0; v < 4; ++v) z[4 * v + c] = of_channel[v];
        }
    }
};

// Any other size, order or mirroring: four elements in C, H, W order, each where its strides say.
struct Scattered {
    static constexpr int SIZE = 4, RUNS = 1, LEAST_ACROSS = 1, SHARED = 0;
    int64_t counter, channel[4], pixel[4], column[4];
    int size;

    static int64_t count(const Shape& s) { return ceil_div(s.channels * s.height * s.width, 4); }
    static bool at_once(const Image&) { return false; }

    __device__ __forceinline__ Scattered(const Shape& s, int64_t count, const Sample& sample) {
        const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
        counter = number < count ? number : count - 1;
        const int64_t pixels = s.height * s.width, left = s.channels * pixels - 4 * counter;
        size = !sample.exists || number >= count ? 0 : left < 4 ? static_cast<int>(left) : 4;
        channel[0] = 4 * counter / pixels, pixel[0] = 4 * counter % pixels, column[0] = pixel[0] % s.width;
#pragma unroll
        for (int i = 1; i < 4; ++i) {
            const bool row_ends = column[i - 1] + 1 == s.width, channel_ends = pixel[i - 1] + 1 == pixels;
            column[i] = row_ends ? 0 : column[i - 1] + 1;
            pixel[i] = channel_ends ? 0 : pixel[i - 1] + 1;
            channel[i] = channel[i - 1] + channel_ends;
        }
    }

    __device__ __forceinline__ bool has(int i) const { return i < size; }

    __device__ __forceinline__ int64_t place(const Image& a, const Shape& s, int64_t row, int i, bool mirror) const {
        const int64_t p = mirror ? pixel[i] + s.width - 1 - 2 * column[i] : pixel[i];
        return row * a.sample_stride + channel[i] * a.channel_stride + p * a.pixel_stride;
    }
    template <class>
    __device__ __forceinline__ void load(const Image& a, const Shape& s, int64_t row, float (&x)[4],
                                         bool mirror = false) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = has(i) ? read(a.dtype, a.data, place(a, s, row, i, mirror)) : 0.0f;
    }
    template <class>
    __device__ __forceinline__ void store(const Image& a, const Shape& s, int64_t row, const float (&x)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (has(i)) write(a.dtype, a.data, place(a, s, row, i, false), x[i]);
    }
    __device__ __forceinline__ void draw(const Stream& stream, const Shape&, float (&z)[4]) const {
        normals(stream, static_cast<uint32_t>(counter), z);
    }
};

// Whether tiles Elements<Width, ..>, Pixels<C>, C the channels, or Patch suit a sample; of Elements its images, too.
inline bool suits_elements(const Shape& s, int64_t width, bool mirrors) {
    const int64_t elements = s.channels * s.height * s.width;
    return !s.nhwc && elements % width == 0 && elements < (int64_t(1) << 32) && !(mirrors && s.width % width);
}
inline bool suits_pixels(const Shape& s, bool mirrors) {
    const int64_t pixels = s.height * s.width;
    return s.nhwc && 2 <= s.channels && s.channels <= 4 && pixels % 16 == 0 && pixels < (int64_t(1) << 32) &&
           !(mirrors && s.width % 4);
}
inline bool suits_patch(const Shape& s, bool mirrors) {
    const int64_t pixels = s.height * s.width;
    return s.nhwc && s.channels % 4 == 0 && pixels % 4 == 0 && s.channels * pixels < (int64_t(1) << 32) &&
           !(mirrors && s.width % 4);
}

// The tile for a call with any options, as f.template operator()<Tile>().
template <class F>
auto with_any_tile(const Shape& s, bool mirrors, std::initializer_list<const Image*> images, F f) {
    if (suits_pixels(s, mirrors)) switch (s.channels) {
            case 2: return f.template operator()<Pixels<2>>();
            case 3: return f.template operator()<Pixels<3>>();
            default: return f.template operator()<Pixels<4>>();
        }
    if (suits_patch(s, mirrors)) return f.template operator()<Patch>();
    bool in_fours = suits_elements(s, 4, mirrors);
    for (const Image* a : images) in_fours = in_fours && (!a->data || Elements<4, 1>::at_once(*a));
    if (in_fours) return f.template operator()<Elements<4, 1>>();
    return f.template operator()<Scattered>();
}

// Note which images are read and written at once.
template <class Tile>
void look_at(std::initializer_list<Image*> images) {
    for (Image* a : images) a->in_order = Tile::at_once(*a);
}

// Blocks along a sample, by blocks of samples. A block is so wide that it fits along a sample, and takes several
// samples where these are small. It depends on the shape of a sample alone, and so does the order of every sum.
template <class Tile>
Launch over_samples(const Shape& s, cudaStream_t stream) {
    const int64_t threads = ceil_div(Tile::count(s), Tile::RUNS);
    int64_t across = Tile::LEAST_ACROSS;
    if (threads <= 32) {
        while (across < threads) across *= 2;
    } else {
        const auto idle = [&] { return ceil_div(threads, across) * across - threads; };
        for (across = BLOCK; across > 32 && 8 * idle() > threads;) across /= 2;
    }
    const int64_t samples = BLOCK / across, rows = ceil_div(s.batch, samples), layers = ceil_div(rows, 65535);
    Launch l;
    l.grid = dim3(static_cast<unsigned>(ceil_div(threads, across)),
                  static_cast<unsigned>(layers ? ceil_div(rows, layers) : 0), static_cast<unsigned>(layers));
    l.block = dim3(static_cast<unsigned>(across), static_cast<unsigned>(samples));
    l.shared = Tile::SHARED;
    l.stream = stream;
    l.dependent = true;
    return l;
}

}  // namespace fastddpm::cuda
