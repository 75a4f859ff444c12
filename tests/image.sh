#!/usr/bin/env bash
# Builds the image and runs the product in it as uid 1000, without a container engine's daemon or a
# registry: with buildah, on a base image made with debootstrap.
#
#   apt-get install buildah debootstrap && tests/image.sh        as root; 20 minutes, 25 GB in TMPDIR
#
# Prints the size of each layer. Any failure gives an exit code other than 0.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp --directory --tmpdir flexunet-image-XXXXXX)
trap 'rm -rf "$work"' EXIT
engine="buildah --storage-driver vfs --root $work/root --runroot $work/run"
say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
# As in the manifests: uid 1000 without privileges, a read-only root, and the mounts. buildah has no
# option for a read-only root, so the command itself starts as root and then drops privileges.
inside() {
    $engine run --isolation chroot --user 0 --cap-add CAP_SYS_ADMIN -v "$PWD/docs:/etc/flexunet:ro" \
        -v "$work/tmp:/tmp" -v "$work/cache:/cache" flexunet-test -- sh -c 'mount -o remount,bind,ro / &&
        exec setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --bounding-set=-all -- "$@"' sh "$@"
}
mkdir --mode=1777 "$work/tmp" "$work/cache"

say "base image"
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base" >"$work/log" ||
    { tail "$work/log" >&2; exit 1; }
container=$($engine from scratch)
# A network that inspects TLS has its own certificate, which the build must trust like this machine.
if [[ -n ${SSL_CERT_FILE:-} ]]; then
    cp "$SSL_CERT_FILE" "$work/base/etc/ssl/certs/ca-certificates.crt"
    $engine config --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
        --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$container"
fi
$engine add --quiet "$container" "$work/base" / >/dev/null
$engine commit --quiet "$container" localhost/base >/dev/null
$engine rm "$container" >/dev/null
rm -rf "$work/base"

for target in bucket cpu; do
    say "make image TARGET=$target"
    make --no-print-directory image TARGET=$target IMAGE=localhost/flexunet:$target BASE=localhost/base \
        ENGINE="$engine" BUILD_FLAGS="--isolation chroot --network host --layers --pull-never" >"$work/log" 2>&1 ||
        { tail -n 40 "$work/log" >&2; exit 1; }
done
say "layers"
$engine inspect --type image localhost/flexunet:cpu >"$work/image.json"
python3 - "$work" <<'PYTHON'
import json, sys
work = sys.argv[1]
image = json.load(open(f"{work}/image.json"))["OCIv1"]
layers = json.load(open(f"{work}/root/vfs-layers/layers.json"))
sizes = {layer["diff-digest"]: layer["diff-size"] for layer in layers if "diff-digest" in layer}
steps = [step for step in image["history"] if not step.get("empty_layer")]
for digest, step in zip(image["rootfs"]["diff_ids"], steps, strict=True):
    made_by = step.get("created_by", "").removeprefix("/bin/sh -c ")
    print(f"{sizes[digest] / 1e6:9.1f} MB  {made_by[:80]}")
for name, value in sorted(image["config"]["Labels"].items()):
    print(f"label {name}: {value}")
PYTHON
$engine from --pull-never --name flexunet-test localhost/flexunet:cpu >/dev/null

say "what a pod needs: uid 1000, ray and wget on PATH, no compiler, a root that cannot be written to"
inside bash -c 'test "$(id -u)" = 1000 && wget --version | head -n 1 && ray --version && flexunet --version'
inside bash -c '! command -v gcc cc make uv pip git'
for folder in / /opt/flexunet /var/tmp /run/lock; do inside bash -c "! touch $folder/probe 2>/dev/null"; done
for folder in /tmp /cache; do inside touch $folder/probe; done

say "flexunet doctor"
inside flexunet doctor

say "the demo, with 3 epochs"
inside python -m data_prep.phantoms /tmp/demo/source --num-images 240 --size 128
inside flexunet prep /tmp/demo/source /tmp/demo/dataset --image-size 128 --group-regex "phantom-p[0-9]+" \
    --fractions 0.75,0.1,0.15
inside flexunet train --local --config /etc/flexunet/demo.yaml --epochs 3 --data /tmp/demo/dataset --output /tmp/demo/runs --name demo
inside flexunet evaluate /tmp/demo/runs/demo --split test
inside flexunet infer /tmp/demo/runs/demo /tmp/demo/source/images

say "ray start --head, the probes of KubeRay, and training with two workers"
inside bash -c 'set -e
    ray start --head --num-cpus 2 --object-store-memory 100000000 --dashboard-host 127.0.0.1 >/tmp/ray.log
    trap "ray stop >/dev/null" EXIT
    probe() { timeout 60 sh -c "until wget --tries 1 -T 2 -q -O- http://localhost:$1 | grep success; do sleep 1; done"; }
    probe 52365/api/local_raylet_healthz
    probe 8265/api/gcs_healthz
    flexunet launch train --address auto --num-workers 2 --config /etc/flexunet/demo.yaml --epochs 1 \
        --cache-dir /cache --data /tmp/demo/dataset --output /tmp/demo/runs --name cluster'
say "done"
