#!/usr/bin/env bash
# Checks luna_vision on one CUDA GPU in under 8 minutes, from the root of a clone: correctness, timings, a training step,
# and then the tests of the parts that take tensors as they come, with everything made on the GPU.
#   bash experiments/gpu/gpu_check.sh [ARGUMENTS OF PYTEST]
#   bash experiments/gpu/gpu_check.sh wheels    for a GPU without network: on any machine, fetch wheels into runs/wheels
# Results go to docs/results/gpu, or $OUT. DEVICE=cpu is a dry run in small.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="${OUT:-docs/results/gpu}" device="${DEVICE:-cuda}"
export DEVICE="$device" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NO_ALBUMENTATIONS_UPDATE=1

if [ "${1:-}" = wheels ]; then
  # what luna_vision[train] and its tests import beyond an image of Python 3.12 with torch, lightning, torchmetrics,
  # scikit-learn and pytest
  exec python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d runs/wheels \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 \
    timm==1.0.31 albumentations==2.0.8 albucore==0.0.24 stringzilla==5.3.2 simsimd==6.5.16 pydantic==2.14.4 \
    pydantic-core==2.50.5 typing-inspection==0.4.5 annotated-types==0.8.0 jsonargparse==4.53.0 docstring-parser==0.18.0 \
    typeshed-client==2.15.0 webdataset==1.0.2 braceexpand==0.1.7 pycocotools==2.0.11 colorcet==3.2.1 pillow==13.0.0 \
    filelock==4.3.1 typing-extensions==4.16.0
fi

site=
if ls runs/wheels/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" runs/wheels/*.whl
fi
export PYTHONPATH="$PWD:$site:${PYTHONPATH:-}"
if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
fi
mkdir -p "$out"
code=0
check() { # seconds, sections
  timeout "$(($1 + 20))" python3 -m experiments.gpu.gpu_check --device "$device" --out "$out" --seconds "$1" --sections "${@:2}" \
    2>&1 | tee -a "$out/check.log" || code=1
}
rm -f "$out/check.log"
# what is right or wrong does not depend on what runs beside it, and times do
timeout 200 python3 -m pytest -q --maxfail=60 -n "${JOBS:-8}" --timeout 60 -p experiments.gpu.cuda_default \
  -p no:cacheprovider -rs -m "not slow" "$@" tests/functional tests/layers tests/mixers tests/models/test_luna_vit.py \
  tests/models/test_memory_len.py >"$out/pytest.log" 2>&1 &
tests=$!
check 150 machine layer models execution waits kernels
wait "$tests" || code=1
tail -45 "$out/pytest.log"
check 240 machine kernel_speed speed profile training
tail -30 "$out/check.log"
exit "$code"
