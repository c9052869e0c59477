/* mqc_cuda.h: the C ABI of libmqc_cuda.so.
 *
 * Rules that hold for every function:
 * - Pointers are device pointers unless said otherwise. `stream` is a cudaStream_t; work is enqueued
 *   on it and nothing is synchronised, so every call may be captured into a CUDA graph. No call
 *   allocates device memory. (The section "memory" says where its functions differ.)
 * - Argument structs are plain data. Set `size` to sizeof of the struct you compiled against and
 *   zero what you do not use: a zero field means "none" or "default". A struct may be kept and
 *   reused; the library keeps no pointer to it.
 * - The result is an mqc_status. mqc_last_error() holds the sentence that belongs to the last
 *   failure on the calling host thread. Arguments are checked before anything is launched.
 * - Strides are in elements and count from one row (token) to the next.
 * - Floats of half types are widened to float32, computed, and rounded once where the unfused
 *   operator would round (to nearest even), so fused and unfused programs agree.
 */
#ifndef MQC_CUDA_H
#define MQC_CUDA_H

#include <stdint.h>

#if defined(MQC_BUILDING)
#define MQC_API __attribute__((visibility("default")))
#else
#define MQC_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MQC_ABI_VERSION 3

typedef enum mqc_status {
  MQC_OK = 0,
  MQC_ERROR_ARGUMENT = 1,    /* an argument is out of its range, misaligned or missing */
  MQC_ERROR_UNSUPPORTED = 2, /* valid, but this library has no kernel for it */
  MQC_ERROR_DEVICE = 3,      /* the current device is not one the library was built for */
  MQC_ERROR_WORKSPACE = 4,   /* the workspace is missing or too small */
  MQC_ERROR_CUDA = 5,        /* the CUDA runtime or driver refused; mqc_last_error has its words */
  MQC_ERROR_ABI = 6          /* `size` is not a struct size this library knows */
} mqc_status;

typedef enum mqc_dtype { MQC_BF16 = 1, MQC_F16 = 2, MQC_F32 = 3, MQC_I8 = 4 } mqc_dtype;

/* How rows find their activation scale. scale[0] is text, scale[1] visual. */
typedef enum mqc_modality {
  MQC_MODALITY_NONE = 0,  /* one scale: scale is float32 [1] */
  MQC_MODALITY_COUNT = 1, /* int64 [rows / rows_per_sequence]: leading visual rows of a sequence */
  MQC_MODALITY_MASK = 2   /* bool (bytes 0 or 1) [rows]: 1 = visual */
} mqc_modality;

/* Weight layouts, made by mqc.cuda.pack. All hold tiles of 64 output channels by 128 inputs,
 * ordered [ceil(n / 64)][ceil(k / 128)], padded with zeros; see include/mqc/layout.cuh. Those of
 * a G have a scale of each channel for every 32, 64 or 128 inputs: float32, in the tiles. */
typedef enum mqc_layout {
  MQC_LAYOUT_W4_64X128 = 1,      /* 4096 bytes a tile */
  MQC_LAYOUT_W8_64X128 = 2,      /* 8192 bytes a tile */
  MQC_LAYOUT_W4_64X128_G32 = 3,  /* 4096 + 1024 */
  MQC_LAYOUT_W4_64X128_G64 = 4,  /* 4096 + 512 */
  MQC_LAYOUT_W4_64X128_G128 = 5, /* 4096 + 256 */
  MQC_LAYOUT_W8_64X128_G32 = 6,  /* 8192 + 1024 */
  MQC_LAYOUT_W8_64X128_G128 = 7  /* 8192 + 256 */
} mqc_layout;

typedef enum mqc_linear_kernel {
  MQC_LINEAR_AUTO = 0,
  MQC_LINEAR_MMA_8 = 1,    /* mma.sync, 64 channels x 8 tokens a block, split K */
  MQC_LINEAR_MMA_16 = 2,   /* ... x 16 tokens */
  MQC_LINEAR_MMA_32 = 3,   /* ... x 32 tokens; int8 rows */
  MQC_LINEAR_MMA_64 = 4,   /* ... x 64 tokens; 128 channels where rows are floats */
  MQC_LINEAR_MMA_128 = 5,  /* mma.sync, 128 channels x 128 tokens a block */
  MQC_LINEAR_WGMMA = 6     /* sm_90a, int8 rows: 256 channels x 128 tokens, persistent; no workspace */
} mqc_linear_kernel;

