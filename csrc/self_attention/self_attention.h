#pragma once

#include "common/data.h"
#include "common/isa.h"
#include "common/panels.h"

namespace fastddpm {

constexpr int64_t QUERIES = 48;  // of a work item: their scores lie in the second cache

// y = softmax(q k^T / sqrt(d)) v of each head of each sample. Rows of q, k and v lie side by side: [batch, tokens, 3, heads,
// d], and those of y as [batch, tokens, heads, d].
struct SelfAttention {
    int64_t batch, heads, tokens, width;  // width: d
    bool pairs;                           // of bfloat16 are multiplied where both factors are of that dtype
    Values qkv;
    void *keys, *values;  // panels: [batch, heads, ceil(tokens / 32), d, 32] and [batch, heads, ceil(d / 32), tokens, 32]
    DType dtype;          // of qkv and y
    void* y;
    float* weights;       // what v is weighed with, [batch, heads, tokens, tokens], or nullptr
};

// What of qkv is brought to panels: one of q, k and v, tokens or d being what their columns are.
struct AttentionPanels {
    SelfAttention of;
    int64_t which;
    bool of_tokens, pairs;
    void* to;
};

// The gradient of qkv, by that of the scores: ds = w (dw - sum(w dw)) / sqrt(d), dw = dy v^T.
struct AttentionGradient {
    SelfAttention of;  // whose values are panels of tokens, and whose keys are panels of d, and numbers
    Values dy;
    float* dscores;    // [batch, heads, tokens, tokens]
    void* gradient;    // as qkv, and in its dtype
};

constexpr int64_t ATTENTION_SCRATCH(int64_t tokens, int64_t width) {
    const int64_t panels = (tokens + PANEL - 1) / PANEL;
    return QUERIES * (width + panels * PANEL + tokens + PANEL) + 4 * APART;
}
constexpr int64_t ATTENTION_COLUMNS_SCRATCH = COLUMNS_SCRATCH + WIDE * TALL;

FASTDDPM_DECLARE(self_attention_pack, const AttentionPanels& a, int64_t begin, int64_t end)
FASTDDPM_DECLARE(self_attention_forward, const SelfAttention& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(self_attention_scores, const AttentionGradient& a, int64_t begin, int64_t end, float* scratch)
FASTDDPM_DECLARE(self_attention_columns, const AttentionGradient& a, int64_t begin, int64_t end, float* scratch)

}  // namespace fastddpm
