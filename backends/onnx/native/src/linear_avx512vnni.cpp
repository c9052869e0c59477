// Linear tiles in 512-bit vectors with vpdpbusd: Ice Lake, Zen 4 and later.
#include "linear_zmm.h"

namespace {

// 14 rows x 2 blocks: 28 sums, 2 weights and one spread input fill the 32 registers.
constexpr int kRows = 14, kPanel = 2;

void tile(Form form, const Tile& t) {
    if (form == kNibbles && t.keep)
        tile(kSmall, unpack<Avx512, kPanel>(t));
    else if (form == kNibbles)
        tile_rows<Avx512, kPanel, kNibbles, kRows>(t);
    else
        tile_rows<Avx512, kPanel, kBytes, kRows>(t);
}

}  // namespace

namespace mqc {
const LinearIsa linear_avx512vnni = {"avx512vnni", kRows, kPanel, 8, false, pack_rows_transposed,
                                     tile, nullptr, 0, nullptr, nullptr};
}
