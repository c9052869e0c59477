/* Measurements of the processor; not part of the kernels' interface. */
#pragma once

#include "mqc_kernels.h"

extern "C" {

/* Integer operations a second of the instruction set in use, out of registers (a multiply and an
 * add count as two); 0 where it has no dot product. */
MQC_API double mqc_probe_dot(int64_t rounds);

/* Reads all the memory once, on that many threads (16 at most); returns a sum of it. */
MQC_API uint64_t mqc_probe_read(const void* memory, int64_t bytes, int32_t threads);
}
