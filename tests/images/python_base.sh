#!/usr/bin/env bash
# Makes a base image out of this machine's own Python, its libraries and a shell, so that a test needs no registry:
# tests/images/python_base.sh NAME:TAG. The wheels that fit this Python fit the image.
set -euo pipefail

name=$1
python=${PYTHON:-python3}
prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mkdir -p "$root"/{tmp,proc,sys,dev,etc,root,bin,usr/bin,lib64,usr/local/bin,"usr/local/lib/python$version"}
cp -a "$prefix/bin/python$version" "$root/usr/local/bin/"
ln -s "python$version" "$root/usr/local/bin/python3"
ln -s "python$version" "$root/usr/local/bin/python"
cp -a "$prefix/lib/libpython$version"* "$root/usr/local/lib/" 2>/dev/null || true
tar -C "$prefix/lib/python$version" --exclude=site-packages --exclude=test --exclude=idlelib --exclude=tkinter \
  --exclude=__pycache__ --exclude='config-*' --exclude=lib2to3 -c . | tar -C "$root/usr/local/lib/python$version" -x
mkdir "$root/usr/local/lib/python$version/site-packages"
cp -a "$prefix/lib/python$version/site-packages/pip" "$root/usr/local/lib/python$version/site-packages/"

{
  ldd "$prefix/bin/python$version"
  find "$prefix/lib/python$version/lib-dynload" -name '*.so' ! -name '*tkinter*' ! -name '*_test*' -exec ldd {} +
} | grep -oE '/[^ ]+\.so[^ ]*' | grep -v libpython | sort -u >"$root/libraries"
# What packages with native code ask for.
for library in libstdc++.so.6 libgcc_s.so.1 libnss_files.so.2 libnss_dns.so.2 libresolv.so.2 librt.so.1 libpthread.so.0 libdl.so.2 libutil.so.1; do
  ldconfig -p | awk -v name="$library" '$1 == name && /64/ && !found {print $NF; found = 1}' >>"$root/libraries"
done
while read -r library; do
  [ -e "$library" ] || continue
  mkdir -p "$root$(dirname "$library")"
  cp -L "$library" "$root$library"
done <"$root/libraries"
rm "$root/libraries"

cp /bin/busybox "$root/bin/busybox"
for command in sh ls cat env id mkdir rm cp mv ln chmod sleep uname hostname touch; do ln -sf busybox "$root/bin/$command"; done
ln -s /bin/env "$root/usr/bin/env"
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
chmod 1777 "$root/tmp"
printf '/usr/local/lib\n/lib/%s\n/usr/lib/%s\n' "$(uname -m)-linux-gnu" "$(uname -m)-linux-gnu" >"$root/etc/ld.so.conf"
ldconfig -r "$root"
tar -C "$root" -c . | docker import --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin' - "$name" >/dev/null
