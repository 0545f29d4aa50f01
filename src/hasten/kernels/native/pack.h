// Repacking of stored weights, and the way back to single rows (embeddings).
#pragma once
#include "hasten.h"
#include "layout.h"

namespace hasten {

float from_half(uint16_t h);

int layout_of(int source);                                // -1 for an unknown type
int stored_columns(int source);                           // columns of one stored block
int64_t stored_row_bytes(int source, int64_t cols);       // cols: a multiple of stored_columns
// Groups first..last-1 of 16 rows each; output row i is stored row order[i] (null: i).
void pack_groups(int source, const uint8_t *from, int64_t rows, int64_t cols, const int32_t *order, uint8_t *to,
                 int64_t first, int64_t last);
void unpack_row(const HastenMatrix &m, int64_t row, float *out);  // out [cols]

}  // namespace hasten
