// The entry points of one instruction set: included once per set, with FASTBERT_ISA defined to its
// name, by bindings.cpp. A kernel's own file includes its header alone.
#include "attention.h"
#include "bias_gelu.h"
#include "cross_entropy.h"
#include "dropout_add_layer_norm.h"
#include "embed.h"
#include "encoder.h"
#include "feed_forward.h"
#include "layer_norm.h"
#include "linear.h"
#include "peak.h"
