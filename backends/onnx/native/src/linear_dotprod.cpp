// Linear tiles in NEON's 128-bit vectors with sdot: Arm v8.2 and later where the processor has it.
#include "linear_neon.h"

namespace {

// 6 rows x 1 block: 24 sums, 4 weights and one spread input, of 32 registers.
constexpr int kRows = 6, kPanel = 1;

void pack_rows(const uint8_t* x, int64_t rows, const Sizes& s, int64_t padded, uint8_t flip,
               int8_t* packed, int32_t* correction) {
    pack_rows_interleaved(x, rows, s, padded, flip, packed, correction);
    if (s.bits == 8) memset(correction, 0, static_cast<size_t>(s.groups * rows) * sizeof(int32_t));
}

void tile(Form form, const Tile& t) {
    if (form == kNibbles && t.keep)
        tile(kSmall, unpack<Neon, kPanel>(t));
    else if (form == kNibbles)
        tile_rows<Neon, kPanel, kNibbles, kRows>(t);
    else if (form == kSmall)
        tile_rows<Neon, kPanel, kSmall, kRows>(t);
    else
        tile_rows<Neon, kPanel, kBytes, kRows>(t);
}

}  // namespace

namespace mqc {
const LinearIsa linear_dotprod = {"dotprod", kRows, kPanel, 8, false, pack_rows,
                                  tile, nullptr, 0, nullptr, nullptr};
}
