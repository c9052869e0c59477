#include "linear_mma_launch.h"

template int mqc::launch_linear_mma<mqc::W8Grouped<128>>(const LinearParams&, const LinearPlan&, void*);
