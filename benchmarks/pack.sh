#!/usr/bin/env bash
# Packs the packages that the project needs on a machine without network, beyond those that are presumed to be there.
#
#     benchmarks/pack.sh [FOLDER]                              # default: build/pack; it must not exist yet
#     PYTHON_VERSION=3.13 PLATFORM=aarch64-manylinux_2_28 benchmarks/pack.sh
#
# It needs a network and a python3 with venv. FOLDER/packages has the packages, FOLDER/packages.tar.gz is the same to copy, and
# the last line printed is the one to type on the other machine. PYTHON_VERSION is the Python of that machine, PLATFORM its
# system and processor, spelt as for `uv pip install --python-platform`.
set -euo pipefail

# Presumed: an image with torch, transformers, peft and accelerate has them, and they fit its GPU or are large. setuptools,
# because torch bounds its release. Their releases are not known here: `python3 -m pip check` there names those that do not fit.
presumed=(torch numpy pyarrow transformers tokenizers huggingface-hub hf-xet safetensors accelerate peft setuptools)
# Besides what the project requires: the tests of the GPU (tests/cuda).
tests=(pytest hypothesis)
# Published as source alone, in pure Python, so that a wheel built here fits there.
source_only=antlr4-python3-runtime

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/build/pack}
if [ -e "$folder" ]; then
  echo "error: $folder exists, and a new folder was expected; remove it, or type benchmarks/pack.sh OTHER_FOLDER" >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# uv and not pip, which cannot leave out a package with all that it requires, and would download torch.
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet uv
printf '%s\n' "${presumed[@]}" >"$work/presumed.txt"
"$work/venv/bin/uv" pip install --requirement "$root/pyproject.toml" "${tests[@]}" --excludes "$work/presumed.txt" \
  --target "$work/packages" --python-version "${PYTHON_VERSION:-3.12}" \
  --python-platform "${PLATFORM:-x86_64-manylinux_2_28}" --only-binary :all: --no-binary "$source_only"

mkdir -p "$folder"
mv "$work/packages" "$folder"
tar -czf "$folder/packages.tar.gz" -C "$folder" packages
echo "$(du -m "$folder/packages.tar.gz" | cut -f1) MiB packed, $(du -sm "$folder/packages" | cut -f1) MiB unpacked"
echo "Copy $folder/packages.tar.gz to the machine, and type beside it:"
echo "tar -xzf packages.tar.gz && export PYTHONPATH=\$PWD/packages"
