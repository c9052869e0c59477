// Runs calls of the kernels from a file and writes what they give: run_cases CASES RESULTS
//
// Serves processors that this machine can only emulate (tests/native/test_arm.py): one process takes
// all calls, and needs nothing but the kernels. CASES is a sequence of
//   int64 sizes: name, integers, inputs, outputs; the name; int64 integers;
//   for each input int64 bytes (-1: a null pointer) and the bytes; for each output int64 bytes
// RESULTS has for each case an int64 status and the bytes of the outputs.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <thread>
#include <vector>

#include "mqc_float_linear.h"
#include "mqc_kernels.h"
#include "mqc_layers.h"

namespace {

typedef std::vector<uint8_t> Bytes;

struct Case {
    std::string name;
    std::vector<int64_t> integers;
    std::vector<Bytes> inputs, outputs;
    std::vector<bool> null;
    size_t integer = 0, input = 0;

    int64_t next() { return integers.at(integer++); }
    template <class T>
    const T* array() {
        const size_t i = input++;
        return null.at(i) ? nullptr : reinterpret_cast<const T*>(inputs[i].data());
    }
    template <class T>
    T* result(size_t i) {
        return reinterpret_cast<T*>(outputs.at(i).data());
    }
    float real() {  // a float32 in the bits of an integer
        const int32_t bits = static_cast<int32_t>(next());
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
};

void on_threads(void* pool, size_t tasks, mqc_task task, void* context) {
    (void)pool;
    std::vector<std::thread> all;
    for (size_t i = 0; i < tasks; i++) all.emplace_back(task, context, i);
    for (std::thread& thread : all) thread.join();
}

std::vector<float> columns(int64_t n, int64_t width, const float* values) {
    if (!values) return {};
    std::vector<float> made(static_cast<size_t>(mqc_columns_count(n, width)));
    mqc_columns_pack(n, width, values, made.data());
    return made;
}

// The arguments that both kinds of linears have; x is their input.
template <class Linear>
struct Arguments {
    Linear call = {};
    Bytes packed;
    std::vector<float> scale, split;
    mqc_threads threads;