MQC_API int mqc_abi_version(void);
/* Static text of a status code. */
MQC_API const char* mqc_status_text(int status);
/* Sentence of the last failure on this host thread ("" if there was none). */
MQC_API const char* mqc_last_error(void);
/* MQC_OK if the current device can run the kernels; else MQC_ERROR_DEVICE or MQC_ERROR_CUDA. */
MQC_API int mqc_check_device(void);

/* ---- memory ---------------------------------------------------------------------------------
 * For callers without a framework that has device memory. Sizes and strides are in bytes; nothing
 * is done for zero bytes. */
/* 1 where the kernels read the host's memory (the emulator of the tests), 0 on a GPU. */
MQC_API int mqc_memory_on_host(void);
/* Zeroed memory of the current device, aligned to 256 bytes; waits until it is ready for all
 * streams. mqc_memory_free waits for the work that may use it. */
MQC_API int mqc_memory_allocate(int64_t bytes, void** memory);
MQC_API int mqc_memory_free(void* memory);
/* From pageable memory of the host, which may be changed as soon as this returns. Without a stream
 * it waits until the copy is there for all streams. */
MQC_API int mqc_memory_upload(void* to, const void* from, int64_t bytes, void* stream);
/* Rows of `width` bytes, on the device. The two do not overlap. */
MQC_API int mqc_memory_copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride,
                                 int64_t width, int64_t rows, void* stream);
/* Rows of `width` float32 values to float16, to nearest even (beyond its range: its largest value),
 * and back. These strides count elements. */
MQC_API int mqc_rows_to_f16(void* to, int64_t to_stride, const float* from, int64_t from_stride,
                            int64_t width, int64_t rows, void* stream);
MQC_API int mqc_rows_to_f32(float* to, int64_t to_stride, const void* from, int64_t from_stride,
                            int64_t width, int64_t rows, void* stream);

/* ---- linear ---------------------------------------------------------------------------------
 * y[r, c] = round(x[r, :] . w[c, :] * w_scale[c] * x_scale[row r] + bias[c]
 *                 + sum_j x_split[r, j] * w_split[c, j])       then, where given,
 * y[r, c] = round(y[r, c] + residual[r, c])
 * The product is exact in int32 for k <= 131072; the rest is float32 in the order written. With
 * scales of groups x . w is the sum over groups of scale * (product of the group, exact): float32,
 * one rounding a group, in an order that depends on the kernel and split_k alone.
 *
 * Rows may also be floats (x_dtype MQC_BF16 or MQC_F16; weights alone are quantized): there is no
 * x_scale, products of values and integers are exact and summed in float32 by the tensor cores, by
 * groups or 128 inputs at a time; scales multiply these sums. y is of x's type or float32. */
typedef struct mqc_linear_args {
  uint32_t size;
  int32_t kernel;        /* mqc_linear_kernel */
  int32_t layout;        /* mqc_layout */
  int32_t dtype;         /* of y, residual and x_split: MQC_BF16, MQC_F16 or MQC_F32 */
  int32_t modality_kind; /* mqc_modality */
  int32_t split_columns; /* columns of x_split and w_split, 0..64 */
  int32_t split_k;       /* blocks along k, 0 = choose; ignored by MQC_LINEAR_WGMMA */
  int32_t x_dtype;       /* MQC_I8 or 0: int8; MQC_BF16 or MQC_F16, and dtype the same or MQC_F32 */
  int64_t rows, n, k;    /* rows of x, output channels, inputs */
  int64_t rows_per_sequence; /* for MQC_MODALITY_COUNT */
  int64_t x_stride;      /* >= k, its bytes a multiple of 16. Values from k to the stride are not used */
  int64_t y_stride, residual_stride, x_split_stride;
  const void* x;         /* x_dtype [rows, x_stride], 16-byte aligned */
  const void* w;         /* packed, 16-byte aligned */
  const float* w_scale;  /* [n] */
  const float* x_scale;  /* [1] or [2]; NULL for rows of floats */
  const void* modality;  /* by modality_kind */
  const float* bias;     /* [n] or NULL */
  const void* x_split;   /* dtype [rows, split_columns] or NULL */
  const float* w_split;  /* [n, split_columns] or NULL */
  const void* residual;  /* dtype [rows, n] or NULL; may be y itself */
  void* y;               /* dtype [rows, n] */
  void* workspace;       /* see mqc_linear_workspace */
  int64_t workspace_bytes;
} mqc_linear_args;

