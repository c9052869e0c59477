#include "linear_launch.h"

namespace mqc {

int launch_linear_mma_w8(const LinearParams& params, const LinearPlan& plan, void* stream) {
  return launch_linear_mma<8>(params, plan, stream);
}

}  // namespace mqc
