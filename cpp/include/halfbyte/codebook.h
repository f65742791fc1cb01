// The 4-bit code books: 16 levels, the thresholds between them, and the code of each rank.
//
// Quantization of x in [-1, 1]:  rank = #{i : x > thresholds[i]},  code = code_of_rank[rank]; a tie
// goes down. Dequantization: levels[code]. Levels and thresholds are fp32 bit patterns; thresholds
// are the fp32 midpoints of neighbouring levels.
//
//   nf4   the quantiles of a standard normal, normalised to [-1, 1] (QLoRA, appendix E)
//   fp4   sign, 2 exponent bits, 1 mantissa bit over 12: codes are not in ascending order and two
//   of
//         them (0 and 8) mean zero; the table and the ranks are bitsandbytes'
//   int4  (code - 8) / 7; absmax scaling never reaches code 0
#pragma once

#include <cstdint>

namespace halfbyte {

enum class CodebookId { kNf4, kFp4, kInt4 };

struct Codebook {
  const char* name;
  uint32_t levels[16];
  uint32_t thresholds[15];
  uint8_t code_of_rank[16];
  uint8_t zero_code;  // of x == 0, and of the pad nibble of an odd count
};

constexpr Codebook kCodebooks[3] = {
    {"nf4",
     {0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871,
      0x00000000, 0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB,
      0x3F3913B3, 0x3F800000},
     {0xBF591CD8, 0xBF1C5270, 0xBEEB8480, 0xBEADEA76, 0xBE703CEC, 0xBE0D38BC, 0xBD3A7871,
      0x3D22FAFF, 0x3DF64862, 0x3E5067E0, 0x3E9582D4, 0x3EC753F9, 0x3F006D04, 0x3F248DAF,
      0x3F5C89DA},
     {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
     7},
    {"fp4",
     {0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000, 0x3EAAAAAB, 0x3F000000, 0x3E2AAAAB,
      0x3E800000, 0x00000000, 0xBBAAAAAB, 0xBF2AAAAB, 0xBF800000, 0xBEAAAAAB, 0xBF000000,
      0xBE2AAAAB, 0xBE800000},
     {0xBF555556, 0xBF155556, 0xBED55556, 0xBE955556, 0xBE555556, 0xBDB00000, 0xBB2AAAAB,
      0x00000000, 0x3B2AAAAB, 0x3DB00000, 0x3E555556, 0x3E955556, 0x3ED55556, 0x3F155556,
      0x3F555556},
     {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3},
     0},
    {"int4",
     {0xBF924925, 0xBF800000, 0xBF5B6DB7, 0xBF36DB6E, 0xBF124925, 0xBEDB6DB7, 0xBE924925,
      0xBE124925, 0x00000000, 0x3E124925, 0x3E924925, 0x3EDB6DB7, 0x3F124925, 0x3F36DB6E,
      0x3F5B6DB7, 0x3F800000},
     {0xBF892492, 0xBF6DB6DC, 0xBF492492, 0xBF24924A, 0xBF000000, 0xBEB6DB6E, 0xBE5B6DB8,
      0xBD924925, 0x3D924925, 0x3E5B6DB8, 0x3EB6DB6E, 0x3F000000, 0x3F24924A, 0x3F492492,
      0x3F6DB6DC},
     {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
     8},
};

}  // namespace halfbyte