/* Bytes of workspace for these sizes on the current device (kernel, layout, rows, n, k, split_k are
 * read, and x_dtype), the largest over rows' = 1..rows when kernel is MQC_LINEAR_AUTO. Zero the workspace once
 * after allocation; every kernel leaves its counters zero. Calls that may run at the same time (two
 * streams) need a workspace each. */
MQC_API int mqc_linear_workspace(const mqc_linear_args* args, int64_t* bytes);
/* The kernel that MQC_LINEAR_AUTO takes for these sizes on the current device. */
MQC_API int mqc_linear_choice(const mqc_linear_args* args, int32_t* kernel, int32_t* split_k);
MQC_API int mqc_linear(const mqc_linear_args* args, void* stream);

/* ---- RMSNorm + quantize ---------------------------------------------------------------------
 * h = round(x * rsqrt(mean(x^2) + eps)); xq = clamp(round_half_even(h / scale[row]), -127, 127) */
typedef struct mqc_norm_args {
  uint32_t size;
  int32_t dtype;         /* of x and h */
  int32_t modality_kind;
  float eps;
  int64_t rows, columns; /* columns: at most 16384 */
  int64_t rows_per_sequence;
  int64_t x_stride, xq_stride, h_stride;
  const void* x;
  const float* scale;    /* [1] or [2]; NULL: no xq */
  const void* modality;
  int8_t* xq;            /* NULL: only h */
  void* h;               /* the normalised rows in dtype, or NULL */
} mqc_norm_args;

MQC_API int mqc_rms_norm_quantize(const mqc_norm_args* args, void* stream);

/* ---- activation + Hadamard + split + quantize -----------------------------------------------
 * gated: x = [gate, up] on the last axis, y = round(round(act(gate)) * up); else y = round(act(x)).
 * y = round(blockwise Hadamard of y / sqrt(block)); x_split = y[:, split]; xq = quantize(y). */
typedef enum mqc_activation {
  MQC_ACT_IDENTITY = 0,
  MQC_ACT_SILU = 1,
  MQC_ACT_GELU = 2,      /* erf */
  MQC_ACT_GELU_TANH = 3,
  MQC_ACT_RELU = 4,
  MQC_ACT_QUICK_GELU = 5 /* x * sigmoid(1.702 x) */
} mqc_activation;

typedef struct mqc_activation_args {
  uint32_t size;
  int32_t dtype;         /* of x, x_split and y */
  int32_t modality_kind;
  int32_t activation;    /* mqc_activation */
  int32_t gated;
  int32_t hadamard_base; /* order of the dense factor, 1 = none */
  int32_t hadamard_log2; /* block = base << log2; base 1 and log2 0: no transform */
  int32_t split_columns;
  int64_t rows, columns; /* columns of y: a multiple of the block; at most 32768 */
  int64_t rows_per_sequence;
  int64_t x_stride, xq_stride, y_stride, x_split_stride;
  const void* x;
  const float* scale;    /* [1] or [2]; NULL: no xq */
  const void* modality;
  const void* hadamard;  /* sign table of the dense factor (mqc.cuda.pack), NULL for base 1 */
  const int32_t* split;  /* [split_columns] */
  int8_t* xq;            /* NULL: only y */
  void* y;               /* dtype [rows, columns] or NULL */
  void* x_split;         /* dtype [rows, split_columns] or NULL */
} mqc_activation_args;

MQC_API int mqc_activation_quantize(const mqc_activation_args* args, void* stream);

/* ---- rotary embedding + cache write ---------------------------------------------------------
 * q is rotated in place; rotated keys and values go to rows past .. past + tokens of the caches. */
typedef enum mqc_rotary { MQC_ROTARY_NONE = 0, MQC_ROTARY_HALF = 1, MQC_ROTARY_INTERLEAVED = 2 } mqc_rotary;

typedef struct mqc_rotary_args {
  uint32_t size;
  int32_t dtype;         /* of q, k, v */
  int32_t cache_dtype;   /* the same, or MQC_I8 with one scale a row */
  int32_t rotary;        /* mqc_rotary */
  int32_t batch, tokens, q_heads, kv_heads, head_dim;
  int32_t rotary_dim;    /* leading values of a head that turn; even, <= head_dim */
  int32_t table_dtype;   /* of cos and sin */
  int32_t reserved;
  int64_t capacity;      /* rows of the caches */
  int64_t q_stride, k_stride, v_stride; /* between tokens; heads follow each other */
  void* q;               /* [batch, tokens, q_heads * head_dim] or NULL */
  const void* k;
  const void* v;
  const void* cos;       /* [batch, tokens, rotary_dim] contiguous, or NULL */
  const void* sin;
  const int64_t* past;   /* [1]: on the device, so that a graph can be replayed as it grows */
  void* key_cache;       /* [batch, kv_heads, capacity, head_dim] */
  void* value_cache;
  float* key_scale;      /* [batch, kv_heads, capacity] for MQC_I8 */
  float* value_scale;
} mqc_rotary_args;

