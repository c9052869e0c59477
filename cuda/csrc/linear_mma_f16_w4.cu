#include "linear_mma_launch.h"

template int mqc::launch_linear_half<mqc::HalfFormat<mqc::f16, 4>>(const LinearParams&, const LinearPlan&, void*);
