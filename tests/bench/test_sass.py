"""Machine code, as nvdisasm prints it, to loops and the names of the source."""

from alure.bench.ahead_of_time.compiled import regions_of, slow_products
from alure.bench.ahead_of_time.sass import Region, call_chains, loops, named_loops, parse

# A loop (L_x_1) with a loop in it (L_x_2), unrolled twice, and a wait out of line (L_x_4) that jumps back into it.
CODE = """
	.section	.text.f,"ax",@progbits
f:
.text.f:
	//## File ".nv_debug_ptx_txt", line 2
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R3, desc[UR52][R2.64] ;
        /*0020*/              @!P2 BRA `(.L_x_3) ;
	//## File ".nv_debug_ptx_txt", line 4
        /*0030*/                   FADD R3, R3, R3 ;
.L_x_2:
        /*0040*/                   MUFU.EX2 R4, R3 ;
        /*0050*/                   MUFU.EX2 R4, R3 ;
        /*0060*/                   BRA.U UP1, `(.L_x_2) ;
.L_x_3:
	//## File ".nv_debug_ptx_txt", line 2
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR4] ;
        /*0080*/              @!P6 BRA `(.L_x_4) ;
.L_x_5:
        /*0090*/              @P0 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR4] ;
        /*00c0*/              @!P6 BRA `(.L_x_4) ;
        /*00d0*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*00e0*/                   BRA `(.L_x_6);
        /*00f0*/                   NOP;
"""
PTX = """.loc 1 20 5 // kernel.py:20:5
ld.global.b32
.loc 2 7 3 // helpers.py:7:3 @[ kernel.py:22:9 ]
ex2.approx.f32
"""


def test_natural_loops_and_not_backward_jumps() -> None:
    (outer,) = loops(*parse(CODE))
    (inner, wait) = outer.nested
    assert [this.name for this in outer.own] == ["LDG", "BRA", "FADD", "SYNCS", "BRA", "BRA", "BRA"]
    assert [this.name for this in inner.own] == ["MUFU", "MUFU", "BRA"]
    assert [this.name for this in wait.own] == ["SYNCS", "BRA"]
    assert inner.unrolled() == 2


def test_a_loop_is_named_where_its_helper_is_called() -> None:
    chains = call_chains(PTX)
    assert chains[4] == [("helpers.py", 7), ("kernel.py", 22)]
    rows, keys = Region("rows", "kernel.py", 19, 30), Region("keys", "kernel.py", 22, 22)
    found = named_loops(loops(*parse(CODE)), chains, [rows, keys])
    assert found["keys"] == {"MUFU": 1, "BRA": 0.5}
    assert found["rows"] == {"LDG": 1, "BRA": 5, "FADD": 1, "SYNCS": 2}
    merged = named_loops(loops(*parse(CODE)), chains, [rows])
    assert merged == {"rows": {"LDG": 1, "BRA": 5.5, "FADD": 1, "SYNCS": 2, "MUFU": 1}}
    assert named_loops(loops(*parse(CODE)), chains, [Region("rows", "other.py", 1, 99)]) == {}


def test_a_marker_names_the_statement_it_stands_on() -> None:
    text = "def f(x):\n    for i in x:  # loop: rows\n        g(\n            i)  # loop: keys\n    return x\n"
    assert list(regions_of("a.py", text)) == [Region("rows", "a.py", 2, 4), Region("keys", "a.py", 3, 4)]


def test_products_that_are_not_tensor_core_instructions_of_the_architecture() -> None:
    mma = "#mma = #ttg.nvidia_mma<{versionMajor = 2}>\n"
    dot = "  %x = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xbf16> -> tensor<64x64xf32, #{}> loc(#l)\n"
    assert slow_products(mma + dot.format("mma"), 80) == 0
    assert slow_products(mma + dot.format("blocked"), 80) == 1
    assert slow_products(mma + dot.format("mma") + "  %y = ttng.warp_group_dot %a, %b", 90) == 1
    assert slow_products("  %y = ttng.warp_group_dot %a, %b", 90) == 0
