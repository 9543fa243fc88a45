#include "api.h"
#include "launch.h"

extern "C" int kvs_limit_multiprocessors(std::uint32_t most) {
  kvs::most_multiprocessors = most;
  return 0;
}
