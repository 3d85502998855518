#!/usr/bin/env bash
# Guess: a loop in a Triton kernel means what the same Python means. `before = now; now = now + step` leaves in
# `before` what `now` was one iteration ago, however the two began.
#
# Real behaviour: if both begin as the same value, `before` keeps it for ever, without an error or a warning. To find
# the variables that a loop carries, the compiler visits its body once with the values before the loop, and compares each
# variable with what it was. In that visit `before = now` assigns the very value that `before` has, so it counts as
# unchanged, and is not carried. The same of Gluon, of while loops, and of an exchange of two variables. Begun as equal but
# different values (`first * 1 + n - n`) the kernel is right. The interpreter (TRITON_INTERPRET=1), which is Python, is
# right too, so that it does not show the fault.
# Version: triton 3.9.0; no GPU is needed to see it.
# Source: python/triton/compiler/code_generator.py, _find_carries (compares live_handles and loop_handles).
# Bitten: kernels with software pipelines by hand, which keep the row, the offset or the mask of the iteration before
# under a second name: all iterations then use the first one's.
#
# Output seen:
#   begun as one value:      1 of 1 kernel has lost its loop
#   begun as equal values:   0 of 1 kernel has lost its loop
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0
cat > "$folder/kernels.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def one_value(pointer, n):
    first = tl.load(pointer)
    now = first
    before = first
    for _ in range(n):
        before = now
        now = now + 1
    tl.store(pointer, before)


@triton.jit
def equal_values(pointer, n):
    first = tl.load(pointer)
    now = first
    before = first * 1 + n - n
    for _ in range(n):
        before = now
        now = now + 1
    tl.store(pointer, before)


found = {}
for kernel, text in ((one_value, "begun as one value:"), (equal_values, "begun as equal values:")):
    source = ASTSource(kernel, {"pointer": "*i32", "n": "i32"})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    # What is stored is what was loaded: nothing is left of the loop.
    found[text] = int("scf.for" not in code)
    print(f"{text:24s} {found[text]} of 1 kernel has lost its loop")
sys.exit(0 if list(found.values()) == [1, 0] else 1)
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/kernels.py" 2> "$folder/errors" ||
    { cat "$folder/errors"; exit 1; }
