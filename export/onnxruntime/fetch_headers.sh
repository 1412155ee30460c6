#!/usr/bin/env bash
# ONNX Runtime's headers and nlohmann/json into DIR, from Debian's packages. They are in no wheel. Debian and Ubuntu
# alone; elsewhere unpack a release of ONNX Runtime and set ONNXRUNTIME_ROOT. Installs nothing.
#
#     export/onnxruntime/fetch_headers.sh [DIR]        (default: build/onnxruntime)
set -euo pipefail
out=$(realpath -m "${1:-build/onnxruntime}")
suite=trixie # the first with the package

fail() { echo "fetch_headers: $1; unpack a release of ONNX Runtime and set ONNXRUNTIME_ROOT to it" >&2; exit 2; }
command -v apt-get >/dev/null || fail "this is no Debian"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | head -n 1 || true)
[ -n "$mirror" ] || mirror=$(grep -rhoE 'https?://[^ ]*/debian/?( |$)' /etc/apt/sources.list* | head -n 1 || true)
[ -n "$mirror" ] || fail "apt has no Debian mirror"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/lists/partial "$work"/cache/archives/partial
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
apt=(apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update >/dev/null || fail "apt cannot read $suite"
mkdir -p "$out"
for package in libonnxruntime-dev nlohmann-json3-dev; do
    (cd "$work" && "${apt[@]}" download "$package" >/dev/null) || fail "$suite has no $package"
    dpkg-deb -x "$work/$package"_*.deb "$out"
done
echo "The headers are in $out"
