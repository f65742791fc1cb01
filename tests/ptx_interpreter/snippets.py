"""Hand-written PTX for the tests: whole kernels around a few instructions."""

import numpy as np

from . import Report, launch, load_module

HEADER = ".version 8.7\n.target sm_90\n.address_size 64\n"
REGISTER_TYPES = {"?": "pred", 1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, parameters: str = "", variables: str = "") -> str:
    """A module with the kernel `test`; `%r0..%r63`, `%h`, `%d`, `%p` and `%f` are declared."""
    return f"""{HEADER}{variables}
.visible .entry test({parameters})
{{
.reg .pred %p<64>;
.reg .b16 %h<64>;
.reg .b32 %r<64>;
.reg .f32 %f<64>;
.reg .b64 %d<64>;
{body}
ret;
}}
"""


def evaluate(instructions: str, out: str, *inputs, types: str = "", **options) -> np.ndarray:
    """Runs the instructions once for each element of the inputs, one thread each.

    The inputs are in registers `%a`, `%b`, ... (bool arrays: predicates; one-byte integers: 16-bit
    registers); the result is taken from `%out`, declared with the PTX type that fits numpy type
    `out`. `types` adds declarations.
    """
    inputs = [np.ascontiguousarray(np.atleast_1d(each)) for each in inputs]
    count = max([len(each) for each in inputs], default=32)
    inputs = [np.ascontiguousarray(np.broadcast_to(each, count)) for each in inputs]
    result = np.zeros(count, out)
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(inputs) + 1))
    lines = [types, ".reg .pred %beyond; .reg .b32 %i, %n, %j; .reg .b64 %o, %q; .reg .b16 %byte;"]
    lines += ["mov.u32 %i, %ctaid.x; mov.u32 %n, %ntid.x; mov.u32 %j, %tid.x;"]
    lines += [f"mad.lo.u32 %i, %i, %n, %j; setp.ge.u32 %beyond, %i, {count}; @%beyond ret;"]
    for position, each in enumerate(inputs):
        lines.append(_load("abcdefgh"[position], position, each.dtype))
    size = result.dtype.itemsize
    register = "pred" if out == "?" else REGISTER_TYPES[size]
    lines += [f".reg .{register} %out;", instructions]
    lines += [
        f"ld.param.u64 %q, [p{len(inputs)}]; mul.wide.u32 %o, %i, {size}; add.u64 %q, %q, %o;"
    ]
    if out == "?":
        lines.append("selp.u16 %byte, 1, 0, %out; st.global.u8 [%q], %byte;")
    else:
        lines.append(f"st.global.b{8 * size} [%q], %out;")
    text = kernel("\n".join(lines), parameters)
    launch(load_module(text), "test", -(-count // 128), 128, [*inputs, result], **options)
    return result


def _load(name: str, position: int, dtype: np.dtype) -> str:
    size = dtype.itemsize
    address = f"ld.param.u64 %q, [p{position}]; mul.wide.u32 %o, %i, {size}; add.u64 %q, %q, %o;"
    if dtype == np.bool_:
        load = f"{address} ld.global.u8 %byte, [%q];"
        return f".reg .pred %{name}; {load} setp.ne.u16 %{name}, %byte, 0;"
    kind = "s8" if dtype == np.int8 else "u8" if size == 1 else f"b{8 * size}"
    return f".reg .{REGISTER_TYPES[size]} %{name}; {address} ld.global.{kind} %{name}, [%q];"


def run(body: str, *args, block=32, grid=1, parameters: int | None = None, **options) -> Report:
    """Launches `kernel(body)` with pointer parameters p0, p1, ..., loaded into %d0, %d1, ..."""
    count = len(args) if parameters is None else parameters
    names = ", ".join(f".param .u64 p{i}" for i in range(count))
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(count))
    variables = options.pop("variables", "")
    text = kernel(f"{loads}\n{body}", names, variables)
    return launch(load_module(text), "test", grid, block, args, **options)
