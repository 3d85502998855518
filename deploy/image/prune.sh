#!/bin/sh
# Removes from /opt/els what only builds and tests need, and compiles the rest, as nothing is written at
# run time.
set -eu
site=/opt/els/lib/python3.11/site-packages
/opt/els/bin/pip uninstall --quiet --yes pip
rm -rf "$site"/torch/include "$site"/torch/test "$site"/torch/share
find "$site/torch/bin" -type f ! -name torch_shm_manager -delete # torch needs it on import
rm -f "$site"/torch/lib/lib*test.so "$site"/torch/lib/libaoti_custom_ops.so \
    "$site"/torch/lib/libbackend_with_compiler.so
rm -rf "$site"/onnx/backend/test
# Of OpenVINO, all but its CPU plugin and the readers of torch modules and ONNX graphs.
for name in cmake include libs/cache.json 'libs/libopenvino_intel_[gn]pu_plugin.so' \
    'libs/libopenvino_tensorflow*' 'libs/libopenvino_paddle*' 'libs/libopenvino_gguf*' \
    'libs/libopenvino_jax*'; do
    # shellcheck disable=SC2086  # a pattern
    rm -rf "$site"/openvino/$name
done
find "$site" -name '*.a' -delete
find "$site/torch" -name '*.h' -delete
find "$site/sympy" "$site/networkx" "$site/numpy" -depth -type d -name tests \
    -exec rm -rf {} +
# By content, so that file times do not matter. Some test helpers need newer Pythons.
python3 -m compileall -q -j 2 --invalidation-mode unchecked-hash -x torch/testing/_internal "$site"
