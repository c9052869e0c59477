/* mqc CPU kernels: the C ABI. No framework, no C++ in the interface, no global state but the
 * instruction set chosen once.
 *
 * Conventions
 * - Every function that can fail returns MQC_OK or a negative status; nothing throws or aborts.
 *   Outputs are unspecified after a failure.
 * - Tensors are dense, row-major; pointers need the alignment of their element only (64 bytes are
 *   faster). Inputs and outputs do not overlap unless a function says so.
 * - Build all sources with -ffp-contract=off and without -ffast-math: float results are defined bit
 *   by bit (no fused multiply-add), the same for every instruction set and number of threads.
 */
#ifndef MQC_KERNELS_H
#define MQC_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define MQC_API __declspec(dllexport)
#else
#define MQC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t mqc_status;
enum {
  MQC_OK = 0,
  MQC_BAD_SHAPE = -1,    /* sizes negative, or that do not fit each other */
  MQC_BAD_POINTER = -2,  /* a required pointer is null */
  MQC_BAD_LAYOUT = -3,   /* a layout id or a bit width this library does not have */
  MQC_NO_MEMORY = -4,
};

/* One line of English for a status, never null. */
MQC_API const char* mqc_status_text(mqc_status status);

/* ---- Instruction sets ------------------------------------------------------------------------ */

/* Name of the instruction set in use: "portable"; "avx2", "avxvnni", "avx512vnni" or "amx"; on Arm
 * "dotprod" or "i8mm". The best one of the processor, or the one the environment variable MQC_ISA
 * names (the best one again where the processor lacks it; mqc_isa_supported tells). */
MQC_API const char* mqc_isa(void);

/* 1 where this build and processor can run the instruction set of that name, else 0. */
MQC_API int32_t mqc_isa_supported(const char* name);

/* Choose by name, for tests and benchmarks; not while kernels run. MQC_BAD_LAYOUT where
 * unsupported. */
MQC_API mqc_status mqc_set_isa(const char* name);

/* ---- Threads --------------------------------------------------------------------------------- */

/* Runs task(task_context, i) once for every i < tasks, in any order, on any threads, and returns
 * when all are done. This is the signature of onnxruntime's KernelContext_ParallelFor behind one
 * adapter. */
typedef void (*mqc_task)(void* task_context, size_t index);
typedef void (*mqc_parallel_for)(void* pool, size_t tasks, mqc_task task, void* task_context);

/* threads <= 1 or parallel_for null: everything runs in the calling thread. */
typedef struct {
  mqc_parallel_for parallel_for;
  void* pool;
  int32_t threads;
} mqc_threads;

/* ---- Linear: y = (xq . w^T) * w_scale * x_scale[row] + bias + x_split . w_split^T + residual ---- */

/* Layouts of packed weights. One serves every instruction set, so that a file packed anywhere runs
 * everywhere; K is padded to a multiple of 8 within each group, N to a multiple of 16.
 *   C16K4: blocks of 16 output channels x 4 inputs, 64 bytes, channel-major ([16][4]).
 *     8 bits: uint8 [N16][groups][kg/4][16][4], value w + 128, padding 128;
 *     4 bits: uint8 [N16][groups][kg/8][16][4], value w + 8 in a nibble, padding 8; the low nibbles
 *             of a block are inputs k..k+3, the high ones k+4..k+7.
 *     (N16 = ceil(N / 16), kg = K / groups rounded up to a multiple of 8.)
 * Weights are stored without a sign, so that unpacking is a mask and a shift; the kernels subtract
 * 128 (or 8) * sum(x) in int32, which is exact. */
enum { MQC_LAYOUT_C16K4 = 1 };

typedef struct {
  int64_t n;      /* output channels, >= 1 */
  int64_t k;      /* input channels, 1 .. 131071 (int32 sums are exact up to there) */
  int64_t groups; /* scale groups along k, a divisor of k; 1 = one scale a channel */
  int32_t bits;   /* 4 or 8 */
  int32_t layout; /* MQC_LAYOUT_C16K4 */
} mqc_linear_shape;

/* Bytes of the packed weight; negative status where the shape is not valid. */
MQC_API int64_t mqc_linear_packed_bytes(const mqc_linear_shape* shape);

/* From the reference form: bits 8: int8 [N, K]; bits 4: uint8 [N, ceil(K/2)], low nibble = even k,
 * two's complement. */
MQC_API mqc_status mqc_linear_pack(const mqc_linear_shape* shape, const void* weight, void* packed);

/* The inverse. Padding nibbles of an odd K come back as 0. */
MQC_API mqc_status mqc_linear_unpack(const mqc_linear_shape* shape, const void* packed,
                                     void* weight);

/* "Columns" form of a float32 [N, width] (w_scale with width = groups, w_split with width = its
 * rank): [N16][width][16], padded with 0. Width 1 is the plain vector padded to 16. */
MQC_API int64_t mqc_columns_count(int64_t n, int64_t width); /* floats, or a negative status */
MQC_API mqc_status mqc_columns_pack(int64_t n, int64_t width, const float* values, float* columns);

/* How a row finds its activation scale. */
enum {
  MQC_MODALITY_NONE = 0,  /* x_scale[0] for every row */
  MQC_MODALITY_MASK = 1,  /* modality is uint8 [m]: x_scale[modality[row] != 0] */
  MQC_MODALITY_COUNT = 2, /* modality is int64 [m / sequence]: the first modality[b] rows of each
                             sequence take x_scale[1]; clamped to [0, sequence] */
};

typedef struct {
  mqc_linear_shape shape;
  int64_t m;             /* rows, >= 0 */
  const void* packed;    /* mqc_linear_pack */
  const float* w_scale;  /* columns form, width = groups */
  const void* xq;        /* [m, k] int8, or uint8 shifted by 128 */
  int32_t x_unsigned;    /* 1: xq is uint8 */
  int32_t modality_form; /* MQC_MODALITY_* */
  const void* modality;  /* by modality_form, else null */
  int64_t sequence;      /* rows per sequence, for MQC_MODALITY_COUNT */
  const float* x_scale;  /* [1], or [2] (text, visual) with a modality */
  const float* bias;     /* [n] or null */
  int64_t split;         /* rank of the split term, 0 = none */
  const float* x_split;  /* [m, split] */
  const float* w_split;  /* columns form, width = split */
  const float* residual; /* [m, n] or null; may be y itself */
  float* y;              /* [m, n] */
  void* workspace;       /* mqc_linear_workspace_bytes() bytes, or null: allocated inside */
} mqc_linear_call;

/* Bytes of scratch memory for a call on that many threads; negative status where it is not valid. */
MQC_API int64_t mqc_linear_workspace_bytes(const mqc_linear_call* call, int32_t threads);

/* The linear. Order of the float32 operations, each rounded once:
 *   s = sum over groups g, ascending, of float(int32 dot product) * w_scale[n, g]
 *   y = s * x_scale[row];  y += bias;
 *   y += sum over j, ascending, of x_split[row, j] * w_split[n, j];  y += residual. */
MQC_API mqc_status mqc_linear(const mqc_linear_call* call, const mqc_threads* threads);

#ifdef __cplusplus
}
#endif

#endif /* MQC_KERNELS_H */
