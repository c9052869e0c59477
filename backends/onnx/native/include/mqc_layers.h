/* Kernels between the linears: quantization, RMSNorm, activations, Hadamard, rotary, attention.
 *
 * Plain C, no framework, no threads: a caller gives ranges of rows or tasks to threads of its own.
 * All tensors are dense and row-major; float is float32. Nothing is checked here: shapes and
 * pointers are the caller's duty.
 */
#ifndef MQC_LAYERS_H
#define MQC_LAYERS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MQC_LAYERS_API __attribute__((visibility("default")))
#else
#define MQC_LAYERS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* "generic", "neon", "avx2" or "avx512": the copy in use, by mqc_isa() and mqc_set_isa() of
 * mqc_kernels.h. */
MQC_LAYERS_API const char* mqc_layers_isa(void);

/* The static scale of a row: scale[0], or scale[visual] where the scales are two. */
typedef struct mqc_row_scales {
    const float* scale;   /* [1], or [2]: text, visual */
    const uint8_t* mask;  /* a bool for every row (1 = visual), or NULL */
    const int64_t* count; /* leading visual rows of each sequence, or NULL */
    int64_t tokens;       /* rows of a sequence, used with count */
} mqc_row_scales;

/* out = clamp(round_half_even(x / scale), -127, 127), + 128 as uint8 where is_unsigned.
 * Rows [begin, end) of x [rows, n] and out. Equal to the division in every bit. */
MQC_LAYERS_API void mqc_quantize(const float* x, int64_t begin, int64_t end, int64_t n,
                                 const mqc_row_scales* scales, int is_unsigned, void* out);

/* y = x / sqrt(mean(x^2) + eps), quantized as above; x_split [rows, splits] = y[:, split]. */
MQC_LAYERS_API void mqc_rms_norm_quantize(const float* x, int64_t begin, int64_t end, int64_t n,
                                          float eps, const mqc_row_scales* scales, int is_unsigned,
                                          void* out, const int64_t* split, int64_t splits,
                                          float* x_split);

/* The transform of blocks of base * 2^log2 values: H = matrix (x) Sylvester, divided by
 * sqrt(block). matrix: +1 and -1, [base, base], or NULL for base 1. Returns NULL where the order
 * is no positive int32 or there is no memory. */
typedef struct mqc_hadamard_plan mqc_hadamard_plan;
MQC_LAYERS_API mqc_hadamard_plan* mqc_hadamard_create(int64_t base, int log2, const int8_t* matrix);
MQC_LAYERS_API void mqc_hadamard_free(mqc_hadamard_plan* plan);
MQC_LAYERS_API int64_t mqc_hadamard_block(const mqc_hadamard_plan* plan);
/* Floats of scratch that a transform with this plan needs. */
MQC_LAYERS_API int64_t mqc_hadamard_scratch(const mqc_hadamard_plan* plan);
/* y[b] = H x[b] / sqrt(block) for `blocks` consecutive blocks; x may be y. */
MQC_LAYERS_API void mqc_hadamard(const mqc_hadamard_plan* plan, const float* x, int64_t blocks,
                                 float* y, float* scratch);

enum {
    MQC_IDENTITY = 0,
    MQC_SILU = 1,
    MQC_GELU = 2,
    MQC_GELU_TANH = 3,
    MQC_QUICK_GELU = 4, /* x * sigmoid(1.702 x) */
    MQC_RELU = 5
};

typedef struct mqc_activation {
    int function;                  /* one of the above */
    int gated;                     /* x = [gate, up]: y = f(gate) * up */
    const mqc_hadamard_plan* plan; /* over the n values of y, or NULL */
    const int64_t* split;          /* channels of y that are kept in float */
    int64_t splits;
    int is_unsigned;
} mqc_activation;

/* Floats of scratch for rows of n values. */
MQC_LAYERS_API int64_t mqc_activation_scratch(const mqc_activation* a, int64_t n);
/* Rows [begin, end) of x [rows, n or 2n]: activation, Hadamard, x_split = y[:, split], quantize. */
MQC_LAYERS_API void mqc_activation_quantize(const mqc_activation* a, const float* x, int64_t begin,
                                            int64_t end, int64_t n, const mqc_row_scales* scales,
                                            void* xq, float* x_split, float* scratch);

