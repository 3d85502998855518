#!/bin/sh
# Takes out of /opt/els what only builds or tests, and compiles the rest: nothing is written at run.
set -eu
site=/opt/els/lib/python3.11/site-packages
/opt/els/bin/pip uninstall --quiet --yes pip
rm -rf "$site"/torch/include "$site"/torch/test "$site"/torch/share
find "$site/torch/bin" -type f ! -name torch_shm_manager -delete # torch asks for it on import
rm -f "$site"/torch/lib/lib*test.so "$site"/torch/lib/libaoti_custom_ops.so \
    "$site"/torch/lib/libbackend_with_compiler.so
rm -rf "$site"/onnx/backend/test
find "$site" -name '*.a' -delete
find "$site/torch" -name '*.h' -delete
find "$site/sympy" "$site/networkx" "$site/numpy" -depth -type d -name tests \
    -exec rm -rf {} +
# By content, so that the files' times do not matter. Some helpers for tests are of newer Pythons.
python3 -m compileall -q -j 2 --invalidation-mode unchecked-hash -x torch/testing/_internal "$site"
