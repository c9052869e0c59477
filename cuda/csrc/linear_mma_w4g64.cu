#include "linear_mma_launch.h"

template int mqc::launch_linear_mma<mqc::W4Grouped<64>>(const LinearParams&, const LinearPlan&, void*);
