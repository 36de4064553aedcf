// The entry points of one instruction set: included once per set, with FASTBERT_ISA defined to its
// name, by bindings.cpp. A kernel's own file includes its header alone.
#include "dropout_add_layer_norm.h"
#include "peak.h"
