#!/bin/sh
# Runs as a hook of mmdebstrap on the finished tree: "$1" is its root, REMORA_VARIANT the kind of base.
# `minimal` packages were only unpacked: their maintainer scripts want tools that such a small image does not have, and
# what those scripts would have done for a program in a container is done here.
set -eu
root=$1
cd "$root"

if [ "$REMORA_VARIANT" = minimal ]; then
  cp usr/share/base-passwd/passwd.master etc/passwd
  cp usr/share/base-passwd/group.master etc/group
  # An applet of busybox for each command that no package brought.
  busybox=bin/busybox
  [ -e "$busybox" ] || busybox=usr/bin/busybox
  chroot . "/$busybox" --list-full | sort | while read -r applet; do
    name=${applet##*/}
    [ -e "bin/$name" ] || [ -e "sbin/$name" ] || [ -e "usr/bin/$name" ] || [ -e "usr/sbin/$name" ] ||
      [ -L "bin/$name" ] || [ -L "sbin/$name" ] || [ -L "usr/bin/$name" ] || [ -L "usr/sbin/$name" ] ||
      [ ! -d "${applet%/*}" ] || ln -s "/$busybox" "$applet"
  done
  # Without its scripts dpkg could not keep its promises; the list of packages stays for scanners.
  rm -rf usr/bin/dpkg* usr/sbin/dpkg* sbin/start-stop-daemon usr/share/dpkg usr/lib/dpkg usr/libexec/dpkg \
    var/lib/dpkg/info var/lib/dpkg/triggers var/lib/dpkg/updates var/lib/dpkg/parts etc/dpkg
  # Character sets for iconv(3); Python and C.UTF-8 do not use them.
  rm -rf usr/lib/*/gconv lib/*/gconv usr/bin/localedef usr/bin/iconv usr/sbin/iconvconfig usr/share/i18n
  chroot . /sbin/ldconfig
fi

# What is of no use at run time, or tells about the machine that built it. Licences stay.
find usr/share/doc -mindepth 1 ! -type d ! -name 'copyright*' -delete
find usr/share/doc -mindepth 1 -type d -empty -delete
rm -rf usr/share/man usr/share/info usr/share/locale usr/share/lintian usr/share/bug usr/share/linda \
  var/cache/debconf var/cache/ldconfig var/log/*.log var/log/apt etc/apt/sources.list.d/*.sources \
  etc/apt/sources.list.d/*.list etc/apt/sources.list etc/resolv.conf etc/hostname var/lib/apt/lists var/cache/apt
[ "$REMORA_VARIANT" = minimal ] || mkdir -p var/lib/apt/lists/partial var/cache/apt/archives/partial
rm -f var/lib/dpkg/*-old

for tree in usr/lib/python3.*; do
  [ -x "usr/bin/${tree##*/}" ] || continue
  rm -rf "$tree"/lib2to3 "$tree"/pydoc_data "$tree"/idlelib "$tree"/ensurepip "$tree"/test "$tree"/turtledemo
  find "$tree" -name __pycache__ -prune -exec rm -rf {} +
  # Bytecode that is never checked against its source: start-up reads half the files, and equal input gives equal bytes
  # (without DONTWRITE the modules that compileall itself imports would get bytecode with a time in it).
  PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 chroot . "/usr/bin/${tree##*/}" \
    -m compileall -q -f --invalidation-mode unchecked-hash "/$tree"
done
