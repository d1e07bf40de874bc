"""The ahead-of-time gate: every Triton kernel compiled for GPUs that are not here, and held to a budget.

    python -m alure.bench.ahead_of_time            what `make kernels` runs

A kernel.py lists what it ships in `AHEAD_OF_TIME`, and what would take the tests too long in `AHEAD_OF_TIME_SLOW`:
tuples (kernel, signature, constexprs[, options[, facts]]).

    signature   every argument that is not a constexpr → its type: "*bf16", "*i64", "i32", "fp32"; ":16" after it says
                that the value (of a pointer: the address) is a multiple of 16, as the launcher sees for torch tensors
    constexprs  every other argument → its value
    options     launch options: {"num_warps": 4, "num_stages": 2}
    facts       {"name": "forward bf16 64 time", "loops": {"uniform": 128 * 64}}
                name    of the case in budget.json; without it the kernel's name and all constexprs
                architectures   that ship the case, (90, 100) say; without it all
                loops   loop → elements that a block handles in one iteration of it; the gate divides by them

A loop gets its name from a comment `# loop: NAME` in a file of the kernel's folder: on the `for` line, or on the
statement that calls the helper with the loop in it. One helper inlined three times is three loops, named where it is
called. Loops nested in a named one count with it, every instruction once, unless they have another name.
Of several loops of one name (a peeled copy) the longest counts. A loop that the compiler unrolled whole or merged into
the one around it is not measured; the budget knows which there are, so that one cannot vanish unseen.

`sass` reads machine code, `compiled` makes it and measures, `budget` judges, `__main__` prints.
"""
