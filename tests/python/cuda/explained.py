"""Faults that no test can notice, and why: what `mutate.py` does not count as survivors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Explained:
    """`kernel`, `kind` and `fault` (PTX and source line of the survivor) are matched by search."""

    kernel: str
    kind: str
    fault: str
    why: str


# fmt: off
EXPLAINED = (
    Explained("", "", r"(-4294967296 \+ 1 in `and|[.]s64 %p\d+, %rd\d+, 0`|bra ).*"
                      r"[/%] (gridDim|p[.]splits|p[.]J|per_row)",
              "a 64-bit division is done in 32 bits when both numbers are small; both are right"),
    Explained("", "immediate", r"\b(2\d|31|5\d|63) \+ 1 in `shr.[su](32|64)",
              "rounding towards zero of a quotient that is never negative"),
    Explained("", "swap", r"`shr.[su](32|64) .*, (31|63|2\d|5\d)`",
              "the sign of a number that is never negative"),
    Explained("", "immediate", r"-65536 \+ 1 in `and.b32.*0xFFFF0000u",
              "one unit of fp32 in a bfloat16 value, lost when the result is rounded"),
    Explained("", "immediate|comparison",
              r"(-1 \+ 1 in `setp.gt.s32|gt.s32 %p\d+, %r\d+, -1`).*negative",
              "the sign of +0, whose code is the same from either side"),
    Explained("", "comparison", r"(gt -> ge|leu? -> ltu?|gtu -> geu) .*> kLargestFloat",
              "a reciprocal or a moment of exactly the largest float"),
    Explained("", "immediate", r"\d+ \+ 1 in `and.b32.*(levels|lane_bytes|kRestMask|code_of)",
              "a mask's lowest bit, which is zero after the shift before it"),
    Explained("", "immediate", r" 0 \+ 1 in `mov.u32.*load_some",
              "an element past the end is the least subnormal instead of zero, and is not stored"),
    Explained("", "immediate|comparison",
              r"((2047|1023|703) \+ 1 in|, (2047|1023|703)`|setp.*(sizeof.Table|i < 256))",
              "a thread's index is below the first bound of the loop that fills a table or a tile"),
    Explained("", "immediate", r" (12|60|124|248) \+ 1 in `and.b32",
              "a mask's lowest bit, which is zero after the shift before it"),
    Explained("quantize|update|check", "", r"if .(lane|threadIdx.x % kLanes) == 0",
              "every lane of the warp holds the same value"),
    Explained("", "immediate", r"\b(2|4|8|16) \+ 1 in `mov.u32.*(shfl_xor|\| $)",
              "xor by 17, 8, 4, 2 and 1 still reaches every lane; so do the others"),
    Explained("", "immediate", r"0 \+ 1 in `setp.*thread == 0. tables.offset",
              "any one thread of the block will do"),
    Explained("", "immediate", r" 0 \+ 1 in `setp.(ne|eq).s64.*(p[.]J % 4 == 0|float[*] out = p)",
              "no row is taken for aligned: element by element the same values are stored"),
    Explained("", "comparison", r"lt -> le .*r0 < p[.]R",
              "one more step of ranks, all of them outside of T and 0"),
    Explained("", "", r"dropout_format.h.*h >> 15",
              "low bits of a hash, in a copy of the line that meets no hash beside the threshold; "
              "test_hashes_beside_the_threshold kills those that do"),
    Explained("few_rows_fma", "guard", r"if .lane == 0. out",
              "every lane of the warp holds the same sum"),
    Explained("", "", r"`(div|rem).[su]64",
              "a division of numbers beyond 32 bits, which no sum in memory here is split into"),
    Explained("", "comparison", r"lt -> le .*dropout_hash",
              "an unrolled copy of a comparison of which test_hashes_beside_the_threshold "
              "kills those that it meets"),
    Explained("", "comparison", r"ge -> gt .*j \+ i < p[.]J",
              "an end of a row that another element of the run meets: i is constant here"),
    Explained("", "immediate", r" 0 \+ 1 in `setp.(ne|eq).s64.*reinterpret_cast<uintptr_t>.out. %",
              "no address is taken for aligned: element by element the same values are stored"),
    Explained("few_rows_fma", "", r"count == kRun && reinterpret_cast",
              "both ways to load a run give the same values"),
    Explained("few_rows_fma", "swap", r"shl.b64 .*, 1`.*<__half",
              "the address of a float16 output, which this instance has not"),
    Explained("few_rows", "immediate", r"64 \+ 1 in `add.s64.*(int64_t first|int64_t k) =",
              "compared with K, a multiple of 64; or the scale of the same block"),
    Explained("sum", "",
              r"(1 \+ 1 in `(setp.lt|max)|lt -> le|0 \+ 1 in `setp.eq).*split < p.splits",
              "a sum of partials has at least two, and takes the short loop for what is left"),
    Explained("check_gradients", "immediate", r"`selp.*return [{]0x7F",
              "a bit of the mantissa, from which no finite element carries into the tested bit"),
    Explained("check_gradients", "",
              r"const bool whole|mov.u32 %r\d+, 0`.*exponent_test|begin < end",
              "the look at a whole piece only decides whether its elements are looked at"),
    Explained("check_gradients", "comparison", r"lt -> le .*piece < end",
              "a piece looked at twice"),
    Explained("check_gradients|update", "", r"high - low > 1|int middle",
              "the walk that follows the search finds the tensor from any earlier one"),
)
# fmt: on
