"""Parsing: syntax, names, source lines, caching, and errors that name the line."""

import pytest

from . import LaunchError, ParseError, Unsupported, load_module
from .parser import parse
from .snippets import HEADER, kernel
from .syntax import Address, Immediate, Negated, Pair, Register, Special, Symbol, Vector

TEXT = (
    HEADER
    + """
.file 1 "folder/one.cu"
.file 2 "two.h", 1234, 99
.visible .entry first(
  .param .u64 .ptr .global .align 16 first_param_0,
  .param .align 8 .b8 first_param_1[12],
  .param .u32 first_param_2
)
.maxntid 128, 1, 1
.minnctapersm 2
{
  .reg .pred %p<3>; .reg .b32 %r<4>; .reg .b64 %rd<2>;
  .loc 1 10 3
  mov.u32 %r1, %tid.x; // comment
  /* a longer
     comment */
  .loc 2 7 1, function_name $L__info, inlined_at 1 12 5
$L_top:
  @!%p1 setp.ne.and.s32 %p1|%p2, %r1, -5, !%p2;
  ld.global.v2.u32 {%r1, _}, [%rd1+-8];
  fma.rn.f32 %r2, %r1, 0f3F800000, 0F40000000;
  bra $L_top;
  .pragma "nounroll";
  ret;
}
.visible .entry second() { ret; }
.section .debug_str { $L__info: .b8 95 }
"""
)


def test_structure():
    module = parse(TEXT)
    first = module.entries["first"]
    assert module.files == {1: "folder/one.cu", 2: "two.h"}
    assert [(p.offset, p.size) for p in first.parameters] == [(0, 8), (8, 12), (20, 4)]
    assert first.tuning[".maxntid"].replace(" ", "") == "128,1,1"
    assert first.labels == {"$L_top": 1}
    mov, setp, ld, fma, *_ = first.instructions
    assert isinstance(mov.operands[1], Special)
    assert setp.guard[0].name == "%p1" and setp.guard[1]
    assert isinstance(setp.operands[0], Pair) and isinstance(setp.operands[3], Negated)
    assert setp.operands[2] == Immediate(-5)
    assert isinstance(ld.operands[0], Vector) and ld.operands[0].items[1] == Symbol("_")
    assert isinstance(ld.operands[1], Address) and ld.operands[1].offset == -8
    assert fma.operands[2:] == (Immediate(0x3F800000, 32), Immediate(0x40000000, 32))
    assert isinstance(mov.operands[0], Register) and mov.operands[0] == setp.operands[1]


def test_source_places():
    module = parse(TEXT)
    mov, setp, *_ = module.entries["first"].instructions
    assert module.place(mov.source) == "folder/one.cu:10"
    assert module.place(setp.source) == "two.h:7 (inlined at folder/one.cu:12)"
    lines = TEXT.split("\n")
    assert "mov.u32" in lines[mov.line - 1] and "setp" in lines[setp.line - 1]


def test_kernels_are_found_by_a_unique_part_of_the_name():
    module = load_module(TEXT)
    assert module.kernels == ["first", "second"]
    assert module.syntax.entry("sec").name == "second"
    for name in ("s", "third"):
        with pytest.raises(LaunchError, match="has: first, second"):
            module.syntax.entry(name)


def test_the_same_text_is_parsed_once():
    assert load_module(TEXT) is load_module(str(TEXT))
    assert load_module(TEXT).program("second") is load_module(TEXT).program("second")


@pytest.mark.parametrize(
    "body, error, message",
    [
        ("mov.u32 %r99, 1;", Unsupported, "%r99"),
        ("add.u32 %r0, %r1, undeclared;", Unsupported, "undeclared"),
        ("bra nowhere;", Unsupported, "nowhere"),
        (".reg .b32 x; .reg .b32 x;", ParseError, "declared twice"),
        ("@%q mov.u32 %r0, 1;", ParseError, "%q"),
        ("mov.u32 %r0, 1.5;", Unsupported, "1.5"),
        ("mov.u32 %r0 ` ;", ParseError, "cannot read"),
        (".reg .v2 .f32 %v;", Unsupported, ".v2"),
        ("call.uni f;", Unsupported, "call"),
        ("add.f32 %f0, %f1, 3;", Unsupported, "integer constant 3"),
    ],
)
def test_errors_name_the_line(body, error, message):
    with pytest.raises(error, match="PTX line 12") as caught:
        load_module(kernel(body)).program("test")
    assert message in str(caught.value)


def test_functions_are_refused():
    with pytest.raises(Unsupported, match=r"\.func"):
        parse(HEADER + ".visible .func f() { ret; }")
