#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

struct Normal {
    Shape shape;
    Tiling tiling;
    Image out;
    Draw draw;
    int64_t buffer;  // floats of a tile; scratch holds one, and what drawing takes
};

struct PhiloxWords {
    int64_t batch, size;
    Draw draw;
    int64_t* out;  // [batch, size]
};

FASTDDPM_DECLARE(normal, const Normal& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(philox_words, const PhiloxWords& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
