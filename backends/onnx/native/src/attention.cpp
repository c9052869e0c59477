// How an attention call is divided into tasks.
#include "attention_layout.h"

namespace {

constexpr int64_t kFewTokens = 4;   // below, rows over a cache are read one by one
constexpr int64_t kTaskRows = 96;   // query rows (tokens times heads of a group) of a task
constexpr int64_t kSplitKeys = 512; // keys of a task where a long cache is split

}  // namespace

int mqc_attention_in_place(void) { return 1; }

void mqc_attention_prepare(const mqc_attention* a, mqc_attention_plan* plan) {
    const AttentionLayout layout(a);
    const int64_t group = a->heads / a->kv_heads, heads = a->batch * a->kv_heads;
    *plan = {};
    plan->key_blocks = layout.blocks;
    plan->appends = layout.cached ? a->batch * a->tokens : a->mask ? a->mask_batch * a->tokens : 0;
    plan->workspace = layout.states + layout.lines + layout.packed(a);
    if (!layout.cached) plan->packs = heads * layout.blocks;
    if (a->tokens >= kFewTokens || !layout.cached) {
        const int64_t wanted = group < kTaskRows ? kTaskRows / group : 1;
        plan->query_block = wanted < a->tokens ? wanted : a->tokens;
        plan->tasks = heads * ((a->tokens + plan->query_block - 1) / plan->query_block);
        plan->scratch = layout.lanes_scratch(a, plan->query_block * group);
    } else {
        plan->split = (layout.length + kSplitKeys - 1) / kSplitKeys;
        plan->tasks = heads * plan->split;
        plan->scratch = layout.rows_scratch(a, a->tokens * group);
        if (plan->split > 1) {
            plan->combines = a->batch * a->tokens * a->heads;
            plan->workspace += plan->tasks * group * a->tokens * (a->value_dim + 2);
        }
    }
}
