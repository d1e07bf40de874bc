// The types of values that kernels read and write; their sums are float32.
#pragma once

namespace alure {

enum class Element { kFloat32, kBfloat16 };

}  // namespace alure
