// The entry points of one instruction set. isas.h includes this once per set, with FASTBERT_ISA
// defined to the set's name. Kernels include the headers that they need instead.
#include "attention.h"
#include "bias_gelu.h"
#include "checksum.h"
#include "cross_entropy.h"
#include "dropout_add_layer_norm.h"
#include "embed.h"
#include "encoder.h"
#include "feed_forward.h"
#include "layer_norm.h"
#include "linear.h"
#include "linear_int8.h"
#include "peak.h"
