"""Counting the instructions of loops in a disassembly."""

from __future__ import annotations

from ella_kernels.sass import Loop, inner_loops


def sass(*operations):
    return "\n".join(f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(operations))


def test_only_the_innermost_loop_counts():
    fill = ["FFMA R0, R1, R2, R3"]
    # 10 instructions, a loop of 50 with two matrix products, and a branch around both.
    inner = [*fill * 47, "HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4]", "@!P1 HMMA.1688.F32.TF32 R4, R4", "@P0 BRA 0xa0"]
    code = sass(*fill * 10, *inner, *fill * 5, "@!P2 BRA 0x20", "EXIT")
    assert inner_loops(code) == [Loop(50, 2)]


def test_short_loops_and_forward_branches_are_not_steps():
    code = sass("BRA 0x40", *["NOP"] * 60, "@P0 BRA 0x3a0", "EXIT")
    assert inner_loops(code) == []


def test_two_loops_in_the_order_of_the_code():
    body = ["IADD3 R0, R0, R1, RZ"] * 45
    code = sass(*body, "@P0 BRA 0x0", *body, *body, "@UP0 BRA 0x2e0", "EXIT")
    assert inner_loops(code) == [Loop(46, 0), Loop(91, 0)]
