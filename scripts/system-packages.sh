#!/usr/bin/env bash
# Installs the Debian/Ubuntu packages that Remora stands on, or says which are missing where there is no apt.
set -euo pipefail

# command that proves it   package
NEEDED="
qemu-system-x86_64   qemu-system-x86
mmdebstrap           mmdebstrap
mkfs.erofs           erofs-utils
skopeo               skopeo
bwrap                bubblewrap
cpio                 cpio
zstd                 zstd
lz4                  lz4
python3              python3
dpkg                 dpkg
mount                mount
cc                   gcc libc6-dev
"

missing=()
# shellcheck disable=SC2206
while read -r command package; do
  [ -z "$command" ] && continue
  command -v "$command" >/dev/null 2>&1 || missing+=($package) # one or several
done <<<"$NEEDED"
"${PYTHON:-python3}" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing+=(python3-venv)

if [ "${#missing[@]}" -eq 0 ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
  echo "remora: this machine has no apt; install the equivalents of these Debian packages and try again:" >&2
  printf '  %s\n' "${missing[@]}" >&2
  exit 1
fi
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null 2>&1 || {
    echo "remora: not root and no sudo; as root run: apt-get install ${missing[*]}" >&2
    exit 1
  }
  sudo=(sudo)
fi
echo "remora: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