    explicit Arguments(Case& c) {
        call.shape = {c.next(), c.next(), c.next(), static_cast<int32_t>(c.next()),
                      MQC_LAYOUT_C16K4};
        call.m = c.next();
        call.split = c.next();
        threads = {on_threads, nullptr, static_cast<int32_t>(c.next())};
        packed.resize(static_cast<size_t>(mqc_linear_packed_bytes(&call.shape)));
        mqc_linear_pack(&call.shape, c.array<void>(), packed.data());
        scale = columns(call.shape.n, call.shape.groups, c.array<float>());
        call.packed = packed.data();
        call.w_scale = scale.data();
        call.bias = c.array<float>();
        call.x_split = c.array<float>();
        split = columns(call.shape.n, call.split, c.array<float>());
        call.w_split = split.data();
        call.residual = c.array<float>();
        call.y = c.result<float>(0);
    }
};

mqc_status linear(Case& c) {
    Arguments<mqc_linear_call> a(c);
    a.call.x_unsigned = static_cast<int32_t>(c.next());
    a.call.modality_form = static_cast<int32_t>(c.next());
    a.call.sequence = c.next();
    a.call.xq = c.array<void>();
    a.call.modality = c.array<void>();
    a.call.x_scale = c.array<float>();
    return mqc_linear(&a.call, &a.threads);
}

mqc_status float_linear(Case& c) {
    Arguments<mqc_float_linear_call> a(c);
    a.call.x = c.array<float>();
    return mqc_float_linear(&a.call, &a.threads);
}

mqc_row_scales scales_of(Case& c) {
    mqc_row_scales s = {c.array<float>(), c.array<uint8_t>(), nullptr, 1};
    return s;
}

mqc_status norm(Case& c) {
    const int64_t rows = c.next(), n = c.next(), splits = c.next();
    const float eps = c.real();
    const mqc_row_scales s = scales_of(c);
    const float* x = c.array<float>();
    const int64_t* split = c.array<int64_t>();
    mqc_quantize(x, 0, rows, n, &s, 1, c.result<void>(0));
    mqc_rms_norm_quantize(x, 0, rows, n, eps, &s, 1, c.result<void>(1), split, splits,
                          c.result<float>(2));
    return MQC_OK;
}

mqc_status activation(Case& c) {
    const int64_t rows = c.next(), n = c.next(), base = c.next(), log2 = c.next();
    mqc_activation a = {};
    a.function = static_cast<int>(c.next());
    a.gated = static_cast<int>(c.next());
    a.splits = c.next();
    const mqc_row_scales s = scales_of(c);
    const float* x = c.array<float>();
    a.split = c.array<int64_t>();
    mqc_hadamard_plan* plan =
        mqc_hadamard_create(base, static_cast<int>(log2), c.array<int8_t>());
    std::vector<float> scratch(static_cast<size_t>(mqc_hadamard_scratch(plan) + n + 64));
    mqc_hadamard(plan, x, rows * n / mqc_hadamard_block(plan), c.result<float>(2), scratch.data());
    a.plan = plan;
    scratch.resize(static_cast<size_t>(mqc_activation_scratch(&a, n)));
    mqc_activation_quantize(&a, x, 0, rows, n, &s, c.result<void>(0), c.result<float>(1),
                            scratch.data());
    mqc_hadamard_free(plan);
    return MQC_OK;
}

mqc_status lookup(Case& c) {
    const int64_t rows = c.next(), n = c.next(), rank = c.next();
    const int64_t* ids = c.array<int64_t>();
    const int8_t* weight = c.array<int8_t>();
    const float* scale = c.array<float>();
    mqc_embedding_w8(ids, 0, rows, n, weight, scale, c.result<float>(0));
    const float *x = c.array<float>(), *w = c.array<float>();
    mqc_rank_update(c.result<float>(0), x, w, 0, rows, n, rank, c.result<float>(1));
    return MQC_OK;
}

mqc_status attention(Case& c) {
    mqc_attention a = {};
    for (int64_t* field : {&a.batch, &a.tokens, &a.heads, &a.kv_heads, &a.dim, &a.value_dim,
                           &a.past, &a.capacity, &a.keys, &a.rotary_dim, &a.angle_batch,
                           &a.mask_batch, &a.mask_columns})
        *field = c.next();
    a.rotary = static_cast<int>(c.next());
    a.scale = c.real();
    a.q = c.array<float>();
    a.k = c.array<float>();
    a.v = c.array<float>();
    a.cosine = c.array<float>();
    a.sine = c.array<float>();
    a.mask = c.array<uint8_t>();
    a.q_stride = a.heads * a.dim;
    a.k_stride = a.kv_heads * a.dim;
    a.v_stride = a.kv_heads * a.value_dim;
    a.out = c.result<float>(0);
    for (size_t i = 1; i < c.outputs.size(); i++)  // caches: what they hold before
        memcpy(c.result<void>(i), c.array<void>(), c.outputs[i].size());
    if (c.outputs.size() == 3) {
        a.key_cache = c.result<float>(1);
        a.value_cache = c.result<float>(2);
    } else if (c.outputs.size() == 5) {
        a.key_bytes = c.result<int8_t>(1);
        a.value_bytes = c.result<int8_t>(2);
        a.key_scale = c.result<float>(3);
        a.value_scale = c.result<float>(4);
    }
    mqc_attention_plan plan;
    mqc_attention_prepare(&a, &plan);
    std::vector<float> workspace(static_cast<size_t>(plan.workspace + 1));
    std::vector<float> scratch(static_cast<size_t>(plan.scratch + 1));
    for (int64_t i = 0; i < plan.appends; i++) mqc_attention_append(&a, &plan, workspace.data(), i);
    for (int64_t i = 0; i < plan.packs; i++) mqc_attention_pack(&a, &plan, workspace.data(), i);
    for (int64_t i = 0; i < plan.tasks; i++)
        mqc_attention_attend(&a, &plan, workspace.data(), scratch.data(), i);
    for (int64_t i = 0; i < plan.combines; i++)
        mqc_attention_combine(&a, &plan, workspace.data(), i);
    return MQC_OK;
}

mqc_status run(Case& c) {
    if (c.name == "names") {  // of the instruction set and of the layers' copy
        snprintf(c.result<char>(0), c.outputs[0].size(), "%s", mqc_isa());
        snprintf(c.result<char>(1), c.outputs[1].size(), "%s", mqc_layers_isa());
        return MQC_OK;
    }
    if (c.name.rfind("isa ", 0) == 0) return mqc_set_isa(c.name.c_str() + 4);
    if (c.name == "linear") return linear(c);
    if (c.name == "float_linear") return float_linear(c);
    if (c.name == "norm") return norm(c);
    if (c.name == "activation") return activation(c);
    if (c.name == "lookup") return lookup(c);
    if (c.name == "attention") return attention(c);
    fprintf(stderr, "no case named %s\n", c.name.c_str());
    exit(2);
}

void read(FILE* file, void* data, size_t bytes) {
    if (bytes && fread(data, 1, bytes, file) != bytes) {
        fprintf(stderr, "the cases end too early\n");
        exit(2);
    }
}

}  // namespace

int main(int count, char** names) {
    FILE* in = count == 3 ? fopen(names[1], "rb") : nullptr;
    FILE* out = in ? fopen(names[2], "wb") : nullptr;
    if (!out) {
        fprintf(stderr, "usage: run_cases CASES RESULTS\n");
        return 2;
    }
    int64_t sizes[4];
    while (fread(sizes, sizeof sizes, 1, in) == 1) {
        Case c;
        c.name.resize(static_cast<size_t>(sizes[0]));
        c.integers.resize(static_cast<size_t>(sizes[1]));
        c.inputs.resize(static_cast<size_t>(sizes[2]));
        c.outputs.resize(static_cast<size_t>(sizes[3]));
        read(in, &c.name[0], c.name.size());
        read(in, c.integers.data(), c.integers.size() * sizeof(int64_t));
        for (Bytes& input : c.inputs) {
            int64_t bytes;
            read(in, &bytes, sizeof bytes);
            c.null.push_back(bytes < 0);
            input.resize(static_cast<size_t>(bytes < 0 ? 0 : bytes));
            read(in, input.data(), input.size());
        }
        for (Bytes& output : c.outputs) {
            int64_t bytes;
            read(in, &bytes, sizeof bytes);
            output.resize(static_cast<size_t>(bytes));
        }
        const int64_t status = run(c);
        fwrite(&status, sizeof status, 1, out);
        for (const Bytes& output : c.outputs) fwrite(output.data(), 1, output.size(), out);
    }
    fclose(in);
    return fclose(out) ? 2 : 0;
}
