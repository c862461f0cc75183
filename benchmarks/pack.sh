#!/usr/bin/env bash
# Packs what the project needs on a machine without network, beyond the packages listed below.
#
#     benchmarks/pack.sh [FOLDER]                              # default: build/pack, which must not exist yet
#     PYTHON_VERSION=3.13 PLATFORM=aarch64-manylinux_2_28 benchmarks/pack.sh
#
# It needs a network and python3 with pip and venv. It writes FOLDER/packages, and the same as FOLDER/packages.tar.gz to copy,
# and prints the line to type on the other machine. PYTHON_VERSION is that machine's Python, and PLATFORM its system, as the
# option --python-platform of `uv pip install --help` lists them.
set -euo pipefail

# Presumed to be there, and not packed: what depends on the GPU or is large, and an image with torch, transformers, peft and
# accelerate has it. setuptools, because torch bounds its release. No release of them is known here: a package that is too old
# for the packed ones is told when they are imported.
presumed=(torch numpy pyarrow transformers tokenizers huggingface-hub hf-xet safetensors accelerate peft setuptools)
# Published as source alone. It is pure Python, so the wheel built here fits any machine.
source_only=antlr4-python3-runtime

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/build/pack}
if [ -e "$folder" ]; then
  echo "error: $folder exists; remove it, or type benchmarks/pack.sh with another folder" >&2
  exit 1
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
tools=$(mktemp -d)
trap 'rm -r "$tools"' EXIT

# pip cannot leave a package and all that it requires out of a resolution, and so would download torch; uv can.
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet uv
printf '%s\n' "${presumed[@]}" >"$tools/presumed.txt"
"$tools/bin/uv" pip install --requirement "$root/pyproject.toml" --excludes "$tools/presumed.txt" \
  --target "$folder/packages" --python-version "${PYTHON_VERSION:-3.12}" \
  --python-platform "${PLATFORM:-x86_64-manylinux_2_28}" --only-binary :all: --no-binary "$source_only"
tar -czf "$folder/packages.tar.gz" -C "$folder" packages

echo "packed: $(du -m "$folder/packages.tar.gz" | cut -f1) MB, $(du -sm "$folder/packages" | cut -f1) MB unpacked"
echo "copy $folder/packages.tar.gz to the machine, and type beside it:"
echo "tar -xzf packages.tar.gz && export PYTHONPATH=\$PWD/packages"
