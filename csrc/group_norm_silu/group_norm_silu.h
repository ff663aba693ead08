#pragma once

#include "common/data.h"
#include "common/isa.h"

namespace fastddpm {

// What is summed over the pixels of each channel in backward, a row of C numbers each. The finish derives DX from the
// others, where the gradient of a channel bias is made of it.
enum Sum { DA, DA_CENTRED, CENTRED, DH, DX, SUMS };

// The numbers of each channel of a sample, a row of ``row`` floats each. CENTRE, GAIN, OFFSET: a = (h' - centre) gain + offset
// goes into the activation, h' = h less the channel bias. REST is what the rounding of centre took away; it is in the offset.
// In backward dx = da gain + (h' - centre) slope + level.
enum Number { CENTRE, GAIN, OFFSET, REST, SLOPE, LEVEL, NUMBERS };

// Moments of the elements of one group in one span.
struct Moments {
    double count, mean, squares;  // squares: of the deviations from the mean
};

// A work item is (sample, span). In NHWC order a span is a range of pixels with all their channels; in NCHW order it is
// a group of channels. It is walked in blocks that stay in the cache: ``block`` pixels of it.
struct GroupNorm {
    Shape shape;        // C counts the channels of x and x2
    int64_t channels2;  // of x2
    int64_t groups, spans, span_pixels, block;
    Image x, x2, residual, y, h;                      // forward
    Image dy, dh, dx, dx2, dresidual;                 // backward
    Values weight, bias, channel_bias, scale, shift;  // [C] or [B, C]
    float eps, keep_scale;                            // keep_scale: 1 / (1 - dropout)
    bool activation;
    Draw draw;              // of dropout; no sample: none
    uint64_t drop_below;    // words below it drop their element
    double* mean;           // [B, G]
    float* rstd;            // [B, G]
    Moments* moments;       // [B, spans, G], in NCHW order [B, G]
    double* sums;           // [B, spans, SUMS, C], in NCHW order [B, SUMS, C]; finish leaves the totals in span 0
    float* numbers;         // [NUMBERS, row] of each sample, or, with a stride of 0, of the one at hand
    int64_t row, numbers_stride;
    float* kept;            // da, [C, H, W] of the sample at hand; or it is made again
    int64_t past_caches;    // bytes from which on a tensor of float32 is written past the caches
    int64_t scratch;        // floats that a call needs, and of these
    int64_t draw_scratch;   // for drawing dropout
};

FASTDDPM_DECLARE(group_norm_statistics, const GroupNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(group_norm_finish, const GroupNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(group_norm_apply, const GroupNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(group_norm_backward_numbers, const GroupNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(group_norm_backward_sums, const GroupNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(group_norm_backward_finish, const GroupNorm& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(group_norm_backward_apply, const GroupNorm& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
