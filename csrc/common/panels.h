// How matrices are cut for their products: sizes that host code and kernels share.
#pragma once

#include <cstdint>

namespace fastddpm {

constexpr int64_t PANEL = 32;   // columns of a matrix that lie together: of a weight, output channels
constexpr int64_t TERMS = 64;   // of a sum of products
constexpr int64_t LINE = 64;    // bytes of the cache
constexpr int64_t APART = 16;   // floats between matrices: a power of two apart they would meet in one place of the cache
constexpr int64_t WIDE = 128;   // columns of a product d^T x that are summed at a time ..
constexpr int64_t TALL = 128;   // .. and its rows
constexpr int64_t TOKENS = 32;  // rows of d and x that it takes at a time: numbers, or pairs
constexpr int64_t COLUMNS_SCRATCH = TOKENS * (WIDE + TALL) + 2 * APART;  // floats that these take

}  // namespace fastddpm
