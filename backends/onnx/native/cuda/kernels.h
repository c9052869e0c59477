// libmqc_cuda.so, opened at run time: this library is built and loads without it, and says what is
// missing. (Linking would also mix up its functions with those of libmqc_onnx.so, some of which have
// the same names.)
#pragma once

#include "mqc_cuda.h"

namespace mqc_onnx_cuda {

struct Kernels {
    decltype(&mqc_abi_version) abi_version;
    decltype(&mqc_last_error) last_error;
    decltype(&mqc_check_device) check_device;
    decltype(&mqc_memory_on_host) memory_on_host;
    decltype(&mqc_memory_allocate) allocate;
    decltype(&mqc_memory_free) free;
    decltype(&mqc_memory_upload) upload;
    decltype(&mqc_memory_copy_rows) copy_rows;
    decltype(&mqc_rows_to_f16) rows_to_f16;
    decltype(&mqc_rows_to_f32) rows_to_f32;
    decltype(&mqc_linear_workspace) linear_workspace;
    decltype(&mqc_linear) linear;
    decltype(&mqc_rms_norm_quantize) rms_norm_quantize;
    decltype(&mqc_activation_quantize) activation_quantize;
    decltype(&mqc_rotary_cache) rotary_cache;
    decltype(&mqc_attention_workspace) attention_workspace;
    decltype(&mqc_attention) attention;
    decltype(&mqc_embedding) embedding;
};

// The file that MQC_CUDA_LIBRARY names, else the one of the installed package (../../cuda beside
// this library), else libmqc_cuda.so where the system looks. Throws std::runtime_error with the
// remedy where there is none or it is of another version.
const Kernels& kernels();

}  // namespace mqc_onnx_cuda
