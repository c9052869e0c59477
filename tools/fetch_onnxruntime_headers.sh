#!/usr/bin/env bash
# Unpack Debian's libonnxruntime-dev (headers only) into a folder, without installing it and without
# being root. Usage: fetch_onnxruntime_headers.sh FOLDER
#
# The package came with trixie, the release after bookworm: on an older Debian the machine's own
# sources file is read with the suite changed, in apt lists of its own.
set -euo pipefail
folder=${1:?usage: fetch_onnxruntime_headers.sh FOLDER}
sources=${MQC_DEBIAN_SOURCES:-/etc/apt/sources.list.d/debian.sources}

for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || { echo "headers: no $tool on this system" >&2; exit 1; }
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/state"

if [ -f "$sources" ]; then
    # The first stanza is the main archive; security and updates are not needed.
    awk 'BEGIN { RS = ""; ORS = "\n\n" } NR == 1' "$sources" |
        sed -E 's/^Suites:.*/Suites: trixie/' >"$work/debian.sources"
elif [ -f /etc/apt/sources.list ]; then
    awk '$1 == "deb" && $2 ~ /^http/ { print $1, $2, "trixie", "main"; exit }' \
        /etc/apt/sources.list >"$work/debian.list"
else
    echo "headers: no apt sources on this system" >&2
    exit 1
fi

options=(
    -qq
    -o "Dir::Etc::sourcelist=$(ls "$work"/debian.*)"
    -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache=$work/cache"
    -o Debug::NoLocking=1
    -o APT::Sandbox::User=
)
apt-get "${options[@]}" update
(cd "$work" && apt-get "${options[@]}" download libonnxruntime-dev)
rm -rf "$folder"
mkdir -p "$folder"
dpkg -x "$work"/libonnxruntime-dev_*.deb "$folder"
echo "headers: $(basename "$work"/libonnxruntime-dev_*.deb) unpacked into $folder"
