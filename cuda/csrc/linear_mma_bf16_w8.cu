#include "linear_mma_launch.h"

template int mqc::launch_linear_half<mqc::HalfFormat<mqc::bf16, 8>>(const LinearParams&, const LinearPlan&, void*);