/* y[row] = weight[ids[row]] * scale[ids[row]]; weight int8 [vocabulary, n]. */
MQC_LAYERS_API void mqc_embedding_w8(const int64_t* ids, int64_t begin, int64_t end, int64_t n,
                                     const int8_t* weight, const float* scale, float* y);

/* out = y + x_split w_split^T; y and out [rows, n], x_split [rows, k], w_split [n, k]. */
MQC_LAYERS_API void mqc_rank_update(const float* y, const float* x_split, const float* w_split,
                                    int64_t begin, int64_t end, int64_t n, int64_t k, float* out);

enum { MQC_ROTARY_NONE = 0, MQC_ROTARY_HALF = 1, MQC_ROTARY_INTERLEAVED = 2 };

/* Attention of S tokens. Query head h reads key head h / (heads / kv_heads).
 * With a cache: it has room for `capacity` rows, `past` of them valid; k and v are the S new ones.
 * Without (key_cache and key_bytes NULL): k and v have `keys` rows, and no other are read; past
 * is 0. */
typedef struct mqc_attention {
    int64_t batch, tokens, heads, kv_heads, dim, value_dim, past, capacity, keys;
    int rotary;
    int64_t rotary_dim;     /* even; the first channels of a head */
    int64_t angle_batch;    /* sequences of cosine and sine: batch, or 1 for all */
    int64_t mask_batch;     /* sequences of mask: batch, or 1 for all */
    int64_t mask_columns;   /* at least the keys; later columns are not read */
    float scale;
    const float* q;         /* [B, S, heads, dim], a token every q_stride floats; k, v alike */
    const float* k;         /* [B, S or keys, kv_heads, dim] */
    const float* v;         /* [B, S or keys, kv_heads, value_dim] */
    int64_t q_stride, k_stride, v_stride;
    const float* cosine;    /* [angle_batch, S, rotary_dim]; without a cache keys is S then */
    const float* sine;
    const uint8_t* mask;    /* [mask_batch, S, mask_columns], 1 = may attend; NULL: all may */
    float* key_cache;       /* [B, kv_heads, capacity, dim]: rows [0, past) are read; or NULL */
    float* value_cache;     /* [B, kv_heads, capacity, value_dim]; or NULL */
    float* out;             /* [B, S, heads * value_dim] */
    /* Or int8 caches in place of key_cache and value_cache: a row is its bytes times its scale, the
     * largest magnitude over 127 (1 for zeros), and quantized as by mqc_quantize. */
    int8_t* key_bytes;
    int8_t* value_bytes;
    float* key_scale;       /* [B, kv_heads, capacity] */
    float* value_scale;
} mqc_attention;

/* 1: the cache is both read and written, so a host binds one buffer to a node's input and output. */
MQC_LAYERS_API int mqc_attention_in_place(void);

/* How a call is divided. Fill it with mqc_attention_prepare, allocate `workspace` floats, then run
 * the phases one after another, the tasks of each in any order and on any threads:
 *   append:  `appends` tasks (may be 0) write the new keys (rotated) and values into the cache
 *   pack:    `packs` tasks (may be 0)
 *   attend:  `tasks` tasks, each with `scratch` floats of its own
 *   combine: `combines` tasks (may be 0) */
typedef struct mqc_attention_plan {
    int64_t appends, packs, tasks, combines, scratch, workspace;
    int64_t query_block, key_blocks, split; /* private */
} mqc_attention_plan;

MQC_LAYERS_API void mqc_attention_prepare(const mqc_attention* a, mqc_attention_plan* plan);
MQC_LAYERS_API void mqc_attention_append(const mqc_attention* a, const mqc_attention_plan* plan,
                                         float* workspace, int64_t task);
MQC_LAYERS_API void mqc_attention_pack(const mqc_attention* a, const mqc_attention_plan* plan,
                                       float* workspace, int64_t task);
MQC_LAYERS_API void mqc_attention_attend(const mqc_attention* a, const mqc_attention_plan* plan,
                                         float* workspace, float* scratch, int64_t task);
MQC_LAYERS_API void mqc_attention_combine(const mqc_attention* a, const mqc_attention_plan* plan,
                                          const float* workspace, int64_t task);

#ifdef __cplusplus
}
#endif
#endif
