// Linear tiles in 256-bit vectors with the VEX form of vpdpbusd: Alder Lake, Zen 5 and later.
#define MQC_DOT_VNNI 1
#include "linear_ymm.h"

namespace mqc {
const LinearIsa linear_avxvnni = {"avxvnni", kRows, kPanel, 8, false, pack_rows_interleaved,
                                  tile, nullptr, 0, nullptr, nullptr};
}