MQC_API int mqc_rotary_cache(const mqc_rotary_args* args, void* stream);

/* Turns heads of rows that have no cache (towers): y = round(x cos + partner sin), the rest copied. */
typedef struct mqc_rotate_args {
  uint32_t size;
  int32_t dtype;         /* of x and y */
  int32_t rotary;        /* MQC_ROTARY_HALF or MQC_ROTARY_INTERLEAVED */
  int32_t heads, head_dim;
  int32_t rotary_dim;    /* leading values of a head that turn; even, <= head_dim */
  int32_t table_dtype;   /* of cos and sin: as x, or MQC_F32 */
  int32_t reserved;
  int64_t rows;
  int64_t angle_rows;    /* row r turns by angles r % angle_rows */
  int64_t x_stride, y_stride; /* between rows; heads follow each other */
  const void* x;         /* [rows, heads * head_dim] */
  const void* cos;       /* [angle_rows, rotary_dim] contiguous */
  const void* sin;
  void* y;               /* [rows, heads * head_dim]; may be x */
} mqc_rotate_args;

MQC_API int mqc_rotate(const mqc_rotate_args* args, void* stream);

/* ---- attention over the cache ---------------------------------------------------------------
 * out[b, s, h] = softmax(q . K^T * scale + mask) V over rows 0 .. past + tokens of the cache. */
typedef struct mqc_attention_args {
  uint32_t size;
  int32_t dtype;         /* of q and out */
  int32_t cache_dtype;   /* as q, or MQC_I8 */
  int32_t batch, tokens, q_heads, kv_heads, head_dim;
  int32_t splits;        /* blocks along the keys; 0 = choose from capacity */
  float scale;
  int64_t capacity;
  int64_t q_stride, out_stride; /* between tokens */
  int64_t mask_stride;   /* between query tokens, in bytes; batches follow at tokens * mask_stride */
  const void* q;
  const void* key_cache;
  const void* value_cache;
  const float* key_scale;
  const float* value_scale;
  const uint8_t* mask;   /* bool [batch, 1, tokens, >= past + tokens], 1 = may attend; NULL: causal */
  const int64_t* past;   /* [1] on the device */
  void* out;             /* [batch, tokens, q_heads * head_dim] */
  void* workspace;
  int64_t workspace_bytes;
} mqc_attention_args;

MQC_API int mqc_attention_workspace(const mqc_attention_args* args, int64_t* bytes);
MQC_API int mqc_attention(const mqc_attention_args* args, void* stream);

/* ---- embedding, argmax, top-k ---------------------------------------------------------------- */
typedef struct mqc_embedding_args {
  uint32_t size;
  int32_t dtype;         /* of y */
  int32_t table_dtype;   /* as y, or MQC_I8 with scale[row] */
  int32_t reserved;
  int64_t rows, columns, vocabulary;
  const int64_t* ids;    /* [rows]; an id outside 0 .. vocabulary gives a row of NaN */
  const void* table;     /* [vocabulary, columns] */
  const float* scale;    /* [vocabulary] for MQC_I8 */
  void* y;               /* [rows, columns] */
} mqc_embedding_args;

MQC_API int mqc_embedding(const mqc_embedding_args* args, void* stream);

/* The k largest of each row, descending; the lower index first among equals; NaN above all. */
typedef struct mqc_top_k_args {
  uint32_t size;
  int32_t dtype;         /* of x */
  int32_t k;             /* 1..64; 1 is argmax */
  int32_t reserved;
  int64_t rows, columns, x_stride;
  const void* x;
  float* values;         /* [rows, k] or NULL */
  int64_t* indices;      /* [rows, k] */
  void* workspace;
  int64_t workspace_bytes;
} mqc_top_k_args;

MQC_API int mqc_top_k_workspace(const mqc_top_k_args* args, int64_t* bytes);
MQC_API int mqc_top_k(const mqc_top_k_args* args, void* stream);

#ifdef __cplusplus
}
#endif
#endif
