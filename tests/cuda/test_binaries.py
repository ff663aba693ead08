"""The CUDA C++ kernels as compiled, for GPUs that need not be there: registers, spills, width of the accesses."""

from __future__ import annotations

import functools
import re

import pytest

from tests.cuda import binaries
from tests.cuda.binaries import HOT, LIBRARY, Binary, Hot

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.timeout(120),  # disassembles every kernel
    pytest.mark.skipif(binaries.disassembler() is None, reason="needs cuobjdump, which comes with Triton"),
]
ARCHS = binaries.architectures() if binaries.disassembler() and LIBRARY.exists() else []


@functools.cache
def compiled(arch: str) -> list[Binary]:
    return binaries.binaries(arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(arch: str) -> None:
    """None uses local memory, and the hot ones are as planned."""
    found = compiled(arch)
    assert found
    assert [b.kernel for b in found if b.stack or b.local] == []
    for rule, binary in binaries.hot(found):
        assert binaries.complaints(rule, binary) == []
    for rule in HOT:
        assert any(re.fullmatch(rule.kernel, binary.kernel) for binary in found), f"no kernel is a {rule.kernel}"


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_wait_before_they_touch_what_another_may_still_write(arch: str) -> None:
    """Those that may start before the kernel in front has ended; sm_90 is the first to let them."""
    waiting = [binary for binary in compiled(arch) if binary.early is not None]
    assert [b.kernel for b in waiting if b.early or b.kept] == []
    others = {b.kernel for b in compiled(arch)} - {b.kernel for b in waiting}
    if int(arch.removeprefix("sm_")) >= 90:
        assert [name for name in others if not re.fullmatch(binaries.NEVER_EARLY, name)] == []
    else:
        assert not waiting


# --- the reading itself

SASS = """
		Function : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.LTC128B.64 R6, desc[UR8][R2.64] ;  /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR8][R2.64] ;
        /*0030*/               @P1 STG.E desc[UR8][R2.64], R1 ;
        /*0040*/              @UP0 LDG.E.U8.CONSTANT R1, desc[UR8][R2.64] ;
        /*0050*/                   LDL R1, [R1] ;
		Function : second
        /*0000*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*0010*/                   STL.64 [R1], R4 ;
        /*0020*/                   LDG.E.128.STRONG.GPU R4, desc[UR8][R2.64] ;
        /*0030*/                   LDG.E.ENL2.256 R4, R8, desc[UR8][R2.64] ;
		Function : third
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   STG.E desc[UR8][R2.64], R1 ;
        /*0020*/                   ACQBULK ;
        /*0030*/                   LDG.E.CONSTANT R1, desc[UR8][R2.64] ;
"""
USAGE = """
Fatbin elf code:
 Function first:
  REG:25 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_instructions_and_their_widths() -> None:
    code = dict(binaries.instructions(SASS))
    assert binaries.accesses(code["first"], ("LDG", "LDGSTS")) == {1: 1, 8: 1, 16: 1}
    assert binaries.accesses(code["first"], ("STG",)) == {4: 1}
    assert binaries.accesses(code["second"], ("LDG", "LDGSTS")) == {16: 1, 32: 1}
    assert [code[name].count(op) for name, op in (("first", "LDL"), ("second", "STL.64"))] == [1, 1]
    assert [binaries.before_wait(code[name]) for name in ("first", "third")] == [None, 1]
    usage = binaries.resources(USAGE)["first"]
    assert (usage["REG"], usage["STACK"], usage["SHARED"]) == (25, 8, 16)


def test_a_name_is_that_of_the_source() -> None:
    template = "_ZN8fastddpm4cuda12_GLOBAL__N_113normal_kernelINS0_4TileILi4ELi0EEEfEEvNS0_6NormalEl"
    function = "_ZN8fastddpm4cuda12_GLOBAL__N_112words_kernelENS1_5WordsE"
    names = binaries.demangled([template, function])
    assert names == {template: "normal_kernel<Tile<4, 0>, float>", function: "words_kernel"}


def test_what_is_not_as_planned_is_told() -> None:
    rule = Hot("k", registers=32, loads=2, stores=1, narrow=1)
    good = Binary("k", "sm_90", 32, 0, 0, 0, loads={4: 1, 16: 2}, stores={16: 1}, early=None, kept=0)
    bad = Binary("k", "sm_90", 33, 0, 0, 0, loads={4: 2, 16: 1}, stores={8: 1}, early=None, kept=0)
    assert binaries.complaints(rule, good) == []
    assert len(binaries.complaints(rule, bad)) == 4
