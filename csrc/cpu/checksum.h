// No include guard: isas.h includes this, by entries.h, once per instruction set.
#include <cstdint>

namespace fastbert {
namespace FASTBERT_ISA {

// A number that depends on the bits of n blocks of memory: each is (address, rows, bytes of a row).
// Blocks of one row are read whole. Of the others one 32-bit word of every `step`-th row is read,
// from row `first` on, at a column that changes from row to row; with step = 0 they are read whole
// too. A change of a single word that is read always changes the number.
int64_t checksum(const int64_t* blocks,  // (n, 3)
                 int64_t n, int64_t first, int64_t step, int threads);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
